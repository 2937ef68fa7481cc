"""Run a study: create or open its folder, run the trials that are left, and write the report."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mprd.cli import choose_launcher, new_console
from mprd.config.schema import Config
from mprd.errors import Interrupted, UserError
from mprd.evaluate.evaluation import can_evaluate
from mprd.runs.dataset import open_dataset
from mprd.runs.folder import RunFolder
from mprd.runs.lock import held
from mprd.text import quoted
from mprd.tune.folder import StudyFolder
from mprd.tune.report import write_study_report
from mprd.tune.settings import check_points, read_settings, smoke_study
from mprd.tune.study import Objective, Study, load_study
from mprd.tune.trial_queue import TrialQueue

logger = logging.getLogger("mprd")

if TYPE_CHECKING:
    from rich.console import Console

    from mprd.tune.optuna_backend import OptunaStudy


def run_study(
    name: str | None,
    settings: dict[str, Any],
    *,
    out: Path | None = None,
    resume: bool = False,
    smoke: bool = False,
    trials: int | None = None,
    objective: str | None = None,
    launcher: str | None = None,
    ray_options: dict[str, Any] | None = None,
) -> None:
    """Run a study from the options of the command line, and write its report, also where it is interrupted.

    Args:
        settings: `preset`, `set_` and `data`.
        ray_options: `concurrency`, `gpus_per_trial` and `address`, for the launcher `ray`.
    """
    launcher, ray_options = choose_launcher(launcher), ray_options or {}
    check_options(name, settings, resume=resume, smoke=smoke, objective=objective, out=out)
    if trials is not None and trials < 1:
        raise UserError(f"--trials must be at least 1, but got {trials}")
    if launcher == "local" and any(value is not None for value in ray_options.values()):
        raise UserError("--concurrency, --gpus-per-trial and --address need --launcher ray")
    folder = StudyFolder(out or Path("runs") / f"study-{name}")
    if resume:
        folder.check_exists()
    else:
        assert name is not None
        create_study(folder, name, settings, smoke=smoke, trials=trials, objective=objective)
    with held(folder.path):
        run_and_report(folder, trials=trials, launcher=launcher, ray_options=ray_options)


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
    if objective not in (None, *get_args(Objective)):
        raise UserError(f"--objective must be {', '.join(get_args(Objective))}, but got {objective!r}")
    if name is None and not (resume and out):
        raise UserError("--study NAME is missing; --list shows all studies")
    if resume and (smoke or objective or any(settings.values())):
        raise UserError(
            "--resume goes on with the settings of its study folder; give it with --study, --out or --trials"
        )


def create_study(
    folder: StudyFolder, name: str, settings: dict[str, Any], *, smoke: bool, trials: int | None, objective: Any
) -> None:
    """Validate the study and every point of its grid, and make its folder."""
    study = smoke_study(load_study(name)) if smoke else load_study(name)
    config = read_settings(study, settings, smoke=smoke)
    check_points(study, config)
    folder.create(study, config, objective=objective or study.objective, num_trials=trials or study.num_trials)


def run_and_report(folder: StudyFolder, *, trials: int | None, launcher: str, ray_options: dict[str, Any]) -> None:
    """Run the trials of a study folder that are left, and write the report."""
    queue = open_queue(folder, trials=trials)
    study, config, console = queue.study, folder.read_config(), new_console()
    check_data(config, queue)
    if trials is not None and trials > queue.num_trials:
        console.print(f"--trials {trials}: {study.name} has only {queue.num_trials}, every point with every seed")
    console.print(
        f"{study.name}: {queue.num_left} of {queue.num_trials} trials to run in {folder.path}", soft_wrap=True
    )
    try:
        run_trials(queue, config, console, launcher=launcher, ray_options=ray_options)
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"stopped; go on with --resume --out {quoted(folder.path)}") from None
    finally:
        importance = queue.optuna.importance() if queue.optuna is not None else {}
        table = write_study_report(folder, study, config, objective=queue.objective, importance=importance)
    console.print(table)
    console.print(f"page: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    if not any(trial.state == "finished" for trial in queue.trials):
        raise UserError(f"no trial finished; the first failed with: {queue.trials[0].reason}")


def open_queue(folder: StudyFolder, *, trials: int | None) -> TrialQueue:
    """Read a study folder, with Optuna where it is installed; `trials` replaces the number of trials."""
    options = folder.read_options()
    objective: Objective = options["objective"]
    if trials is not None and trials != options["num_trials"]:
        options["num_trials"] = trials
        folder.write_options(**options)
    study = folder.read_study()
    optuna = open_optuna(folder, study, objective=objective)
    return TrialQueue(folder, study, objective=objective, num_trials=options["num_trials"], optuna=optuna)


def open_optuna(folder: StudyFolder, study: Study, *, objective: Objective) -> OptunaStudy | None:
    """Open the Optuna study; None where Optuna is not installed and the study is a plain grid."""
    try:
        from mprd.tune.optuna_backend import OptunaStudy, explained_errors, open_storage
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        if study.sampler != "grid" or study.stop is not None:
            raise UserError(
                f"{study.name} draws points or stops early, which needs optuna: pip install optuna"
            ) from None
        logger.warning("optuna is not installed: no %s, no importance", folder.database.name)
        return None
    trials = folder.read_trials()
    known = {trial.optuna_number for trial in trials if trial.optuna_number is not None}
    with explained_errors(folder.database):
        optuna = OptunaStudy(open_storage(folder.database), study, objective=objective, known=known)
        lost = [trial.number for trial in trials if not optuna.has(trial.optuna_number)]
        for number in lost:
            rows = folder.run_folder(trials[number]).read_rows()
            trials[number] = replace(trials[number], optuna_number=optuna.add(trials[number], rows))
    if lost:
        logger.warning("%s: lacked %d trials of trials.json, which were added", folder.database, len(lost))
        folder.write_trials(trials)
    return optuna


def check_data(config: Config, queue: TrialQueue) -> None:
    """Read the data set once, so that a wrong folder fails before any trial, and a synthetic one is drawn once."""
    dataset = open_dataset(config, RunFolder(queue.folder.path / "trials" / "any"))
    if queue.objective == "mAP" and not can_evaluate(dataset):
        raise UserError(f"--objective mAP: {dataset.root} has no query and gallery with identities and cameras")


def run_trials(
    queue: TrialQueue, config: Config, console: Console, *, launcher: str, ray_options: dict[str, Any]
) -> None:
    """Run the trials that are left, in this process or on Ray."""
    if launcher == "local":
        from mprd.tune.local import run_trials_locally

        run_trials_locally(queue, config, console)
        return
    from mprd.tune.ray_trials import run_trials_on_ray

    run_trials_on_ray(queue, config, console, **ray_options)
