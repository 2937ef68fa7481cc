"""`python -m mprd.tune --study NAME`: run a study, and leave a folder with its table, best settings and page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from mprd.cli import PRESETS, choose_launcher, run_command

if TYPE_CHECKING:
    from mprd.config.schema import Config
    from mprd.tune.folder import Ledger, StudyFolder
    from mprd.tune.study import Objective, Study

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def tune(
    study: Annotated[str | None, typer.Option(help="Name of a study; --list shows all.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Show all studies.")] = False,
    trials: Annotated[int | None, typer.Option(help="Run so many trials in all, not the whole study.")] = None,
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
    concurrency: Annotated[int | None, typer.Option(help="Trials side by side; by default what fits.")] = None,
    gpus_per_trial: Annotated[float | None, typer.Option(help="Share of a GPU that a trial takes.")] = None,
    address: Annotated[str | None, typer.Option(help="Ray cluster to run on; by default this machine.")] = None,
    launcher: Annotated[
        str | None,
        typer.Option(help="ray, or local: one after another in this process; ray where it is installed."),
    ] = None,
) -> None:
    """Vary settings over a grid or by Optuna, several seeds a point, trials side by side."""
    settings = {"preset": preset, "data": data, "set_": set_}
    if list_:
        run_command(list_studies)
        return
    run_command(
        lambda: launch(
            study,
            settings,
            out=out,
            resume=resume,
            smoke=smoke,
            trials=trials,
            objective=objective,
            launcher=launcher,
            resources={"concurrency": concurrency, "gpus_per_trial": gpus_per_trial, "address": address},
        )
    )


def list_studies() -> None:
    """Print every study with its size and its question."""
    from rich.console import Console
    from rich.table import Table

    from mprd.tune.study import load_study, study_files

    table = Table("study", "trials", "seeds", "question", box=None)
    for name in study_files():
        study = load_study(name)
        table.add_row(name, str(study.num_trials), str(len(study.seeds)), study.doc)
    Console().print(table)


def launch(
    name: str | None,
    settings: dict[str, Any],
    *,
    out: Path | None,
    resume: bool,
    smoke: bool,
    trials: int | None,
    objective: str | None,
    launcher: str | None,
    resources: dict[str, Any],
) -> None:
    """Open the study, run what is left of it, and write its report, also where it was stopped."""
    from mprd.errors import UserError
    from mprd.runs.lock import held
    from mprd.tune.folder import StudyFolder

    launcher = choose_launcher(launcher)
    check_options(name, settings, resume=resume, smoke=smoke, objective=objective, out=out)
    if trials is not None and trials < 1:
        raise UserError(f"--trials must be at least 1, but got {trials}")
    if launcher == "local" and any(value is not None for value in resources.values()):
        raise UserError("--concurrency, --gpus-per-trial and --address are Ray's: give --launcher ray")
    folder = StudyFolder(out or Path("runs") / f"study-{name}")
    if resume:
        folder.check_is_there()
    else:
        assert name is not None
        begin(folder, name, settings, smoke=smoke, trials=trials, objective=objective)
    with held(folder.path):
        run_and_report(folder, trials=trials, launcher=launcher, resources=resources)


def run_and_report(folder: StudyFolder, *, trials: int | None, launcher: str, resources: dict[str, Any]) -> None:
    """Run what is left of the study in a folder, and write its report."""
    from rich.console import Console

    from mprd.errors import Interrupted, UserError
    from mprd.tune.report import write_report

    study, config, ledger = open_study(folder, trials=trials)
    console = Console()
    check_data(config, folder, ledger)
    console.print(
        f"{study.name}: {ledger.num_left} of {ledger.num_trials} trials to run in {folder.path}", soft_wrap=True
    )
    try:
        run_trials(ledger, config, console, launcher=launcher, resources=resources)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"stopped; go on with --study {study.name} --resume --out {folder.path}") from None
    finally:
        importance = ledger.mirror.importance() if ledger.mirror is not None else {}
        table = write_report(folder, study, config, objective=ledger.objective, importance=importance)
    console.print(table)
    console.print(f"page: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    if not any(trial.state == "finished" for trial in ledger.trials):
        raise UserError(f"no trial finished; the first failed with: {ledger.trials[0].reason}")


def check_options(
    name: str | None,
    settings: dict[str, Any],
    *,
    resume: bool,
    smoke: bool,
    objective: str | None,
    out: Path | None,
) -> None:
    """Refuse options that contradict each other."""
    from mprd.errors import UserError
    from mprd.tune.study import Objective

    if objective not in (None, *get_args(Objective)):
        raise UserError(f"--objective must be {', '.join(get_args(Objective))}, but got {objective!r}")
    if name is None and not (resume and out):
        raise UserError("--study NAME is missing; --list shows all studies")
    if resume and (smoke or objective or any(settings.values())):
        raise UserError(
            "--resume goes on with the settings of its study folder; give it with --study, --out or --trials"
        )


def begin(
    folder: StudyFolder, name: str, settings: dict[str, Any], *, smoke: bool, trials: int | None, objective: Any
) -> None:
    """Validate the study and every point of its grid, and make its folder."""
    from mprd.tune.folder import Trial, trial_config
    from mprd.tune.study import load_study

    study = load_study(name)
    if smoke:
        study = study.model_copy(update={"seeds": study.seeds[:1], "trials": SMOKE_TRIALS if study.trials else None})
    config = read_settings(study, settings, smoke=smoke)
    for point in study.grid():
        trial_config(config, Trial(0, point.name, dict(point.set), study.seeds[0]))
    folder.create(study, config, objective=objective or study.objective, num_trials=trials or study.num_trials)


SMOKE_TRIALS = 4
"""Trials of a smoke study whose points are drawn."""

SMOKE = {
    "backbone": {"name": "small", "weights": "none", "num_stripes": 1},
    "data": {"height": 32, "width": 16, "num_workers": 0},
    "train": {"epochs": 2, "warmup_epochs": 0, "threads": 1},
    "neighbors": {"k": 4},
}
SMOKE_DRAWN = {"num_train_ids": 24, "num_test_ids": 12, "num_cameras": 3, "images_per_camera": 2}


def read_settings(study: Study, settings: dict[str, Any], *, smoke: bool) -> Config:
    """Merge preset, study, smoke sizes, overrides and data folder, later ones winning."""
    from mprd.config.loading import absolute, build_config, merge, parse_override, read_preset
    from mprd.train.cli import read_settings as read_train_settings
    from mprd.tune.study import nest

    # checks --data against the preset, and every override
    given = read_train_settings({**settings, "config": None, "seed": None})
    values = read_preset(settings["preset"] or "demo")
    merge(values, nest(dict(study.set)))
    if smoke:
        merge(values, SMOKE)
        if given.data.dataset == "synthetic":
            merge(values, {"data": {"synthetic": SMOKE_DRAWN}})
    for override in settings["set_"] or ():
        merge(values, parse_override(override))
    if given.data.root is not None:
        merge(values, {"data": {"root": str(given.data.root)}})
    # trials stand in folders of their own
    return absolute(build_config(values))


def open_study(folder: StudyFolder, *, trials: int | None) -> tuple[Study, Config, Ledger]:
    """Read a study folder and open its ledger, with Optuna where it is installed."""
    from mprd.tune.folder import Ledger

    options = folder.read_options()
    objective: Objective = options["objective"]
    if trials is not None and trials != options["num_trials"]:
        options["num_trials"] = trials
        folder.write_options(**options)
    study = folder.read_study()
    known = {trial.mirror for trial in folder.read_trials() if trial.mirror is not None}
    mirror = open_mirror(folder, study, objective=objective, known=known)
    ledger = Ledger(folder, study, objective=objective, num_trials=options["num_trials"], mirror=mirror)
    return study, folder.read_config(), ledger


def open_mirror(folder: StudyFolder, study: Study, *, objective: Objective, known: set[int]) -> Any:
    """Open the Optuna study; without Optuna a plain grid still runs."""
    import logging

    from mprd.errors import UserError

    try:
        from mprd.tune.optuna_backend import OptunaStudy
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        if study.sampler != "grid" or study.stop is not None:
            raise UserError(
                f"{study.name} draws points or stops early, which needs optuna: pip install optuna"
            ) from None
        logging.getLogger("mprd").warning("optuna is not installed: no %s, no importance", folder.database.name)
        return None
    return OptunaStudy(folder.database, study, objective=objective, known=known)


def check_data(config: Config, folder: StudyFolder, ledger: Ledger) -> None:
    """Read the data set once, so that a wrong folder is told before any trial, and a drawn one is drawn once."""
    from mprd.errors import UserError
    from mprd.evaluate.evaluation import can_evaluate
    from mprd.runs.dataset import open_dataset
    from mprd.runs.folder import RunFolder

    dataset = open_dataset(config, RunFolder(folder.path / "trials" / "any"))
    if ledger.objective == "mAP" and not can_evaluate(dataset):
        raise UserError(f"--objective mAP: {dataset.root} has no query and gallery with identities and cameras")


def run_trials(ledger: Ledger, config: Config, console: Any, *, launcher: str, resources: dict[str, Any]) -> None:
    """Run what is left of a study."""
    if launcher == "local":
        from mprd.tune.local import run_locally

        run_locally(ledger, config, console)
        return
    from mprd.tune.ray_trials import run_on_ray

    run_on_ray(ledger, config, console, **resources)
