"""`python -m mprd.doctor ROOT`: what a folder holds, what is wrong with it, and the command that trains on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from mprd.cli import run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def doctor(
    root: Annotated[Path, typer.Argument(help="Folder of a data set, or of crops.")],
    json_: Annotated[bool, typer.Option("--json", help="Print what was found as JSON.")] = False,
) -> None:
    """Look at a data set before training; exit 1 when training would fail."""
    run_command(lambda: report(root, as_json=json_))


def report(root: Path, *, as_json: bool) -> None:
    """Examine and print; leave with 1 where training would fail."""
    import json

    from rich.console import Console
    from rich.progress import track

    from mprd.doctor.checks import examine, print_checkup

    screen = Console(stderr=True)

    def show(files: Iterable[Any], total: int) -> Iterable[Any]:
        return track(files, "reading images", total=total, console=screen, transient=True, disable=as_json)

    checkup = examine(root, track=show)
    if as_json:
        print(json.dumps(checkup.row(), indent=2))
    else:
        print_checkup(checkup, Console())
    if checkup.command is None:
        raise SystemExit(1)
