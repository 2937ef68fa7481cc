"""Z, the labeled images (Sec. 4.2): drawn from the identities in file names or in the file `meta.labels`."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from mprd.config.schema import MetaConfig
from mprd.data.datasets import ImageSet
from mprd.data.listing import read_rows
from mprd.errors import UserError

HEADER = ("file", "identity")


def choose_labeled(train: ImageSet, root: Path, config: MetaConfig, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw `meta.num_ids` identities; return the rows of their images, sorted int64 `[m]`, and the identities `[m]`.

    They are drawn from `meta.labels` where it is given, otherwise from the identities in file names.
    Raises UserError when there are fewer identities or none, or when the file cannot be read.
    """
    if config.num_ids == 0:
        return np.empty(0, dtype=np.int64), np.empty(0, dtype=np.int64)
    if config.labels is not None:
        rows, pids = read_labels(config.labels, train, root)
        of = f"identities of {config.labels}"
    elif train.pids is not None:
        rows, pids = np.arange(len(train)), train.pids
        of = "training identities"
    else:
        raise UserError(
            f"meta.num_ids must be 0 without identities in the file names or in meta.labels, but got {config.num_ids}"
        )
    known = np.unique(pids)
    if len(known) < config.num_ids:
        raise UserError(f"meta.num_ids must be at most {len(known)}, the {of}, but got {config.num_ids}")
    chosen = np.isin(pids, np.random.default_rng(seed).choice(known, config.num_ids, replace=False))
    return rows[chosen].astype(np.int64), pids[chosen].astype(np.int64)


def read_labels(file: Path, train: ImageSet, root: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read the identities of training images from a CSV with the header `file,identity`; paths are absolute or start
    at `root`.

    Returns rows of `train`, sorted int64 `[m]`, and identities counted from 0 in sorted order `[m]`.
    Raises UserError naming the file and the faulty line.
    """
    numbers = {os.path.relpath(path, root): row for row, path in enumerate(train.paths)}
    try:
        lines = read_rows(file, required=HEADER, allowed=HEADER)
    except UserError as error:
        raise UserError(f"meta.labels: {error}") from None
    found: dict[int, str] = {}
    for number, cells in lines:
        place = f"meta.labels: {file}, line {number}"
        name, identity = os.path.relpath(root / cells["file"], root), cells["identity"]
        if name not in numbers:
            raise UserError(f"{place}: {name} is no training image; paths are absolute or start below data.root")
        if not identity:
            raise UserError(f"{place}: {name} has no identity")
        if found.setdefault(numbers[name], identity) != identity:
            raise UserError(f"{place}: {name} has two identities")
    rows = np.array(sorted(found), dtype=np.int64)
    names, pids = np.unique([found[row] for row in rows.tolist()], return_inverse=True)
    if len(names) == len(rows):
        raise UserError(f"meta.labels: {file}: no identity has two images, so there is no pair of one person to learn")
    return rows, pids.astype(np.int64)
