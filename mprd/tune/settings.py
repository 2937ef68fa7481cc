"""The settings shared by all trials of a study, from preset, study file and command line."""

from __future__ import annotations

from typing import Any

from mprd.config.loading import absolute, build_config, merge, parse_override, read_preset
from mprd.config.schema import Config
from mprd.train.cli import read_settings as read_train_settings
from mprd.tune.study import Study, nest
from mprd.tune.trial import Trial, trial_config

SMOKE_TRIALS = 4
"""Trials of a drawn study under --smoke."""
SMOKE = {
    "backbone": {"name": "small", "weights": "none", "num_stripes": 1},
    "data": {"height": 32, "width": 16, "num_workers": 0},
    "train": {"epochs": 2, "warmup_epochs": 0, "threads": 1},
    "neighbors": {"k": 4},
}
SMOKE_SYNTHETIC = {"num_train_ids": 24, "num_test_ids": 12, "num_cameras": 3, "images_per_camera": 2}


def smoke_study(study: Study) -> Study:
    """Shorten a study to one seed, and to a few trials where points are drawn."""
    return study.model_copy(update={"seeds": study.seeds[:1], "trials": SMOKE_TRIALS if study.trials else None})


def read_settings(study: Study, settings: dict[str, Any], *, smoke: bool) -> Config:
    """Merge preset, study, smoke sizes, overrides and data folder, later ones winning.

    Args:
        settings: `preset`, `set_` and `data` of the command line.
    """
    # validates --data against the preset, and every override
    given = read_train_settings({**settings, "config": None, "seed": None})
    values = read_preset(settings["preset"] or "demo")
    merge(values, nest(dict(study.set)))
    if smoke:
        merge(values, SMOKE)
        if given.data.dataset == "synthetic":
            merge(values, {"data": {"synthetic": SMOKE_SYNTHETIC}})
    for override in settings["set_"] or ():
        merge(values, parse_override(override))
    if given.data.root is not None:
        merge(values, {"data": {"root": str(given.data.root)}})
    # trials run in other working directories
    return absolute(build_config(values))


def check_points(study: Study, config: Config) -> None:
    """Raise UserError where a point of the grid is not a valid run."""
    for point in study.grid():
        trial_config(config, Trial(0, point.name, dict(point.set), study.seeds[0]))
