"""The settings shared by all trials of a study, from preset, study file and command line."""

from __future__ import annotations

from typing import Any

from mprd.config.loading import absolute
from mprd.config.nested import nest
from mprd.config.schema import Config
from mprd.train import recipe
from mprd.tune.study import Study
from mprd.tune.trial import Trial, trial_config

SMOKE_TRIALS = 4
"""Trials of a drawn study under --smoke."""


def smoke_study(study: Study) -> Study:
    """Shorten a study to one seed, and to a few trials where points are drawn."""
    return study.model_copy(
        update={"seeds": study.seeds[:1], "trials": SMOKE_TRIALS if study.trials else None, "refit": None}
    )


def read_settings(study: Study, settings: dict[str, Any], *, smoke: bool) -> Config:
    """Merge preset, study, smoke sizes, overrides and data folder, later ones winning, and fit them to the data.

    Args:
        settings: `preset`, `set_` and `data` of the command line.
    """
    given = {**settings, "smoke": smoke}
    # trials run in other working directories
    return absolute(recipe.read_settings(given, shared=nest(dict(study.set)), varied=study.varied))


def check_points(study: Study, config: Config) -> None:
    """Raise UserError where a point of the grid is not a valid run."""
    for point in study.grid():
        trial_config(config, Trial(0, point.name, dict(point.set), study.seeds[0]))
