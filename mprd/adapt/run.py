"""Give the network of a run the statistics of other cameras, from images without labels.

Batch norms by camera take theirs from a few images of each (Zhuang et al., ECCV 2020); weights and whitening stay. Not
in the paper.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from mprd.backbone.features import recalibrate
from mprd.config.schema import Config
from mprd.data.datasets import ImageSet
from mprd.data.images import PlainImages
from mprd.data.recognition import elsewhere, locate
from mprd.engine.camera_groups import CameraGroups
from mprd.errors import UserError
from mprd.model import Model, load_model
from mprd.runs.console import ImageLine
from mprd.runs.dataset import open_dataset
from mprd.runs.folder import RunFolder
from mprd.runtime.device import set_threads
from mprd.runtime.seeding import RngStream, generator
from mprd.text import new_console

logger = logging.getLogger("mprd")

LEAST_IMAGES = 2
"""Images that a camera needs for statistics of its own: one has no variance."""


def adapt_run(
    run: RunFolder,
    data: Path,
    out: RunFolder,
    *,
    best: bool = False,
    name_pattern: str | None = None,
    device: str = "auto",
    console: Console | None = None,
) -> str:
    """Write a run folder with the network of `run` for the cameras of `data`; return its cameras in words.

    The statistics are those of the training images of `data`, or of its gallery where there are none. `data` is the
    data set of `out`.

    Args:
        name_pattern: the `data.name_pattern` of `data`, in place of the run's or the recognized one.

    Raises UserError where `run` has no statistics of cameras, names show no cameras, or `out` holds a run.
    """
    config = run.read_config()
    if not config.backbone.camera_bn:
        raise UserError(f"{run.path}: has no statistics of cameras, which backbone.camera_bn=true gives in training")
    set_threads(config.train.threads)
    # located, as commands read the names of images by the layout
    located = locate(elsewhere(config.data, data, name_pattern=name_pattern))
    config = config.model_copy(update={"data": located})
    out.check_is_free(config, goes_on=False)
    dataset = open_dataset(config, needs_train=False)
    images = dataset.train if len(dataset.train) else dataset.gallery
    if len(images) < LEAST_IMAGES:
        raise UserError(f"{data}: statistics need at least {LEAST_IMAGES} images, but there are {len(images)}")
    if images.camids is None:
        raise UserError(f"{data}: no cameras in the names of its images; --name-pattern says where they are")
    model = load_model(run.path, best=best, device=device)
    adapt(model, images, config, console=console or new_console(quiet=True))
    out.create(config)
    out.save(checkpoint_of(model) | dataset.cameras_of(images))
    used = ", ".join(dataset.camera_names[camera] for camera in np.unique(images.camids))
    return f"{out.path}: {run.path.resolve().name} for the cameras {used}"


def adapt(model: Model, images: ImageSet, config: Config, *, console: Console) -> None:
    """Give the batch norms of a model, in place, statistics of the images' cameras."""
    assert images.camids is not None
    camids = torch.as_tensor(images.camids)
    order = torch.randperm(len(images), generator=generator(config.train.seed, RngStream.ORDER))
    groups = CameraGroups.of(camids, len(images), least=LEAST_IMAGES)
    if groups.small:
        logger.warning("%d cameras have one image each and take the statistics of all", len(groups.small))
    samples = groups.samples(order)
    used = torch.cat(samples).unique()
    logger.info("statistics of %d cameras from %d of %d images", len(samples) - 1, len(used), len(images))
    shown = PlainImages(images.select(used.numpy()).paths, config.data, hint="move such files away")
    rows = [torch.searchsorted(used, ids) for ids in samples]
    with ImageLine(console, sum(map(len, rows))) as line:
        recalibrate(
            model.backbone,
            shown,
            rows,
            batch_size=config.eval.batch_size,
            num_workers=config.data.num_workers,
            device=model.device,
            on_images=partial(line.advance, is_earlier=False),
        )


def checkpoint_of(model: Model) -> dict[str, object]:
    """Return what `load_model` reads of a checkpoint, but for the cameras."""
    similarity = None if model.similarity is None else model.similarity.state_dict()
    return {"backbone": model.backbone.state_dict(), "similarity": similarity}
