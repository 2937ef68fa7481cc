"""NN_k of all images when one exact pass is too slow: through faiss' inverted file."""

# N images, D feature size, W results of a row
from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mprd.errors import UserError
from mprd.neighbors.exact import NeighborTable, check_counts, check_features, cut_lists, find_neighbors

logger = logging.getLogger("mprd")

SAMPLE_ROWS = 256
"""Rows that are also searched exactly, to measure recall."""
IMAGES_PER_CELL = 39
"""Training images per cell of the inverted file; faiss warns below this number."""
CELLS_PER_PROBE = 16
"""Cells of the inverted file per cell that a row is compared with."""


@torch.no_grad()
def find_by_index(features: Tensor, *, k: int, similarity: float, k_max: int = 64) -> NeighborTable:
    """List the neighbors of all images approximately, and log the recall on a sample.

    Takes the arguments of `find_neighbors`. Where the index finds fewer than k images, the list is shorter. Raises
    UserError without faiss.
    """
    check_features(features, "features")
    num_others = len(features) - 1
    check_counts(num_others, k, k_max)
    # one image beyond the cap shows which rows the cap cuts
    width = min(k_max + 1, num_others)
    rows = features.float().numpy(force=True)
    # where the searched cells hold too few images faiss returns id -1 and the least number
    found = build_index(rows).search(rows, width + 1)
    values, ids = without_self(*(torch.from_numpy(part).to(features.device) for part in found))
    table = cut_lists(ids, (values > similarity).sum(1), k=k, k_max=k_max)
    recall = measure_recall(table, features, k=k, similarity=similarity, k_max=k_max)
    logger.info("neighbors.search = ivf: recall %.3f against exact lists of a sample", recall)
    return table


def import_faiss() -> Any:
    """Import faiss; raise UserError if it is not installed."""
    logging.getLogger("faiss").setLevel(logging.WARNING)
    try:
        import faiss
    except ModuleNotFoundError:
        raise UserError(
            "an index needs faiss (pip install faiss-cpu); neighbors.search=exact and search --index exact do without"
        ) from None
    return faiss


def build_index(rows: np.ndarray) -> Any:
    """Build an inverted file over rows `[n, D]`."""
    faiss = import_faiss()
    num_images, num_features = rows.shape
    num_cells = max(1, min(int(4 * num_images**0.5), num_images // IMAGES_PER_CELL))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(num_features), num_features, num_cells, faiss.METRIC_INNER_PRODUCT)
    index.train(rows)
    index.nprobe = -(-num_cells // CELLS_PER_PROBE)
    index.add(rows)
    return index


def without_self(values: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Remove each row's own image from its cosines and ids [N, W + 1], wherever it is; keep W."""
    is_self = ids == torch.arange(len(ids), device=ids.device)[:, None]
    # a stable sort moves the own image to the end and keeps the order of the others
    order = is_self.byte().argsort(dim=1, stable=True)[:, :-1]
    return values.gather(1, order), ids.gather(1, order)


def measure_recall(table: NeighborTable, features: Tensor, **rule: Any) -> float:
    """Return the share of exact neighbors, under the arguments `rule`, that the table lists, on evenly spread rows."""
    num_rows = min(SAMPLE_ROWS, len(features))
    rows = torch.arange(num_rows, device=features.device) * len(features) // num_rows
    exact = find_neighbors(features, rows=rows, **rule).ids
    is_found = (exact[:, :, None] == table.ids[rows][:, None, :]).any(2) & (exact >= 0)
    return float(is_found.sum() / (exact >= 0).sum())
