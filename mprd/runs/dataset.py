"""Open the data set of a run; unreadable images are left out where the settings say so. Imports no torch."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from mprd.config.schema import Config
from mprd.data.cache import Packs
from mprd.data.camera_style import check_style_files
from mprd.data.datasets import ImageSet, ReidDataset, load_dataset
from mprd.data.decode import find_unreadable
from mprd.errors import UserError
from mprd.storage.cache import cache_folder

logger = logging.getLogger("mprd")


def open_dataset(config: Config, *, needs_train: bool = True) -> ReidDataset:
    """Load the data set with its cache of decoded images.

    Args:
        needs_train: whether a set of query and gallery alone is refused.

    With `data.on_bad_image=skip`, unreadable images are left out.
    """
    dataset = load_dataset(config.data, needs_train=needs_train)
    dataset = replace(dataset, packs=Packs(cache_folder(), mode=config.data.cache))
    return check_dataset(dataset) if config.data.on_bad_image == "skip" else dataset


def check_dataset(dataset: ReidDataset) -> ReidDataset:
    """Decode every image of a data set, CamStyle's included, and leave out the unreadable ones."""
    train, query, gallery = (check_images(images) for images in (dataset.train, dataset.query, dataset.gallery))
    style = dataset.style_paths
    if style is not None and train.camids is not None:
        style = check_style_files(style, train.paths, train.camids)
    return replace(dataset, train=train, query=query, gallery=gallery, style_paths=style)


def check_images(images: ImageSet) -> ImageSet:
    """Decode every image and return the readable ones; log how many are left out (`data.on_bad_image: skip`).

    Called before training, so that an index is the same image in every epoch. Raises UserError when none is left.
    """
    bad = find_unreadable(images.paths)
    if not bad:
        return images
    if len(bad) == len(images):
        raise UserError(f"{images.paths[0]}: cannot read this image, nor any other of the {len(images)} in its set")
    first = images.paths[bad[0]]
    logger.warning("left out %d of %d images that cannot be read, the first is %s", len(bad), len(images), first)
    return images.select(np.setdiff1d(np.arange(len(images)), bad))
