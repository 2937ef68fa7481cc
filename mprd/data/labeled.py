"""Z, the labeled images (Sec. 4.2): drawn from the identities in file names or in the file `meta.labels`."""

from __future__ import annotations

import csv
import io
import os
from pathlib import Path

import numpy as np

from mprd.config.schema import MetaConfig
from mprd.data.datasets import ImageSet
from mprd.errors import UserError
from mprd.text import read_text

HEADER = ["file", "identity"]


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
    header, *lines = read_lines(file) or [(1, [])]
    if header[1] != HEADER:
        raise UserError(f"meta.labels: {file}: wanted the header file,identity, but got {','.join(header[1])!r}")
    found: dict[int, str] = {}
    for number, cells in lines:
        if cells:
            place = f"meta.labels: {file}, line {number}"
            row, identity = read_cells(cells, numbers, root, place=place)
            if found.setdefault(row, identity) != identity:
                raise UserError(f"{place}: {cells[0]} has two identities")
    rows = np.array(sorted(found), dtype=np.int64)
    names, pids = np.unique([found[row] for row in rows.tolist()], return_inverse=True)
    if len(names) == len(rows):
        raise UserError(f"meta.labels: {file}: no identity has two images, so there is no pair of one person to learn")
    return rows, pids.astype(np.int64)


def read_lines(file: Path) -> list[tuple[int, list[str]]]:
    """Return line number and cells of each line of a CSV."""
    try:
        table = csv.reader(io.StringIO(read_text(file)))
        return [(table.line_num, cells) for cells in table]
    except UserError as error:
        raise UserError(f"meta.labels: {error}") from None
    except OSError as error:
        raise UserError(f"meta.labels: cannot read {file}: {error.strerror}") from None
    except csv.Error as error:
        raise UserError(f"meta.labels: {file} is no CSV: {error}") from None


def read_cells(cells: list[str], numbers: dict[str, int], root: Path, *, place: str) -> tuple[int, str]:
    """Return a line's image, as a row of the training set, and its identity."""
    if len(cells) != len(HEADER) or not cells[1].strip():
        raise UserError(f"{place}: wanted a file and an identity, but got {','.join(cells)!r}")
    name = os.path.relpath(root / cells[0].strip(), root)
    if name not in numbers:
        raise UserError(f"{place}: {name} is no training image; paths are absolute or start below data.root")
    return numbers[name], cells[1].strip()
