"""`python -m mprd.adapt RUN DATA --out NEW`: the network of a run, with the statistics of other cameras."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mprd.cli import Command, run_command
from mprd.text import new_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def adapt(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[Path, typer.Argument(help="Images of the other cameras; recognized as `mprd doctor` does.")],
    out: Annotated[Path, typer.Option(help="Run folder to write.")],
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint by the label-free score.")] = False,
    name_pattern: Annotated[
        str | None, typer.Option(help="Regular expression for names, with groups pid and camid, both optional.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
) -> None:
    """Give the network of a run the statistics of other cameras, without labels or training."""
    options = {"best": best, "name_pattern": name_pattern, "device": device}
    run_command(lambda: adapt_and_print(run, data, out, options))


def adapt_and_print(run: Path, data: Path, out: Path, options: dict[str, Any]) -> None:
    """Adapt with the keyword arguments `options` of `adapt_run`, and print the cameras."""
    from mprd.adapt.run import adapt_run
    from mprd.runs.folder import RunFolder

    print(adapt_run(RunFolder(run), data, RunFolder(out), console=new_console(stderr=True), **options))
