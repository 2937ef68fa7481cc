"""NN_k: the exact nearest images of each image, computed in blocks of rows, never as an N x N matrix (Sec. 3.2, 5.2).

`torch.topk` defines no order among equal similarities: which tied images are listed, and in what order, is undefined.
"""

# R searched rows, B rows of a block, N images, D feature size, K list width
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mprd.errors import UserError

PADDING = -1
"""Fills a list that is shorter than the widest."""
NORM_TOLERANCE = 1e-3
SIMILARITIES_MB = 256
"""Memory for the similarities of a block of rows to all images."""
CPU_ROWS = 512
"""Rows of a block on a CPU; the product already uses all cores at this size."""


@dataclass(frozen=True, eq=False)
class NeighborTable:
    """One list of neighbors a row: `ids` int64 [R, K], nearest first and padded with -1.

    `is_capped` bool [R] marks rows that had more than `k_max` images above the similarity and were cut.
    """

    ids: Tensor
    is_capped: Tensor


@torch.no_grad()
def find_neighbors(
    features: Tensor,
    *,
    k: int,
    similarity: float,
    k_max: int = 64,
    rows: Tensor | None = None,
    queries: Tensor | None = None,
    is_checked: bool = False,
) -> NeighborTable:
    """List k_i = max(k, number of cosines above `similarity`), at most `k_max`, neighbors of each image (Sec. 5.2).

    `features` [N, D] are unit rows; an image is never its own neighbor. `rows` int64 [R] restricts the search to these
    images; `queries` [R, D] are images from outside. `is_checked` skips the check for unit rows, which syncs.
    Raises UserError where fewer than k others exist.

    >>> import torch
    >>> features = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    >>> find_neighbors(features, k=1, similarity=0.7).ids.tolist()  # nearest first, padded with -1
    [[1, -1], [2, 0], [1, 3], [2, -1]]
    """
    if not is_checked:
        check_features(features, "features")
    num_others = len(features) - (queries is None)
    check_counts(num_others, k, k_max)
    check_queries(queries, features, rows)
    self_ids = None
    if queries is None:
        self_ids = torch.arange(len(features), device=features.device) if rows is None else rows.to(features.device)
        queries = features if rows is None else features[self_ids]
    # one image beyond the cap shows which rows the cap cuts
    width = min(k_max + 1, num_others)
    ids = torch.empty((len(queries), width), dtype=torch.int64, device=features.device)
    counts = ids.new_empty(len(queries))
    block_rows = rows_at_once(len(features), features.device)
    buffer = features.new_empty((min(block_rows, len(queries)), len(features)))
    for start in range(0, len(queries), block_rows):
        block = slice(start, start + block_rows)
        own = None if self_ids is None else self_ids[block]
        values, ids[block] = cosines(queries[block], features, self_ids=own, out=buffer).topk(width, dim=1)
        counts[block] = (values > similarity).sum(1)
    return cut_lists(ids, counts, k=k, k_max=k_max)


def rows_at_once(num_images: int, device: torch.device) -> int:
    """Return the block size, at least 1, whose similarities to all images fit into SIMILARITIES_MB."""
    rows = max(1, SIMILARITIES_MB * 2**20 // (4 * num_images))
    # few large blocks keep an accelerator busy
    return min(rows, CPU_ROWS) if device.type == "cpu" else rows


def cosines(rows_BD: Tensor, features: Tensor, *, self_ids: Tensor | None, out: Tensor) -> Tensor:
    """Multiply a block of rows with all features into `out`; the rows' own images, `self_ids`, get -inf."""
    sim_BN = torch.mm(rows_BD, features.T, out=out[: len(rows_BD)])
    if self_ids is not None:
        sim_BN.scatter_(1, self_ids[:, None], -torch.inf)
    return sim_BN


def cut_lists(ids: Tensor, counts: Tensor, *, k: int, k_max: int) -> NeighborTable:
    """Keep k_i ids a row (Sec. 5.2), pad to the longest list with -1, and mark the rows that `k_max` cut."""
    is_capped, counts = counts > k_max, counts.clamp(k, k_max)
    ids = ids[:, : int(counts.max()) if len(counts) else k]
    is_past = torch.arange(ids.shape[1], device=ids.device) >= counts[:, None]
    return NeighborTable(ids.masked_fill(is_past, PADDING), is_capped)


def check_counts(num_others: int, k: int, k_max: int) -> None:
    """Raise UserError for a k that the images cannot fill, or a cap below it."""
    if num_others < k:
        raise UserError(f"neighbors.k must not exceed the number of other images, {num_others}, but got {k}")
    if k_max < k:
        raise UserError(f"neighbors.k_max must be at least neighbors.k = {k}, but got {k_max}")


def check_queries(queries: Tensor | None, features: Tensor, rows: Tensor | None) -> None:
    """Raise ValueError for queries together with rows, or of another feature size."""
    if queries is None:
        return
    if rows is not None:
        raise ValueError("give rows or queries, not both")
    check_features(queries, "queries")
    if queries.shape[1] != features.shape[1]:
        raise ValueError(f"queries must have {features.shape[1]} columns like the features, but got {queries.shape[1]}")


def check_features(features: Tensor, name: str) -> None:
    """Raise unless features are finite unit rows; NaN or infinity, a diverged run, is a UserError."""
    if features.dim() != 2 or not features.is_floating_point():
        raise TypeError(f"{name} must be floating point [N, D], but got {features.dtype} {tuple(features.shape)}")
    norms = features.norm(dim=1)
    # NaN fails this comparison too, so valid features cost one sync
    if bool(((norms - 1).abs() <= NORM_TOLERANCE).all()):
        return
    if not bool(torch.isfinite(norms).all()):
        row = int((~torch.isfinite(norms)).nonzero()[0])
        raise UserError(f"{name} must be finite, but row {row} holds NaN or infinity: has training diverged?")
    raise ValueError(f"{name} must have unit rows, but norms reach from {norms.min():.3g} to {norms.max():.3g}")
