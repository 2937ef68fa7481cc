"""Run a study: create or open its folder, run the trials that are left, and write the report."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from mprd.cli import choose_launcher
from mprd.config.schema import Config
from mprd.data.same_images import record_images
from mprd.errors import Interrupted, UserError
from mprd.runs.dataset import open_dataset
from mprd.runs.lock import held
from mprd.text import new_console, quoted
from mprd.train.trackers import check_tracker
from mprd.tune.board import TrialBoard
from mprd.tune.folder import StudyFolder, StudyOptions
from mprd.tune.report import other_quantity, write_study_report
from mprd.tune.settings import check_points, read_settings, smoke_study
from mprd.tune.study import Objective, Pruner, Sampler, Study, load_study, with_pruner, with_sampler
from mprd.tune.trial_queue import MAX_ALIKE, TrialQueue

logger = logging.getLogger("mprd")

if TYPE_CHECKING:
    from rich.console import Console

    from mprd.tune.optuna_backend import OptunaStudy


CHANGES: dict[str, tuple[str, ...]] = {
    "objective": get_args(Objective),
    "sampler": (*sorted(get_args(Sampler)),),
    "pruner": (*sorted(get_args(Pruner)), "none"),
}
"""Options that replace a part of the study, and their values."""


def run_study(
    name: str | None,
    settings: dict[str, Any],
    *,
    changes: dict[str, Any] | None = None,
    out: Path | None = None,
    resume: bool = False,
    smoke: bool = False,
    trials: int | None = None,
    timeout: float | None = None,
    launcher: str | None = None,
    ray_options: dict[str, Any] | None = None,
) -> None:
    """Run a study from the options of the command line, and write its report, also where it is interrupted.

    Args:
        settings: `preset`, `set_` and `data`.
        changes: `objective`, `sampler`, `pruner`, `seed` and `storage`, in place of the study's.
        timeout: seconds after which no trial starts.
        ray_options: `concurrency`, `gpus_per_trial` and `address`, for the launcher `ray`.
    """
    launcher, ray_options = choose_launcher(launcher), ray_options or {}
    changes = {key: value for key, value in (changes or {}).items() if value is not None}
    check_options(name, settings, changes, resume=resume, smoke=smoke, out=out)
    if trials is not None and trials < 1:
        raise UserError(f"--trials must be at least 1, but got {trials}")
    if launcher == "local" and any(value is not None for value in ray_options.values()):
        raise UserError("--concurrency, --gpus-per-trial and --address need --launcher ray")
    folder = StudyFolder(out or Path("runs") / f"study-{name}")
    if resume:
        folder.check_exists()
    else:
        assert name is not None
        create_study(folder, name, settings, changes, smoke=smoke, trials=trials)
    with held(folder.path):
        run_and_report(folder, trials=trials, timeout=timeout, launcher=launcher, ray_options=ray_options)


def check_options(
    name: str | None,
    settings: dict[str, Any],
    changes: dict[str, Any],
    *,
    resume: bool,
    smoke: bool,
    out: Path | None,
) -> None:
    """Refuse options that contradict each other."""
    for key, known in CHANGES.items():
        if key in changes and changes[key] not in known:
            raise UserError(f"--{key} must be {', '.join(known)}, but got {changes[key]!r}")
    if name is None and not (resume and out):
        raise UserError("--study NAME is missing; --list shows all studies")
    if resume and (smoke or changes or any(settings.values())):
        raise UserError(
            "--resume goes on with the settings of its study folder; give it with --study, --out, --trials or --timeout"
        )


def create_study(
    folder: StudyFolder,
    name: str,
    settings: dict[str, Any],
    changes: dict[str, Any],
    *,
    smoke: bool,
    trials: int | None,
) -> None:
    """Validate the study and every point of its grid, and make its folder."""
    study = change_study(load_study(name), changes, trials=trials)
    if smoke:
        study = smoke_study(study)
    config = read_settings(study, settings, smoke=smoke)
    check_points(study, config)
    if config.train.tracker_group is None:
        config = config.model_copy(update={"train": config.train.model_copy(update={"tracker_group": study.name})})
    options = StudyOptions(
        objective=changes.get("objective", study.objective),
        num_trials=trials or study.num_trials,
        seed=changes.get("seed", 0),
        storage=absolute_storage(changes.get("storage")),
    )
    check_storage(folder, options)
    folder.create(study, config, options)


def change_study(study: Study, changes: dict[str, Any], *, trials: int | None) -> Study:
    """Replace sampler and pruner of a study by those of the command line."""
    if "sampler" in changes:
        study = with_sampler(study, changes["sampler"], trials=trials)
    return with_pruner(study, changes["pruner"]) if "pruner" in changes else study


def absolute_storage(place: str | None) -> str | None:
    """Return a storage that other working folders find too; a URL is left as it is."""
    return place if place is None or "://" in place else str(Path(place).resolve())


def check_storage(folder: StudyFolder, options: StudyOptions) -> None:
    """Raise UserError for a storage that cannot be opened, or that holds a study of this name already."""
    if options.storage is not None:
        from mprd.tune.optuna_backend import check_unused, open_shared

        check_unused(open_shared(options.storage), folder.path.resolve().name, place=options.storage)


def run_and_report(
    folder: StudyFolder, *, trials: int | None, timeout: float | None, launcher: str, ray_options: dict[str, Any]
) -> None:
    """Run the trials of a study folder that are left, and write the report."""
    queue = open_queue(folder, trials=trials, timeout=timeout)
    study, config, console = queue.study, folder.read_config(), new_console()
    check_run(config, queue)
    if trials is not None and trials > queue.num_trials:
        console.print(f"--trials {trials}: {study.name} has only {queue.num_trials}, every point with every seed")
    console.print(
        f"{study.name}: {queue.num_left} of {queue.num_trials} trials to run in {folder.path}", soft_wrap=True
    )
    if remark := other_quantity(study, config):
        console.print(remark, soft_wrap=True)
    importance: dict[str, float] = {}
    try:
        run_trials(queue, config, console, launcher=launcher, ray_options=ray_options)
        if num_refits := queue.plan_refits():
            console.print(f"{study.name}: {num_refits} trials more, for other seeds of the best points")
            run_trials(queue, config, console, launcher=launcher, ray_options=ray_options)
        # its imports take seconds, which a stop has not
        importance = queue.optuna.importance() if queue.optuna is not None else {}
    except (Interrupted, KeyboardInterrupt):
        raise Interrupted(f"stopped; go on with --resume --out {quoted(folder.path)}") from None
    finally:
        table = write_study_report(folder, study, config, objective=queue.objective, importance=importance)
    console.print(table)
    console.print(f"page: {folder.path / 'report.html'}", highlight=False, soft_wrap=True)
    check_end(queue)


def check_end(queue: TrialQueue) -> None:
    """Raise UserError where trials failed alike or none finished, and Interrupted where the timeout left some."""
    go_on = f"go on with --resume --out {quoted(queue.folder.path)}"
    if queue.repeated_failure is not None and queue.num_left > 0:
        raise UserError(
            f"stopped after {MAX_ALIKE} trials that failed alike, {queue.num_left} are left: "
            f"{queue.repeated_failure}; {go_on}"
        )
    if not any(trial.state == "finished" for trial in queue.trials):
        reason = queue.trials[0].reason if queue.trials else "none was started"
        raise UserError(f"no trial finished; the first failed with: {reason}")
    if queue.is_late and queue.num_left > 0:
        raise Interrupted(f"--timeout: {queue.num_left} trials are left; {go_on}")


def open_queue(folder: StudyFolder, *, trials: int | None, timeout: float | None = None) -> TrialQueue:
    """Read a study folder, with Optuna where it is installed; `trials` replaces the number of trials."""
    options = folder.read_options()
    if trials is not None and trials != options.num_trials:
        options = replace(options, num_trials=trials)
        folder.write_options(options)
    study = folder.read_study()
    optuna = open_optuna(folder, study, options)
    return TrialQueue(
        folder, study, objective=options.objective, num_trials=options.num_trials, optuna=optuna, timeout=timeout
    )


def open_optuna(folder: StudyFolder, study: Study, options: StudyOptions) -> OptunaStudy | None:
    """Open the Optuna study; None where Optuna is not installed and the study is a plain grid."""
    try:
        from mprd.tune.optuna_backend import OptunaStudy, explained_errors, open_shared, open_storage
    except ModuleNotFoundError as error:
        if error.name != "optuna":
            raise
        if study.sampler != "grid" or study.stop is not None:
            raise UserError(
                f"{study.name} draws points or stops early, which needs optuna: pip install optuna"
            ) from None
        logger.warning("optuna is not installed: no %s, no importance", folder.database.name)
        return None
    trials, shared = folder.read_trials(), options.storage
    known = {trial.optuna_number for trial in trials if trial.optuna_number is not None}
    with explained_errors(shared or folder.database):
        optuna = OptunaStudy(
            open_storage(folder.database) if shared is None else open_shared(shared),
            study,
            objective=options.objective,
            known=known,
            # other studies may share the storage
            name=None if shared is None else folder.path.resolve().name,
            seed=options.seed,
        )
        lost = [trial.number for trial in trials if not optuna.has(trial.optuna_number)]
        for number in lost:
            rows = folder.run_folder(trials[number]).read_rows()
            trials[number] = replace(trials[number], optuna_number=optuna.add(trials[number], rows))
    if lost:
        logger.warning("%s: lacked %d trials of trials.json, which were added", shared or folder.database, len(lost))
        folder.write_trials(trials)
    return optuna


def check_run(config: Config, queue: TrialQueue) -> None:
    """Raise UserError for what every trial would fail with; a synthetic data set is drawn here, once."""
    check_tracker(config.train.tracker)
    dataset = open_dataset(config)
    queue.folder.check_images(record_images(dataset, config.data), on_changed=config.data.on_changed)
    if queue.objective == "mAP" and not dataset.can_evaluate:
        raise UserError(f"--objective mAP: {dataset.root} has no query and gallery with identities and cameras")


def run_trials(
    queue: TrialQueue, config: Config, console: Console, *, launcher: str, ray_options: dict[str, Any]
) -> None:
    """Run the trials that are left, in this process or on Ray, and show where they are.

    Raises UserError where there are any, and an earlier version trained them in a way that is gone.
    """
    if queue.num_left > 0:
        queue.folder.check_is_resumable()
    with TrialBoard(queue, console, num_epochs=config.train.epochs):
        if launcher == "local":
            from mprd.tune.local import run_trials_locally

            run_trials_locally(queue, config, console)
            return
        from mprd.tune.ray_trials import run_trials_on_ray

        run_trials_on_ray(queue, config, console, **ray_options)
