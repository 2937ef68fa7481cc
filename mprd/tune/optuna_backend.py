"""The door to Optuna: draws points, stops poor trials, and keeps a file that optuna-dashboard opens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState

from mprd.tune.study import SEED, Choice, Grid, Point, Settings, Stop, Study

if TYPE_CHECKING:
    from mprd.tune.folder import State

POINT = "point"
"""Parameter that stands for a named point."""
STATES = {"finished": TrialState.COMPLETE, "stopped": TrialState.PRUNED, "failed": TrialState.FAIL}


class OptunaStudy:
    """One study in an SQLite file; each of our trials is one of its trials."""

    def __init__(self, database: Path, study: Study, *, objective: str, known: set[int]) -> None:
        """Open or make the file.

        Args:
            known: numbers of its trials that a ledger knows; others that never ended are closed as failed.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = distributions(study)
        self.has_points = bool(study.points)
        self.handles: dict[int, optuna.Trial] = {}
        self.study = optuna.create_study(
            storage=f"sqlite:///{database}",
            study_name=study.name,
            direction="maximize",
            load_if_exists=True,
            pruner=build_pruner(study.stop),
        )
        self.study.set_user_attr("question", study.doc)
        self.study.set_user_attr("objective", objective)
        # seeded by what is there: going on must not draw the first points again
        self.study.sampler = build_sampler(study.sampler, seed=len(self.study.trials))
        self.close_strays(known)

    def close_strays(self, known: set[int]) -> None:
        """Close what a kill left between being asked for and being written down."""
        for trial in self.study.get_trials(states=(TrialState.RUNNING,)):
            if trial.number not in known:
                self.study.tell(trial.number, state=TrialState.FAIL)
        while self.study.get_trials(states=(TrialState.WAITING,)):
            self.study.tell(self.study.ask(), state=TrialState.FAIL)

    def ask(self, point: Point | None, seed: int) -> tuple[int, Settings]:
        """Start a trial at a point, or at one of the sampler's choice; return its number and settings."""
        fixed: dict[str, Any] = {SEED: seed}
        if point is not None:
            fixed |= {POINT: point.name} if self.has_points else point.set
        self.study.enqueue_trial(fixed)
        trial = self.study.ask(fixed_distributions=self.space)
        self.handles[trial.number] = trial
        settings = {name: value for name, value in trial.params.items() if name not in (SEED, POINT)}
        return trial.number, settings

    def handle(self, number: int) -> optuna.Trial:
        """Return a trial that is under way, also one of an earlier process."""
        if number not in self.handles:
            frozen = self.study.trials[number]
            self.handles[number] = optuna.Trial(self.study, frozen._trial_id)
        return self.handles[number]

    def report(self, number: int, epoch: int, value: float) -> bool:
        """Write down an epoch's objective; say whether the stop rule wants the trial stopped."""
        trial = self.handle(number)
        # the rules count epochs trained
        if epoch + 1 not in self.study.trials[number].intermediate_values:
            trial.report(value, epoch + 1)
        return bool(trial.should_prune())

    def tell(self, number: int, state: State, value: float | None, reason: str | None) -> None:
        """Close a trial."""
        if reason is not None:
            self.handle(number).set_user_attr("reason", reason)
        self.study.tell(number, value if state == "finished" else None, state=STATES[state])

    def importance(self) -> dict[str, float]:
        """Return each parameter's share of the objective's variance (fANOVA), the largest first.

        Empty where fewer than two parameters vary, or too few trials have ended to tell.
        """
        done = self.study.get_trials(states=(TrialState.COMPLETE,))
        varied = [name for name in self.space if len({trial.params.get(name) for trial in done}) > 1]
        values = {trial.value for trial in done}
        if len(varied) < 2 or len(done) < 4 or len(values) < 2:
            return {}
        shares = optuna.importance.get_param_importances(
            self.study, evaluator=optuna.importance.FanovaImportanceEvaluator(seed=0)
        )
        return {name: share for name, share in shares.items() if name in varied}


def distributions(study: Study) -> dict[str, BaseDistribution]:
    """Describe the space to Optuna; the seed is a parameter like others, but never drawn."""
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
    space[SEED] = CategoricalDistribution(study.seeds)
    return space


def build_sampler(name: str, *, seed: int) -> optuna.samplers.BaseSampler:
    """Build the sampler; for a grid every point is given, and any will do."""
    if name == "tpe":
        # trials side by side: those under way count as poor, so that the next goes elsewhere
        return optuna.samplers.TPESampler(seed=seed, constant_liar=True)
    return optuna.samplers.RandomSampler(seed=seed)


def build_pruner(stop: Stop | None) -> optuna.pruners.BasePruner:
    """Build the stop rule."""
    rules: dict[str, Callable[[Stop], optuna.pruners.BasePruner]] = {
        "asha": lambda s: optuna.pruners.SuccessiveHalvingPruner(
            min_resource=s.grace_epochs, reduction_factor=s.reduction
        ),
        "median": lambda s: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=s.grace_epochs),
    }
    return optuna.pruners.NopPruner() if stop is None else rules[stop.kind](stop)
