"""Open the data set of a run."""

from __future__ import annotations

from dataclasses import replace

from mprd.config.schema import Config
from mprd.data.cache import Packs
from mprd.data.datasets import ReidDataset, load_dataset
from mprd.data.images import check_dataset
from mprd.runs.folder import RunFolder


def open_dataset(config: Config, folder: RunFolder) -> ReidDataset:
    """Load the data set with its cache of decoded images, which lies beside the run folder.

    With `data.on_bad_image=skip`, unreadable images are left out.
    """
    cache_dir = folder.path.parent / "data"
    dataset = load_dataset(config.data, cache_dir=cache_dir)
    dataset = replace(dataset, packs=Packs(cache_dir, mode=config.data.cache))
    return check_dataset(dataset) if config.data.on_bad_image == "skip" else dataset
