"""`mprd tune --study NAME`: run a study, and write its table, best settings and page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mprd.cli import PRESETS, Command, run_command
from mprd.text import new_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def tune(
    study: Annotated[str | None, typer.Option(help="Name of a study; --list shows all.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show all studies.")] = False,
    trials: Annotated[int | None, typer.Option(help="Number of trials, instead of the whole study.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Tiny sizes and one seed: does it work?")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the study in --out.")] = False,
    preset: Annotated[str | None, typer.Option(help=PRESETS)] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the data set.")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Change a setting of all trials; repeatable."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Study folder; by default runs/study-NAME.")] = None,
    objective: Annotated[str | None, typer.Option(help="label_free_score, silhouette or mAP, not the study's.")] = None,
    sampler: Annotated[str | None, typer.Option(help="tpe, random or grid, not the study's.")] = None,
    pruner: Annotated[str | None, typer.Option(help="asha, median, hyperband or none, not the study's.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Seed of the sampler; 0 by default.")] = None,
    timeout: Annotated[float | None, typer.Option(min=0, help="Seconds after which no trial starts.")] = None,
    storage: Annotated[
        str | None, typer.Option(help="Optuna's storage: database URL or journal file; by default study.db in --out.")
    ] = None,
    concurrency: Annotated[int | None, typer.Option(help="Trials side by side; by default as many as fit.")] = None,
    gpus_per_trial: Annotated[float | None, typer.Option(help="GPUs of a trial, also a share of one.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to run on; by default this machine.")] = None,
    launcher: Annotated[
        str | None,
        typer.Option(help="ray (the default where it is installed), or local: one after another in this process."),
    ] = None,
) -> None:
    """Vary settings over a grid or by Optuna, several seeds a point, trials side by side."""
    if list_:
        run_command(print_studies)
        return

    def run() -> None:
        from mprd.tune.run import run_study

        run_study(
            study,
            {"preset": preset, "data": data, "set_": set_},
            changes={"objective": objective, "sampler": sampler, "pruner": pruner, "seed": seed, "storage": storage},
            out=out,
            resume=resume,
            smoke=smoke,
            trials=trials,
            timeout=timeout,
            launcher=launcher,
            ray_options={"concurrency": concurrency, "gpus_per_trial": gpus_per_trial, "address": address},
        )

    run_command(run)


def print_studies() -> None:
    """Print every study with its size and its question."""
    from rich.table import Table

    from mprd.tune.study import load_study, study_files

    table = Table("study", "trials", "seeds", "question", box=None)
    for name in study_files():
        study = load_study(name)
        table.add_row(name, str(study.num_trials), str(len(study.seeds)), study.doc)
    new_console().print(table)
