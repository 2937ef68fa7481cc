"""Which trial of a study comes next, and the record of how each ended."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

from mprd.storage.places import place_of
from mprd.tune.folder import StudyFolder
from mprd.tune.results import average_points, is_number, rank_points, trial_row
from mprd.tune.study import Objective, Point, Study, name_point
from mprd.tune.trial import State, Trial

if TYPE_CHECKING:
    from mprd.tune.optuna_backend import OptunaStudy

MAX_REDRAWS = 5
"""Draws of earlier points in a row."""
MAX_LISTED = 1000
"""Points among which one is chosen after these."""
MAX_ALIKE = 3
"""Trials in a row that fail for one reason before the study ends."""


@dataclass
class Pace:
    """How far a trial is in this session."""

    started: float
    first: int | None = None
    """Its first epoch in this session."""
    row: dict[str, Any] = field(default_factory=dict)
    """Of its last epoch."""
    at: float = 0.0
    """When that epoch ended, in monotonic seconds."""

    def add(self, row: dict[str, Any]) -> None:
        """Take the row of an epoch that ended."""
        self.first = row["epoch"] if self.first is None else self.first
        self.row, self.at = row, time.monotonic()

    @property
    def epoch_seconds(self) -> float:
        """Return the mean seconds of an epoch, the start included; 0 before the first one ended."""
        return 0.0 if self.first is None else (self.at - self.started) / (self.row["epoch"] - self.first + 1)


class TrialQueue:
    """Start the trials of a study in order, and record their results in its folder.

    Trials that were running when the study was killed come first and resume from their checkpoints, then those that
    failed, once, then new ones.
    """

    def __init__(
        self,
        folder: StudyFolder,
        study: Study,
        *,
        objective: Objective,
        num_trials: int,
        optuna: OptunaStudy | None,
        timeout: float | None = None,
    ) -> None:
        """Read the trials of earlier sessions.

        Args:
            num_trials: without those of `study.refit`.
            optuna: draws points and stops trials early; a plain grid works without it.
            timeout: seconds from now after which no trial starts.
        """
        self.folder = folder
        self.study = study
        self.objective: Objective = objective
        self.num_trials = num_trials if study.max_trials is None else min(num_trials, study.max_trials)
        self.optuna = optuna
        self.trials = folder.read_trials()
        self.to_retry = [trial for trial in self.trials if trial.state == "running"]
        self.to_retry += [trial for trial in self.trials if trial.state == "failed"]
        self.grid = study.grid()
        self.to_refit: list[tuple[Point, int]] = []
        self.paces: dict[int, Pace] = {}
        """Of the trials that ran in this session, by number."""
        self.reasons: list[str | None] = []
        """Of the trials that ended in this session; None for those that did not fail."""
        self.deadline = None if timeout is None else time.monotonic() + timeout

    @property
    def num_left(self) -> int:
        """Count the trials that are not started yet."""
        return len(self.to_retry) + max(0, self.num_trials - len(self.own_trials)) + len(self.to_refit)

    @property
    def own_trials(self) -> list[Trial]:
        """Return the trials without those of `study.refit`."""
        return [trial for trial in self.trials if trial.seed in self.study.seeds]

    @property
    def tried(self) -> set[tuple[str, int]]:
        """Return the key of the point and the seed of each trial."""
        return {(self.study.key(trial.point, trial.settings), trial.seed) for trial in self.trials}

    @property
    def is_late(self) -> bool:
        """Return whether the timeout has passed."""
        return self.deadline is not None and time.monotonic() > self.deadline

    @property
    def repeated_failure(self) -> str | None:
        """Return the reason for which the last `MAX_ALIKE` trials failed; None where they did not, or for several."""
        last = self.reasons[-MAX_ALIKE:]
        return last[0] if len(last) == MAX_ALIKE and len(set(last)) == 1 else None

    def __iter__(self) -> Iterator[Trial]:
        while (trial := self.next()) is not None:
            yield trial

    def next(self) -> Trial | None:
        """Start the next trial; return None when all are started, or none is to start any more."""
        trial: Trial | None = None
        if self.is_late or self.repeated_failure is not None:
            return None
        if self.to_retry:
            trial = self.retry(self.to_retry.pop(0))
        elif len(self.own_trials) < self.num_trials:
            trial = self.plan()
        elif self.to_refit:
            trial = self.plan_at(*self.to_refit.pop(0))
        if trial is not None:
            self.paces[trial.number] = Pace(time.monotonic())
            self.record(trial)
        return trial

    def retry(self, trial: Trial) -> Trial:
        """Start a trial again; in Optuna, one that failed is a new trial."""
        if self.optuna is not None and (trial.state == "failed" or trial.optuna_number is None):
            number, _ = self.optuna.ask(Point(name=trial.point, set=trial.settings), trial.seed)
            trial = dataclasses.replace(trial, optuna_number=number)
        return dataclasses.replace(trial, state="running", reason=None)

    def plan(self) -> Trial | None:
        """Choose a pair of point and seed that has not run yet; return None where there is none.

        A grid runs all points with the first seed before the next seed, so that a shortened study covers every point.
        A drawn point runs with all seeds in a row, so that its mean guides the sampler.
        """
        key, seeds, tried = self.study.key, self.study.seeds, self.tried
        if self.grid:
            pairs = ((point, seed) for seed in seeds for point in self.grid)
        else:
            drawn = [Point(name=trial.point, set=trial.settings) for trial in self.trials]
            pairs = ((point, seed) for point in drawn for seed in seeds)
        new = ((point, seed) for point, seed in pairs if (key(point.name, point.set), seed) not in tried)
        point, seed = next(new, (None, seeds[0]))
        if point is not None:
            return self.plan_at(point, seed)
        point, number = self.draw(seed)
        return None if point is None else self.make(point, seed, number)

    def plan_at(self, point: Point, seed: int) -> Trial:
        """Return a new trial, which Optuna knows too."""
        number = None if self.optuna is None else self.optuna.ask(point, seed)[0]
        return self.make(point, seed, number)

    def make(self, point: Point, seed: int, number: int | None) -> Trial:
        """Return a new trial with its number in Optuna."""
        return Trial(len(self.trials), point.name, dict(point.set), seed, optuna_number=number)

    def plan_refits(self) -> int:
        """Queue the best points with the seeds of `study.refit` that have not run; return the number of trials."""
        key, refit, own, tried = self.study.key, self.study.refit, self.own_trials, self.tried
        if refit is None or self.num_left > 0:
            return 0
        rows = [trial_row(self.folder, trial, self.study) for trial in own]
        points = average_points(self.study, own, rows, objective=self.objective)
        self.to_refit = [
            (Point(name=point.name, set=point.settings), seed)
            for point in rank_points(points, self.objective)[: refit.top]
            for seed in refit.seeds
            if (key(point.name, point.settings), seed) not in tried
        ]
        return len(self.to_refit)

    def draw(self, seed: int) -> tuple[Point | None, int | None]:
        """Draw a new point by the sampler; return it with its number in Optuna, or None where all have run.

        Draws of earlier points are closed as failed. After `MAX_REDRAWS` of them any new point is taken.
        """
        if self.optuna is None or self.grid:
            return None, None
        tried = {self.study.key(trial.point, trial.settings) for trial in self.trials}
        names = {trial.point for trial in self.trials}
        for _ in range(MAX_REDRAWS):
            number, settings = self.optuna.ask(None, seed)
            point = name_point(settings, taken=names)
            if self.study.key(point.name, settings) not in tried:
                return point, number
            self.optuna.tell(number, "failed", None, "repeats an earlier point")
        left = [*islice((p for p in self.study.all_points() if self.study.key(p.name, p.set) not in tried), MAX_LISTED)]
        if not left:
            return None, None
        point = random.Random(len(tried)).choice(left)
        number, _ = self.optuna.ask(point, seed)
        return point, number

    def record(self, trial: Trial) -> None:
        """Write a trial in place of its earlier state."""
        self.trials[trial.number : trial.number + 1] = [trial]
        self.folder.write_trials(self.trials)

    def report(self, trial: Trial, row: dict[str, Any]) -> bool:
        """Report the objective of an epoch to Optuna; return whether to stop the trial."""
        if trial.number in self.paces:
            self.paces[trial.number].add(row)
        value = row.get(self.objective)
        if self.optuna is None or trial.optuna_number is None or not is_number(value):
            return False
        return self.optuna.report(trial.optuna_number, row["epoch"], value)

    def finish(self, trial: Trial, state: State, reason: str | None = None) -> Trial:
        """Record how a trial ended; one that finished without the objective counts as failed."""
        value = self.last_row(trial).get(self.objective)
        if state == "finished" and not is_number(value):
            state, reason = "failed", f"the run ended without {self.objective}"
        trial = dataclasses.replace(trial, state=state, reason=reason)
        # the own folder of a trial makes no other reason
        place = place_of(self.folder.run_folder(trial).path)
        self.reasons.append((reason or state).replace(place, "") if state == "failed" else None)
        if self.optuna is not None and trial.optuna_number is not None:
            self.optuna.tell(trial.optuna_number, state, value, reason)
        self.record(trial)
        return trial

    def last_row(self, trial: Trial) -> dict[str, Any]:
        """Return the metrics of a trial's last epoch; empty before the first."""
        rows = self.folder.run_folder(trial).read_rows()
        return rows[-1] if rows else {}
