"""What some settings need of a data set, checked before anything is computed."""

from __future__ import annotations

from mprd.config.schema import Config
from mprd.data.datasets import ReidDataset
from mprd.engine.camera_groups import CameraGroups
from mprd.errors import UserError
from mprd.runtime.distributed import WorkerGroup


def check_requirements(config: Config, dataset: ReidDataset, groups: CameraGroups, workers: WorkerGroup) -> None:
    """Raise UserError for data too small for its settings, or without the cameras or identities they need."""
    train, root = dataset.train, dataset.root
    if train.camids is None and config.needs_cameras is not None:
        raise UserError(
            f"{config.needs_cameras} needs cameras, and {root} has none; "
            "neighbors.metric=cosine with neighbors.standardise=false does without"
        )
    if config.pairs.labeller == "supervised" and train.pids is None:
        raise UserError(f"pairs.labeller: supervised needs identities, and {root} has none")
    if len(train) <= config.neighbors.k:
        raise UserError(
            f"{root}: neighbors.k = {config.neighbors.k} needs more training images than that, but there are "
            f"{len(train)}"
        )
    counts = [len(ids) for ids in groups.batched()]
    for name, size in (("train", config.train.batch_size), ("eval", config.eval.batch_size)):
        smallest = min(count // -(-count // size) for count in counts)
        if smallest < workers.size:
            raise UserError(f"{name}.batch_size: a batch of {smallest} is too small for {workers.size} workers")
