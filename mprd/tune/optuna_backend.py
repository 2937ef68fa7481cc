"""Optuna: draws points, stops poor trials, and keeps a database for optuna-dashboard."""

from __future__ import annotations

import logging
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import StorageInternalError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState
from sqlalchemy.exc import SQLAlchemyError

from mprd.errors import UserError
from mprd.tune.study import SEED, Choice, Grid, Point, Settings, Stop, Study

if TYPE_CHECKING:
    from mprd.tune.trial import State, Trial

logger = logging.getLogger("mprd")

POINT = "point"
"""The parameter that holds the name of a named point."""
LOCK_SECONDS = 30
"""Longest wait for another process that writes to the database, such as optuna-dashboard."""
STORAGE_ERRORS = (StorageInternalError, SQLAlchemyError)
STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


class OptunaStudy:
    """An Optuna study, driven by ask and tell."""

    def __init__(
        self,
        storage: BaseStorage,
        study: Study,
        *,
        objective: str,
        known: set[int],
        name: str | None = None,
        seed: int = 0,
    ) -> None:
        """Open or create the study.

        Args:
            known: numbers of the trials in the study folder; other running trials are closed as failed.
            name: in a storage that other studies share; the study's own by default.
            seed: of the sampler.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = distributions(study)
        self.has_points = bool(study.points)
        self.objective = objective
        self.running: dict[int, optuna.Trial] = {}
        self.sampler, self.seed = study.sampler, seed
        self.study = optuna.create_study(
            storage=storage,
            study_name=name or study.name,
            direction="maximize",
            load_if_exists=True,
            pruner=build_pruner(study.stop),
        )
        self.study.set_user_attr("question", study.doc)
        self.study.set_user_attr("objective", objective)
        self.fail_unknown(known)

    def fail_unknown(self, known: set[int]) -> None:
        """Close the trials that a killed process asked for but did not record."""
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            if trial.number not in known:
                self.study.tell(trial.number, state=TrialState.FAIL)
        while self.study.get_trials(states=(TrialState.WAITING,)):
            self.study.tell(self.study.ask(), state=TrialState.FAIL)

    def has(self, number: int | None) -> bool:
        """Return whether the database holds a trial of the study folder, which keeps none without Optuna."""
        return number is None or number < len(self.study.trials)

    def add(self, trial: Trial, rows: list[dict[str, Any]]) -> int | None:
        """Add a trial that ended and that the database lacks, with its rows of metrics; return its new number.

        A trial that was running, or whose metrics are gone, is not added.
        """
        values = {row["epoch"] + 1: row[self.objective] for row in rows if row.get(self.objective) is not None}
        if trial.state == "running" or (trial.state == "finished" and not values):
            return None
        params = {SEED: trial.seed, **({POINT: trial.point} if self.has_points else trial.settings)}
        self.study.add_trial(
            optuna.trial.create_trial(
                state=STATES[trial.state],
                params=params,
                distributions={name: self.space[name] for name in params},
                value=values[max(values)] if trial.state == "finished" else None,
                intermediate_values=values,
                user_attrs={} if trial.reason is None else {"reason": trial.reason},
            )
        )
        return self.study.trials[-1].number

    def ask(self, point: Point | None, seed: int) -> tuple[int, Settings]:
        """Start a trial at a point, or at one that the sampler draws; return its number and settings."""
        fixed: dict[str, Any] = {SEED: seed}
        if point is not None:
            fixed |= {POINT: point.name} if self.has_points else point.set
        # by the number of the trial, so that a resumed study draws as an uninterrupted one
        (number,) = np.random.SeedSequence([self.seed, len(self.study.trials)]).generate_state(1)
        self.study.sampler = build_sampler(self.sampler, seed=int(number))
        self.study.enqueue_trial(fixed)
        trial = self.study.ask(fixed_distributions=self.space)
        self.running[trial.number] = trial
        settings = {name: value for name, value in trial.params.items() if name not in (SEED, POINT)}
        return trial.number, settings

    def find(self, number: int) -> optuna.Trial:
        """Return a running trial, also one that an earlier process started."""
        if number not in self.running:
            frozen = self.study.trials[number]
            self.running[number] = optuna.Trial(self.study, frozen._trial_id)
        return self.running[number]

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Record the objective of an epoch; return whether the pruner stops the trial."""
        with logged_errors():
            trial, known = self.find(number), self.study.trials[number]
            # pruners count completed epochs
            if not known.state.is_finished() and epoch + 1 not in known.intermediate_values:
                trial.report(value, epoch + 1)
            return bool(trial.should_prune())
        return False

    def tell(self, number: int, state: State, value: float | None, reason: str | None) -> None:
        """Close a trial, unless an earlier process has, which ended before trials.json had it."""
        with logged_errors():
            if self.study.trials[number].state.is_finished():
                return
            if reason is not None:
                self.find(number).set_user_attr("reason", reason)
            self.study.tell(number, value if state == "finished" else None, state=STATES[state])

    def importance(self) -> dict[str, float]:
        """Return each parameter's share of the objective's variance (fANOVA), largest first.

        Empty if fewer than two parameters vary, or fewer than four trials are complete.
        """
        done: list[optuna.trial.FrozenTrial] = []
        with logged_errors():
            done = self.study.get_trials(states=(TrialState.COMPLETE,))
        varied = [name for name in self.space if len({trial.params.get(name) for trial in done}) > 1]
        values = {trial.value for trial in done}
        if len(varied) < 2 or len(done) < 4 or len(values) < 2:
            return {}
        shares = optuna.importance.get_param_importances(
            self.study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )
        return {name: share for name, share in shares.items() if name in varied}


