"""A trial: one point of a study with one seed."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from mprd.config.loading import build_config
from mprd.config.nested import layered, nest
from mprd.config.schema import Config
from mprd.tune.study import SEED, Settings

State = Literal["running", "finished", "stopped", "failed"]


@dataclass(frozen=True)
class Trial:
    """A training run of a study."""

    number: int
    point: str
    """Name of the point."""
    settings: Settings
    seed: int
    state: State = "running"
    reason: str | None = None
    """Why the trial failed, or was stopped."""
    optuna_number: int | None = None
    """Its number in the Optuna study."""

    @property
    def folder_name(self) -> str:
        label = re.sub(r"[^A-Za-z0-9.=+()#-]+", "_", self.point)
        return f"{self.number:03d}_{label}_seed{self.seed}"


def trial_config(config: Config, trial: Trial) -> Config:
    """Override the shared settings by those of a trial; raise UserError where they are invalid."""
    return build_config(layered(config.model_dump(mode="json"), nest({**trial.settings, SEED: trial.seed})))
