"""Train on the tiny data set, stop within an epoch, and compare states."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.data.cache import Packs
from mprd.data.datasets import ReidDataset, load_dataset
from mprd.engine.callbacks import Callbacks
from mprd.engine.trainer import Trainer, fit
from mprd.errors import Interrupted
from mprd.runtime import checkpoint
from tests.conftest import TINY

CPU = torch.device("cpu")
LIVE = ("neighbors.source=memory",)
"""Lists from the memory as it moves, as in the paper."""
WHITENING = ("neighbors.whitening=true", "pairs.labeller=reciprocal", "meta.num_ids=0", "pairs.limit=false")


def changed(config: Config, root: Path, *overrides: str) -> Config:
    return load_config("demo", overrides=(*TINY, *overrides), values={"data": {"root": root}})


def open_data(config: Config) -> ReidDataset:
    assert config.data.root is not None
    folder = config.data.root.parent / "packs"
    return dataclasses.replace(load_dataset(config.data), packs=Packs(folder, mode=config.data.cache))


def train(config: Config, dataset: ReidDataset | None = None, **around: Any) -> Trainer:
    trainer = Trainer(config, dataset or open_data(config), device=CPU, **around)
    trainer.fill_memory()
    fit(trainer)
    return trainer


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """List every leaf of a state."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, item in enumerate(value) for k, v in flatten(item, f"{name}.{key}").items()}
    return {name: value}


def assert_same_state(first: Trainer, second: Trainer) -> None:
    """Compare every tensor and number of two trainers bit by bit, wall times aside."""
    a, b = flatten(first.state_dict()), flatten(second.state_dict())
    assert a.keys() == b.keys()
    for name in a:
        if "seconds" in name:
            continue
        same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        assert same, f"{name} differs"


def stop_after(trainer_step: int, path: Path) -> Callbacks:
    """Save and stop after so many steps of all phases together."""
    seen = [0]

    def after_step(trainer: Trainer, _num_steps: int) -> None:
        seen[0] += 1
        if seen[0] == trainer_step:
            checkpoint.save(trainer.state_dict(), path)
            raise Interrupted("stop")

    return Callbacks(after_step=after_step)