def open_shared(place: str) -> BaseStorage:
    """Open or create what `--storage` names: the URL of a database, or else a journal file.

    Raises UserError where it cannot be opened.
    """
    try:
        return RDBStorage(place) if "://" in place else JournalStorage(JournalFileBackend(place))
    except Exception as error:  # of the database's driver, or of the file system
        raise UserError(f"--storage {place}: cannot be opened ({storage_reason(error)})") from None


def check_unused(storage: BaseStorage, name: str, *, place: str) -> None:
    """Raise UserError where a storage holds a study of this name already, whose trials would be taken for ours."""
    if name in optuna.get_all_study_names(storage):
        raise UserError(f"--storage {place}: holds a study {name} already; give another --out, whose name it takes")


def open_storage(database: Path) -> BaseStorage:
    """Open or create a database of SQLite; raise UserError where it is none, or locked."""
    path = database.resolve()

    def connect() -> sqlite3.Connection:
        return sqlite3.connect(path, timeout=LOCK_SECONDS, check_same_thread=False)

    with explained_errors(database):
        # in an address of SQLAlchemy ? and % have a meaning, as { has for Optuna; its file is the one connected to
        return RDBStorage("sqlite:///study.db", engine_kwargs={"creator": connect})


@contextmanager
def explained_errors(database: Path | str) -> Iterator[None]:
    """Turn an error of the database into one line."""
    try:
        yield
    except STORAGE_ERRORS as error:
        raise UserError(
            f"{database}: {storage_reason(error)}; end what uses it, or remove it: it is made anew from trials.json"
        ) from None


@contextmanager
def logged_errors() -> Iterator[None]:
    """Log an error of the database in place of raising it: trials.json holds all that counts."""
    try:
        yield
    except STORAGE_ERRORS as error:
        logger.warning("study.db: %s, so a result is missing there; trials.json holds it", storage_reason(error))


def storage_reason(error: BaseException) -> str:
    """Return the database's own words, such as `database is locked`."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(getattr(error, "orig", None) or error).splitlines()[0]


def distributions(study: Study) -> dict[str, BaseDistribution]:
    """Translate the space to Optuna; the seed is a parameter too, but never drawn."""
    space: dict[str, BaseDistribution] = {}
    if study.points:
        space[POINT] = CategoricalDistribution([point.name for point in study.points])
    for name, dimension in study.space.items():
        if isinstance(dimension, Grid):
            space[name] = CategoricalDistribution(dimension.grid)
        elif isinstance(dimension, Choice):
            space[name] = CategoricalDistribution(dimension.choice)
        elif dimension.is_integer:
            space[name] = IntDistribution(int(dimension.low), int(dimension.high), log=dimension.log)
        else:
            space[name] = FloatDistribution(dimension.low, dimension.high, log=dimension.log)
    space[SEED] = CategoricalDistribution(study.all_seeds)
    return space


def build_sampler(name: str, *, seed: int) -> optuna.samplers.BaseSampler:
    """Build the sampler; a grid gives every point itself, so that any will do."""
    if name == "tpe":
        # running trials count as poor, so that concurrent ones are drawn elsewhere
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def build_pruner(stop: Stop | None) -> optuna.pruners.BasePruner:
    if stop is None:
        return optuna.pruners.NopPruner()
    if stop.kind == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(min_resource=stop.grace_epochs, reduction_factor=stop.reduction)
    if stop.kind == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=stop.grace_epochs, reduction_factor=stop.reduction)
    return optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=stop.grace_epochs)
