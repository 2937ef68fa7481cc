"""`python -m mprd.evaluate RUN`: query against gallery with the network of a finished run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mprd.cli import run_command

if TYPE_CHECKING:
    from mprd.config.schema import Extra

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[Path | None, typer.Option(help="Folder of another data set in the same layout.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint by the label-free score.")] = False,
    rerank: Annotated[bool, typer.Option("--rerank", help="Also k-reciprocal re-ranking.")] = False,
    standardise: Annotated[
        bool, typer.Option("--standardise", help="Also by features standardised within each camera.")
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Report CMC, mAP and mINP of a run."""
    from mprd.config.schema import EvalConfig

    extras = EvalConfig(rerank=rerank, standardise=standardise).extras
    run_command(lambda: report(run, data=data, best=best, extras=extras, as_json=json_))


def report(run: Path, *, data: Path | None, best: bool, extras: Sequence[Extra], as_json: bool) -> None:
    """Evaluate and print."""
    import json

    from rich.console import Console

    from mprd.evaluate.run import evaluate_run
    from mprd.runs.console import figure_table
    from mprd.runs.folder import RunFolder

    row = evaluate_run(RunFolder(run), data=data, best=best, extras=extras)
    if as_json:
        print(json.dumps(row))
    else:
        Console().print(figure_table({run.name: row}))
