"""What some settings need of a data set, checked before anything is computed."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from mprd.backbone.features import ordered_batches
from mprd.config.schema import Config
from mprd.data.datasets import ReidDataset
from mprd.engine.camera_groups import CameraGroups
from mprd.errors import UserError
from mprd.runtime.distributed import WorkerGroup

logger = logging.getLogger("mprd")


def check_requirements(config: Config, dataset: ReidDataset, groups: CameraGroups, workers: WorkerGroup) -> None:
    """Raise UserError for data too small for its settings, or without the identities they need.

    Absent CamStyle files and cameras too small for statistics of their own are logged.
    """
    train, root = dataset.train, dataset.root
    if config.pairs.labeller == "supervised" and train.pids is None:
        raise UserError(f"pairs.labeller: supervised needs identities, and {root} has none")
    if len(train) <= config.neighbors.k:
        raise UserError(
            f"{root}: neighbors.k = {config.neighbors.k} needs more training images than that, but there are "
            f"{len(train)}"
        )
    if config.data.camera_style == "camstyle" and dataset.style_paths is None and workers.is_first:
        logger.warning("data.camera_style: no CamStyle files, so no style is transferred (MPRD#)")
    if groups.small and workers.is_first:
        logger.warning(
            "fewer than train.batch_size = %d training images, so batch norms take the statistics of all: cameras %s",
            groups.least,
            ", ".join(dataset.camera_names[camera] for camera in groups.small),
        )
    everyone = torch.arange(len(train))
    estimated = [everyone] if config.backbone.weights == "none" else []
    if config.backbone.camera_bn:
        estimated = groups.samples(everyone)
    for name, many, size in (
        ("train.batch_size", groups.batched(), config.train.batch_size),
        ("eval.batch_size", estimated, config.eval.batch_size),
    ):
        batches = [batch for ids in many for batch in ordered_batches(ids, size, is_normalized=True)]
        check_batches(name, batches, workers)


def check_batches(name: str, batches: Sequence[list[int]], workers: WorkerGroup) -> None:
    """Raise UserError, naming a setting, where a batch that batch norms learn from leaves a worker without an image."""
    smallest = min(map(len, batches), default=workers.size)
    if smallest < workers.size:
        raise UserError(f"{name}: a batch of {smallest} is too small for {workers.size} workers")
