"""The folder a study leaves behind, and the ledger that says which trial is next.

study.yaml, config.yaml, study.json   what is asked
trials.json                           every trial with its state, and the reason where it failed
trials/NAME/                          an ordinary run folder for each
study.db                              the same for optuna-dashboard
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import yaml

from mprd.config.loading import build_config, merge, read_yaml
from mprd.config.schema import Config
from mprd.errors import UserError
from mprd.runs.folder import RunFolder, write_text
from mprd.tune.study import SEED, Objective, Point, Settings, Study, build_study, name_point, nest, write_study

State = Literal["running", "finished", "stopped", "failed"]
ENDED = ("finished", "stopped")


@dataclass(frozen=True)
class Trial:
    """One run of a study: a point with a seed."""

    number: int
    point: str
    """The point's name."""
    settings: Settings
    seed: int
    state: State = "running"
    reason: str | None = None
    """Why it failed, or was stopped."""
    mirror: int | None = None
    """Its number in the Optuna study."""

    @property
    def name(self) -> str:
        """Name its run folder."""
        label = re.sub(r"[^A-Za-z0-9.=+()#-]+", "_", self.point)
        return f"{self.number:03d}_{label}_seed{self.seed}"


class Mirror(Protocol):
    """What the ledger asks of an Optuna study."""

    def ask(self, point: Point | None, seed: int) -> tuple[int, Settings]: ...

    def report(self, number: int, epoch: int, value: float) -> bool: ...

    def tell(self, number: int, state: State, value: float | None, reason: str | None) -> None: ...

    def importance(self) -> dict[str, float]: ...


class StudyFolder:
    """Paths of a study, and how each file is read and written."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study_file = path / "study.yaml"
        self.config_file = path / "config.yaml"
        self.options_file = path / "study.json"
        self.trials_file = path / "trials.json"
        self.database = path / "study.db"

    def create(self, study: Study, config: Config, *, objective: Objective, num_trials: int) -> None:
        """Make the folder; raise UserError where one is already there."""
        if self.study_file.exists():
            raise UserError(f"{self.path}: holds a study already; go on with --resume, or change --out")
        try:
            (self.path / "trials").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"{self.path}: cannot write the study folder: {error.strerror}") from None
        write_text(self.config_file, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
        self.write_options(objective=objective, num_trials=num_trials)
        # last, for it says that the others are there
        write_text(self.study_file, write_study(study))

    def write_options(self, *, objective: Objective, num_trials: int) -> None:
        """Keep what the command line said."""
        write_text(self.options_file, json.dumps({"objective": objective, "num_trials": num_trials}) + "\n")

    def check_is_there(self) -> None:
        """Raise UserError where there is no study."""
        if not self.study_file.is_file():
            raise UserError(f"{self.path}: holds no study to go on with, it has no {self.study_file.name}")

    def read_options(self) -> dict[str, Any]:
        """Read what the command line said."""
        return json.loads(self.options_file.read_text())

    def read_study(self) -> Study:
        """Read the study as it was when the folder was made."""
        return build_study(read_yaml(self.study_file), source=str(self.study_file))

    def read_config(self) -> Config:
        """Read the settings that all trials share."""
        return build_config(read_yaml(self.config_file))

    def read_trials(self) -> list[Trial]:
        """Read all trials that were ever started, by number."""
        if not self.trials_file.is_file():
            return []
        return [Trial(**values) for values in json.loads(self.trials_file.read_text())]

    def write_trials(self, trials: list[Trial]) -> None:
        """Write all trials at once, so that a kill leaves the old or the new list."""
        write_text(self.trials_file, json.dumps([asdict(trial) for trial in trials], indent=1) + "\n")

    def run_folder(self, trial: Trial) -> RunFolder:
        """Return the run folder of a trial, absolute: Ray's workers stand elsewhere."""
        return RunFolder((self.path / "trials" / trial.name).resolve())


def trial_config(config: Config, trial: Trial) -> Config:
    """Lay a trial's settings and seed over the shared ones; raise UserError where they do not fit."""
    values = config.model_dump(mode="json")
    merge(values, nest({**trial.settings, SEED: trial.seed}))
    return build_config(values)


