"""`python -m mprd.doctor ROOT`: the contents of a folder, its faults, and the command that trains on it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import typer

from mprd.cli import Command, run_command
from mprd.text import new_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def doctor(
    root: Annotated[
        Path, typer.Argument(help="Folder of a data set or of crops, or a CSV file,split,identity,camera.")
    ],
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="DATA.FIELD=VALUE", help="As for train; repeatable.")
    ] = None,
    backbone: Annotated[str | None, typer.Option(help="Estimate the cost with this network (backbone.name).")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Examine a data set before training; exit with 1 when training would fail."""
    run_command(lambda: print_examination(root, set_ or [], backbone=backbone, as_json=json_))


def print_examination(root: Path, settings: list[str], *, backbone: str | None, as_json: bool) -> None:
    """Examine a folder and print the report; exit with 1 where training would fail."""
    import json

    from rich.progress import track

    from mprd.doctor.checks import examine
    from mprd.doctor.printing import print_report

    screen = new_console(stderr=True)

    def show(files: Iterable[Any], total: int) -> Iterable[Any]:
        return track(files, "reading images", total=total, console=screen, transient=True, disable=as_json)

    report = examine(root, settings=settings, backbone=backbone, track=show)
    if as_json:
        print(json.dumps(report.row(), indent=2))
    else:
        print_report(report, new_console(highlight=False, soft_wrap=True))
    if report.command is None:
        raise SystemExit(1)
