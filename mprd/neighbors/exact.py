"""NN_k: the exact nearest images of each image, block by block, never as an N x N matrix (Sec. 3.2, 5.2).

Among equal similarities `torch.topk` promises no order: which of two tied images is listed first, or at all, is open.
"""

# B rows of a block, N images, D feature size, K list width, G groups of images (the cameras, or one of all images)
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from mprd.errors import UserError

Metric = Literal["cosine", "csls", "camera"]
NUM_NEAREST = {"csls": 8, "camera": 5}
"""Nearest images that tell the local density, where nobody says how many."""
PADDING = -1
"""In place of an id, where a list is shorter than the widest."""
NORM_TOLERANCE = 1e-3
CPU_ROWS = 512
"""Rows that a CPU searches at a time: more would not be faster, for the product is spread over all cores by then."""


@dataclass(frozen=True, eq=False)
class NeighborTable:
    """Hold one list of neighbors a row: `ids` int64 [R, K], nearest first and padded with -1, `counts` int64 [R].

    `is_capped` bool [R] marks rows that had more than `k_max` images above the similarity and were cut.
    """

    ids: Tensor
    counts: Tensor
    is_capped: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_capped(self) -> int:
        """Count the rows that were cut."""
        return int(self.is_capped.sum())

    @property
    def indptr(self) -> Tensor:
        """Give the row starts of the table in CSR form, int64 [R + 1]."""
        return torch.cat([self.counts.new_zeros(1), self.counts.cumsum(0)])

    @property
    def indices(self) -> Tensor:
        """Give all lists one after the other, int64 [nnz], in CSR form."""
        return self.ids[self.ids >= 0]


@dataclass(frozen=True, eq=False)
class Density:
    """Hold how close images have neighbors in each group: `values` [N, G], `group_ids` int64 [N].

    `values[i, g]` is the mean of i's `k` highest cosines (itself excluded) to the images of group g, 0 where there is
    none.
    """

    values: Tensor
    group_ids: Tensor
    k: int


@torch.no_grad()
def find_neighbors(
    features: Tensor,
    *,
    k: int,
    similarity: float,
    k_max: int = 64,
    metric: Metric = "cosine",
    camids: Tensor | None = None,
    rows: Tensor | None = None,
    queries: Tensor | None = None,
    query_camids: Tensor | None = None,
    density_k: int | None = None,
    density: Density | None = None,
    is_checked: bool = False,
    is_trimmed: bool = True,
    block_rows: int = CPU_ROWS,
) -> NeighborTable:
    """List k_i = max(k, number of cosines above `similarity`) neighbors an image, at most `k_max` (Sec. 5.2).

    `features` [N, D] are unit rows; an image is never its own neighbor. `rows` int64 [R] searches for these images
    alone; `queries` [R, D] searches for images from outside, none excluded. The count always comes from the cosine,
    order and membership from `metric`; `camera` needs `camids` int64 [N] (and `query_camids` [R]). Both `csls` and
    `camera` correct by the `density_k` nearest; `density` spares the pass over all images that they start with, and
    `is_checked` the look at all features of a caller who knows that they are unit rows. Lists that are not trimmed are
    all `k_max` wide, which an accelerator need not be waited for.
    Raises UserError where fewer than k others exist.
    """
    if not is_checked:
        check_features(features, "features")
    search_rows = torch.arange(len(features), device=features.device) if rows is None else rows.to(features.device)
    num_others = len(features) - (queries is None)
    check_counts(num_others, k, k_max)
    if queries is not None:
        check_queries(queries, features, rows)
    if metric != "cosine" and density is None:
        density = measure_density(features, metric=metric, k=density_k, camids=camids, block_rows=block_rows)
    groups = None if density is None else row_groups(density, search_rows, queries, query_camids)

    num_rows = len(search_rows) if queries is None else len(queries)
    width = min(k_max + 1, num_others)  # one more than the cap, to see which rows it cuts
    ids = torch.empty((num_rows, width), dtype=torch.int64, device=features.device)
    counts = ids.new_empty(num_rows)
    buffer = features.new_empty((min(block_rows, num_rows), len(features)))
    for start in range(0, num_rows, block_rows):
        block = slice(start, start + block_rows)
        self_ids = search_rows[block] if queries is None else None
        rows_BD = features[self_ids] if queries is None else queries[block]
        sim_BN = cosines(rows_BD, features, self_ids=self_ids, out=buffer)
        values, order = sim_BN.topk(width, dim=1)
        counts[block] = (values > similarity).sum(1)
        if density is not None and groups is not None:
            row_density = group_means(sim_BN, density) if self_ids is None else density.values[self_ids]
            order = correct(sim_BN, row_density, groups[block], density).topk(width, dim=1).indices
        ids[block] = order
    return cut(ids, counts, k=k, k_max=k_max, is_trimmed=is_trimmed)


@torch.no_grad()
def measure_density(
    features: Tensor, *, metric: Metric, k: int | None = None, camids: Tensor | None = None, block_rows: int = CPU_ROWS
) -> Density:
    """Measure what `csls` (k nearest of all images) or `camera` (k nearest in each camera) subtract from 2 s_ij."""
    check_features(features, "features")
    group_ids = group_images(len(features), metric, camids, features.device)
    density = Density(features.new_empty(0), group_ids, k or NUM_NEAREST[metric])
    blocks = []
    buffer = features.new_empty((min(block_rows, len(features)), len(features)))
    for self_ids in torch.arange(len(features), device=features.device).split(block_rows):
        sim_BN = cosines(features[self_ids], features, self_ids=self_ids, out=buffer)
        blocks.append(group_means(sim_BN, density))
    return Density(torch.cat(blocks), group_ids, density.k)


