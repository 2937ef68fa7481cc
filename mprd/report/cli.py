"""`mprd report RUN_OR_STUDY...`: one HTML page about runs and studies."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mprd.cli import Command, run_command
from mprd.text import new_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def report(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_OR_STUDY", help="Run and study folders.")],
    out: Annotated[Path, typer.Option(help="The page to write; an existing file is replaced.")] = Path("report.html"),
    best: Annotated[
        bool, typer.Option("--best", help="Use the best checkpoint by the label-free score, not the last.")
    ] = False,
) -> None:
    """Show curves, labels, features and failures of runs, side by side where there are several."""
    run_command(lambda: write(folders, out=out, best=best))


def write(folders: list[Path], *, out: Path, best: bool) -> None:
    """Write the page, and print each stage."""
    import time

    from rich.text import Text

    from mprd.report.page import write_page

    screen = new_console()
    started = time.monotonic()
    with screen.status("reading the folders") as status:

        def progress(stage: str) -> None:
            status.update(Text(stage))
            screen.print(f"{time.monotonic() - started:5.1f} s  {stage}", highlight=False, soft_wrap=True)

        write_page(folders, out=out, best=best, progress=progress)
    size = out.stat().st_size / 2**20
    screen.print(f"page: {out} ({size:.1f} MB)", highlight=False, soft_wrap=True)
