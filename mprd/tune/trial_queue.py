"""Which trial of a study comes next, and the record of how each ended."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mprd.tune.folder import StudyFolder
from mprd.tune.study import Objective, Point, Study, name_point
from mprd.tune.trial import State, Trial

if TYPE_CHECKING:
    from mprd.tune.optuna_backend import OptunaStudy


class TrialQueue:
    """Start the trials of a study in order, and record their results in its folder.

    Trials that were running when the study was killed come first and resume from their checkpoints, then those that
    failed, once, then new ones.
    """

    def __init__(
        self, folder: StudyFolder, study: Study, *, objective: Objective, num_trials: int, optuna: OptunaStudy | None
    ) -> None:
        """Read the trials of earlier sessions.

        Args:
            optuna: draws points and stops trials early; a plain grid works without it.
        """
        self.folder = folder
        self.study = study
        self.objective: Objective = objective
        self.num_trials = num_trials
        self.optuna = optuna
        self.trials = folder.read_trials()
        self.to_retry = [trial for trial in self.trials if trial.state == "running"]
        self.to_retry += [trial for trial in self.trials if trial.state == "failed"]
        self.grid = study.grid()

    @property
    def num_left(self) -> int:
        """Count the trials that are not started yet."""
        return len(self.to_retry) + max(0, self.num_trials - len(self.trials))

    def __iter__(self) -> Iterator[Trial]:
        while (trial := self.next()) is not None:
            yield trial

    def next(self) -> Trial | None:
        """Start the next trial; return None when all are started."""
        if self.to_retry:
            trial = self.retry(self.to_retry.pop(0))
        elif len(self.trials) < self.num_trials:
            trial = self.plan(len(self.trials))
        else:
            return None
        self.record(trial)
        return trial

    def retry(self, trial: Trial) -> Trial:
        """Start a trial again; in Optuna, one that failed is a new trial."""
        if self.optuna is not None and (trial.state == "failed" or trial.optuna_number is None):
            number, _ = self.optuna.ask(Point(name=trial.point, set=trial.settings), trial.seed)
            trial = dataclasses.replace(trial, optuna_number=number)
        return dataclasses.replace(trial, state="running", reason=None)

    def plan(self, number: int) -> Trial:
        """Choose point and seed of a new trial.

        A grid runs all points with the first seed before the next seed, so that a shortened study covers every point.
        A drawn point runs with all seeds in a row, so that its mean guides the sampler.
        """
        seeds, point = self.study.seeds, None
        if self.grid:
            point, seed = self.grid[number % len(self.grid)], seeds[number // len(self.grid) % len(seeds)]
        else:
            seed = seeds[number % len(seeds)]
            if number % len(seeds):
                first = self.trials[number - number % len(seeds)]
                point = Point(name=first.point, set=first.settings)
        optuna_number = None
        if self.optuna is not None:
            optuna_number, settings = self.optuna.ask(point, seed)
            point = point or name_point(settings)
        assert point is not None
        return Trial(number, point.name, dict(point.set), seed, optuna_number=optuna_number)

    def record(self, trial: Trial) -> None:
        """Write a trial in place of its earlier state."""
        self.trials[trial.number : trial.number + 1] = [trial]
        self.folder.write_trials(self.trials)

    def report(self, trial: Trial, row: dict[str, Any]) -> bool:
        """Report the objective of an epoch to Optuna; return whether to stop the trial."""
        value = row.get(self.objective)
        if self.optuna is None or trial.optuna_number is None or value is None:
            return False
        return self.optuna.report(trial.optuna_number, row["epoch"], value)

    def finish(self, trial: Trial, state: State, reason: str | None = None) -> Trial:
        """Record how a trial ended; one that finished without the objective counts as failed."""
        value = self.last_row(trial).get(self.objective)
        if state == "finished" and value is None:
            state, reason = "failed", f"the run ended without {self.objective}"
        trial = dataclasses.replace(trial, state=state, reason=reason)
        if self.optuna is not None and trial.optuna_number is not None:
            self.optuna.tell(trial.optuna_number, state, value, reason)
        self.record(trial)
        return trial

    def last_row(self, trial: Trial) -> dict[str, Any]:
        """Return the metrics of a trial's last epoch; empty before the first."""
        rows = self.folder.run_folder(trial).read_rows()
        return rows[-1] if rows else {}