def rows_at_once(num_images: int, device: torch.device, *, memory_mb: int) -> int:
    """Count the rows whose similarities to all images fit into so much memory, at least one."""
    rows = max(1, memory_mb * 2**20 // (4 * num_images))
    # an accelerator is given its work in few large pieces
    return min(rows, CPU_ROWS) if device.type == "cpu" else rows


def correct(sim_BN: Tensor, row_density: Tensor, row_groups: Tensor, density: Density) -> Tensor:
    """Correct a block of cosines for local density: 2 s_ij - d(i, group of j) - d(j, group of i), [B, N].

    `row_density` [B, G] and `row_groups` int64 [B] are the rows' own. One more metric is one more case here.
    """
    scores = 2 * sim_BN
    scores -= row_density[:, density.group_ids]
    scores -= density.values.T[row_groups]
    return scores


def cosines(rows_BD: Tensor, features: Tensor, *, self_ids: Tensor | None, out: Tensor) -> Tensor:
    """Multiply a block of rows with all features into `out`; the rows' own images, `self_ids`, get -inf."""
    sim_BN = torch.mm(rows_BD, features.T, out=out[: len(rows_BD)])
    if self_ids is not None:
        sim_BN.scatter_(1, self_ids[:, None], -torch.inf)
    return sim_BN


def group_means(sim_BN: Tensor, density: Density) -> Tensor:
    """Average each row's highest cosines within each group, [B, G]; fewer where the group has fewer, 0 where none."""
    means = []
    num_groups = int(density.group_ids.max()) + 1
    for group in range(num_groups):
        sim = sim_BN if num_groups == 1 else sim_BN[:, density.group_ids == group]
        best = sim.topk(min(density.k, sim.shape[1]), dim=1).values
        is_other = best > -torch.inf
        means.append(best.masked_fill(~is_other, 0).sum(1) / is_other.sum(1).clamp(min=1))
    return torch.stack(means, dim=1)


def group_images(num_images: int, metric: Metric, camids: Tensor | None, device: torch.device) -> Tensor:
    """Say which group each image belongs to, int64 [N]: its camera, or the one group of all images."""
    if metric not in NUM_NEAREST:
        raise UserError(f"neighbors.metric must be one of {', '.join(get_args(Metric))}, but got {metric!r}")
    if metric == "csls":
        return torch.zeros(num_images, dtype=torch.int64, device=device)
    if camids is None:
        raise UserError("neighbors.metric: camera needs camera ids, but these images have none; use cosine or csls")
    if len(camids) != num_images:
        raise ValueError(f"camids must be as many as the {num_images} images, but got {len(camids)}")
    return camids.to(device=device, dtype=torch.int64)


def row_groups(density: Density, rows: Tensor, queries: Tensor | None, query_camids: Tensor | None) -> Tensor:
    """Say which group each searched row belongs to, int64 [R]."""
    if queries is None:
        return density.group_ids[rows]
    if density.values.shape[1] == 1:
        return density.group_ids.new_zeros(len(queries))
    if query_camids is None or len(query_camids) != len(queries):
        raise UserError("neighbors.metric: camera needs a camera id for each query image")
    return query_camids.to(device=density.group_ids.device, dtype=torch.int64)


def cut(ids: Tensor, counts: Tensor, *, k: int, k_max: int, is_trimmed: bool = True) -> NeighborTable:
    """Keep k_i ids a row (Sec. 5.2), pad the rest with -1, and mark the rows that `k_max` cut.

    The table is as wide as its longest list, or, not trimmed, `k_max`.
    """
    is_capped, counts = counts > k_max, counts.clamp(k, k_max)
    width = k_max
    if is_trimmed:
        width = int(counts.max()) if len(counts) else k
    ids = ids[:, :width]
    is_past = torch.arange(ids.shape[1], device=ids.device) >= counts[:, None]
    return NeighborTable(ids.masked_fill(is_past, -1), counts, is_capped)


def check_counts(num_others: int, k: int, k_max: int) -> None:
    """Refuse a k that the images cannot fill, or a cap below it."""
    if num_others < k:
        raise UserError(f"neighbors.k must not exceed the number of other images, {num_others}, but got {k}")
    if k_max < k:
        raise UserError(f"neighbors.k_max must be at least neighbors.k = {k}, but got {k_max}")


def check_queries(queries: Tensor, features: Tensor, rows: Tensor | None) -> None:
    """Refuse queries that do not fit the features."""
    if rows is not None:
        raise ValueError("give rows or queries, not both")
    check_features(queries, "queries")
    if queries.shape[1] != features.shape[1]:
        raise ValueError(f"queries must have {features.shape[1]} columns like the features, but got {queries.shape[1]}")


def check_features(features: Tensor, name: str) -> None:
    """Refuse anything but finite unit rows; raise UserError on NaN or infinity, which is a run gone wrong."""
    if features.dim() != 2 or not features.is_floating_point():
        raise TypeError(f"{name} must be floating point [N, D], but got {features.dtype} {tuple(features.shape)}")
    norms = features.norm(dim=1)
    # not a number is not near 1 either, so that one look at an accelerator is enough
    if bool(((norms - 1).abs() <= NORM_TOLERANCE).all()):
        return
    if not bool(torch.isfinite(norms).all()):
        row = int((~torch.isfinite(norms)).nonzero()[0])
        raise UserError(f"{name} must be finite, but row {row} holds NaN or infinity: has training diverged?")
    raise ValueError(f"{name} must have unit rows, but norms reach from {norms.min():.3g} to {norms.max():.3g}")
