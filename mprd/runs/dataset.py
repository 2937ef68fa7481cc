"""Open the data set of a run."""

from __future__ import annotations

from dataclasses import replace

from mprd.config.schema import Config
from mprd.data.cache import Packs
from mprd.data.datasets import ReidDataset, load_dataset
from mprd.data.readable import check_dataset
from mprd.storage.cache import cache_folder


def open_dataset(config: Config, *, needs_train: bool = True) -> ReidDataset:
    """Load the data set with its cache of decoded images.

    Args:
        needs_train: whether a set of query and gallery alone is refused.

    With `data.on_bad_image=skip`, unreadable images are left out.
    """
    dataset = load_dataset(config.data, needs_train=needs_train)
    dataset = replace(dataset, packs=Packs(cache_folder(), mode=config.data.cache))
    return check_dataset(dataset) if config.data.on_bad_image == "skip" else dataset
