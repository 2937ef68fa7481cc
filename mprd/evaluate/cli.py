"""`python -m mprd.evaluate RUN`: evaluate the network of a run, query against gallery."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mprd.cli import Command, run_command
from mprd.text import new_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def evaluate(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    data: Annotated[Path | None, typer.Option(help="Another data set; query and gallery suffice.")] = None,
    same_cameras: Annotated[
        bool, typer.Option("--same-cameras", help="The cameras of --data are those trained on, by name.")
    ] = False,
    name_pattern: Annotated[
        str | None, typer.Option(help="Regular expression with groups pid and camid for the names of --data.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint by the label-free score.")] = False,
    rerank: Annotated[bool, typer.Option("--rerank", help="Also k-reciprocal re-ranking.")] = False,
    whiten: Annotated[
        bool, typer.Option("--whiten", help="Also by features whitened as the training images were.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Report CMC, mAP and mINP of a run."""
    options = {"data": data, "same_cameras": same_cameras, "name_pattern": name_pattern, "best": best}
    options |= {"reranks": rerank, "whitens": whiten, "device": device}
    run_command(lambda: evaluate_and_print(run, options, as_json=json_))


def evaluate_and_print(run: Path, options: dict[str, Any], *, as_json: bool) -> None:
    """Evaluate with the keyword arguments `options` of `evaluate_run`, and print the figures."""
    import json

    from mprd.evaluate.run import evaluate_run
    from mprd.runs.console import figure_table
    from mprd.runs.folder import RunFolder

    row = evaluate_run(RunFolder(run), **options)
    if as_json:
        print(json.dumps(row))
    else:
        new_console().print(figure_table({run.resolve().name: row}))