class Ledger:
    """Hand out the trials of a study, and write down how each ended.

    A trial that was under way when the study was killed comes first and goes on from its checkpoint; then those
    that failed, once; then new ones.
    """

    def __init__(
        self, folder: StudyFolder, study: Study, *, objective: Objective, num_trials: int, mirror: Mirror | None
    ) -> None:
        """Read what was done before.

        Args:
            mirror: the Optuna study, which draws points and stops trials; a plain grid does without.
        """
        self.folder = folder
        self.study = study
        self.objective: Objective = objective
        self.num_trials = num_trials
        self.mirror = mirror
        self.trials = folder.read_trials()
        self.again = [trial for trial in self.trials if trial.state == "running"]
        self.again += [trial for trial in self.trials if trial.state == "failed"]
        self.grid = study.grid()

    @property
    def num_left(self) -> int:
        """Count the trials that are still to be handed out."""
        return len(self.again) + max(0, self.num_trials - len(self.trials))

    def __iter__(self) -> Iterator[Trial]:
        while (trial := self.next()) is not None:
            yield trial

    def next(self) -> Trial | None:
        """Start the next trial; None when all are handed out."""
        if self.again:
            return self.start(self.take_up(self.again.pop(0)))
        if len(self.trials) >= self.num_trials:
            return None
        return self.start(self.plan(len(self.trials)))

    def take_up(self, trial: Trial) -> Trial:
        """Start a trial once more; one that had failed is a new one to Optuna."""
        if self.mirror is not None and (trial.state == "failed" or trial.mirror is None):
            number, _ = self.mirror.ask(Point(name=trial.point, set=trial.settings), trial.seed)
            trial = dataclasses.replace(trial, mirror=number)
        return dataclasses.replace(trial, state="running", reason=None)

    def plan(self, number: int) -> Trial:
        """Choose the point and the seed of a new trial.

        A grid goes through all points with the first seed before it turns to the next: cut short, it still covers
        every point. A drawn point is run with all of its seeds at once, so that its mean guides the sampler.
        """
        seeds, point = self.study.seeds, None
        if self.grid:
            point, seed = self.grid[number % len(self.grid)], seeds[number // len(self.grid) % len(seeds)]
        else:
            seed = seeds[number % len(seeds)]
            if number % len(seeds):
                first = self.trials[number - number % len(seeds)]
                point = Point(name=first.point, set=first.settings)
        mirror = None
        if self.mirror is not None:
            mirror, settings = self.mirror.ask(point, seed)
            point = point or name_point(settings)
        assert point is not None
        return Trial(number, point.name, dict(point.set), seed, mirror=mirror)

    def start(self, trial: Trial) -> Trial:
        """Write down that a trial is under way."""
        self.put(trial)
        return trial

    def put(self, trial: Trial) -> None:
        """Write a trial in its place."""
        self.trials[trial.number : trial.number + 1] = [trial]
        self.folder.write_trials(self.trials)

    def report(self, trial: Trial, row: dict[str, Any]) -> bool:
        """Pass on an epoch's objective; say whether to stop the trial."""
        value = row.get(self.objective)
        if self.mirror is None or trial.mirror is None or value is None:
            return False
        return self.mirror.report(trial.mirror, row["epoch"], value)

    def finish(self, trial: Trial, state: State, reason: str | None = None) -> Trial:
        """Write down how a trial ended."""
        value = self.last_row(trial).get(self.objective)
        if state == "finished" and value is None:
            state, reason = "failed", f"the run ended without {self.objective}"
        trial = dataclasses.replace(trial, state=state, reason=reason)
        if self.mirror is not None and trial.mirror is not None:
            self.mirror.tell(trial.mirror, state, value, reason)
        self.put(trial)
        return trial

    def last_row(self, trial: Trial) -> dict[str, Any]:
        """Return the figures of a trial's last epoch; empty before the first."""
        rows = self.folder.run_folder(trial).read_rows()
        return rows[-1] if rows else {}
