"""`mprd COMMAND` or `python -m mprd COMMAND`: all commands under one name, with shell completion."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup
from typer.main import get_command

from mprd.cli import main

COMMANDS = ("train", "tune", "evaluate", "extract", "search", "adapt", "export", "report", "doctor")


class Commands(TyperGroup):
    """The commands, each imported when it is called or listed."""

    def list_commands(self, _context: Any) -> list[str]:
        """Return the names in the order of first use."""
        return list(COMMANDS)

    def get_command(self, _context: Any, name: str) -> Any:
        """Import a command; return None for an unknown name."""
        if name not in COMMANDS:
            return None
        command = get_command(import_module(f"mprd.{name}").app)
        command.name = name
        return command


app = typer.Typer(cls=Commands, no_args_is_help=True, pretty_exceptions_enable=False)


@app.callback()
def mprd() -> None:
    """Unsupervised person re-identification: train, look at the result, put it to use."""


def run() -> None:
    """Run the command that the command line names."""
    main(app, "mprd")


if __name__ == "__main__":
    run()
