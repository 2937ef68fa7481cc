"""NN_k: the exact nearest images of each image, computed in blocks of rows, never as an N x N matrix (Sec. 3.2, 5.2).

`torch.topk` defines no order among equal similarities: which tied images are listed, and in what order, is undefined.
"""

# R searched rows, B rows of a block, N images, D feature size, K list width, G groups (cameras, or one of all images)
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from mprd.errors import UserError

Metric = Literal["cosine", "csls", "camera"]
DENSITY_K = {"csls": 8, "camera": 20}
"""Default number of nearest images, of all or of a camera of average size, whose mean cosine is the local density."""
PADDING = -1
"""Fills a list that is shorter than the widest."""
NORM_TOLERANCE = 1e-3
SIMILARITIES_MB = 256
"""Memory for the similarities of a block of rows to all images; metrics other than cosine take three times."""
CPU_ROWS = 512
"""Rows of a block on a CPU; the product already uses all cores at this size."""


@dataclass(frozen=True, eq=False)
class NeighborTable:
    """One list of neighbors a row: `ids` int64 [R, K], nearest first and padded with -1, `counts` int64 [R].

    `is_capped` bool [R] marks rows that had more than `k_max` images above the similarity and were cut.
    """

    ids: Tensor
    counts: Tensor
    is_capped: Tensor


@dataclass(frozen=True, eq=False)
class Density:
    """Local density of each image in each group: `values` [N, G], `group_ids` int64 [N].

    `values[i, g]` is the mean of the `ks[g]` highest cosines of i to other images of group g; 0 if there are none.
    """

    values: Tensor
    group_ids: Tensor
    ks: list[int]


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
    block_rows: int = CPU_ROWS,
) -> NeighborTable:
    """List k_i = max(k, number of cosines above `similarity`), at most `k_max`, neighbors of each image (Sec. 5.2).

    `features` [N, D] are unit rows; an image is never its own neighbor. `rows` int64 [R] restricts the search to these
    images; `queries` [R, D] are images from outside, with `query_camids` [R]. `csls` and `camera` order the lists by a
    similarity corrected by the density of `density_k` nearest, of which a threshold of cosines counts nothing: these
    lists hold `k_max` images. `camera` needs `camids` [N]. A known `density` is not measured again. `is_checked` skips
    the check for unit rows, which syncs.
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
    if metric != "cosine" and density is None:
        density = measure_density(features, metric=metric, k=density_k, camids=camids, block_rows=block_rows)
    targets = choose_targets(features, rows, queries, query_camids, density)
    # one image beyond the cap shows which rows the cap cuts
    width = min(k_max + (density is None), num_others)
    ids, _, counts = rank_images(
        features, targets, width, similarity=similarity, density=density, block_rows=block_rows
    )
    return cut_lists(ids, counts if density is None else counts.fill_(width), k=k, k_max=k_max)


@torch.no_grad()
def measure_density(
    features: Tensor, *, metric: Metric, k: int | None = None, camids: Tensor | None = None, block_rows: int = CPU_ROWS
) -> Density:
    """Measure the density that `csls` (k nearest of all images) or `camera` (in each camera) subtracts.

    Of a camera of n images the max(1, round(k n / mean n)) nearest count: a fixed number would reach beyond the mates
    of an image in a small camera, whose density would be too low and which would flood the lists.
    """
    check_features(features, "features")
    group_ids = group_images(len(features), metric, camids, features.device)
    density = Density(features.new_empty(0), group_ids, density_counts(group_ids, k or DENSITY_K[metric]))
    blocks = []
    buffer = features.new_empty((min(block_rows, len(features)), len(features)))
    for self_ids in torch.arange(len(features), device=features.device).split(block_rows):
        sim_BN = cosines(features[self_ids], features, self_ids=self_ids, out=buffer)
        blocks.append(group_means(sim_BN, density))
    return Density(torch.cat(blocks), group_ids, density.ks)


def density_counts(group_ids: Tensor, k: int) -> list[int]:
    """Return for each group the number of nearest images whose mean is the density: `k` in a group of average size."""
    counts = torch.bincount(group_ids).tolist()
    share = k * sum(count > 0 for count in counts) / len(group_ids)
    return [max(1, round(share * count)) for count in counts]


def rows_at_once(num_images: int, device: torch.device, *, memory_mb: int = SIMILARITIES_MB) -> int:
    """Return the block size, at least 1, whose similarities to all images fit into `memory_mb`."""
    rows = max(1, memory_mb * 2**20 // (4 * num_images))
    # few large blocks keep an accelerator busy
    return min(rows, CPU_ROWS) if device.type == "cpu" else rows


class Targets(NamedTuple):
    """The R searched rows: images of the memory, `ids` int64 [R], or outside it, `queries` [R, D]; the other is None.

    `groups` int64 [R] where the metric corrects for density.
    """

    ids: Tensor | None
    queries: Tensor | None
    groups: Tensor | None

    def __len__(self) -> int:
        rows = self.queries if self.ids is None else self.ids
        assert rows is not None
        return len(rows)


def choose_targets(
    features: Tensor, rows: Tensor | None, queries: Tensor | None, query_camids: Tensor | None, density: Density | None
) -> Targets:
    """Resolve the arguments of `find_neighbors` that select what is searched."""
    ids = None
    if queries is None:
        ids = torch.arange(len(features), device=features.device) if rows is None else rows.to(features.device)
    groups = None if density is None else target_groups(density, ids, queries, query_camids)
    return Targets(ids, queries, groups)


def rank_images(
    features: Tensor, targets: Targets, width: int, *, similarity: float, density: Density | None, block_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each target's nearest ids, int64 [R, width], their scores, and the number of cosines above `similarity`.

    Scores [R, width] are cosines, or these corrected for density.
    """
    ids = torch.empty((len(targets), width), dtype=torch.int64, device=features.device)
    all_scores = features.new_empty(len(targets), width)
    counts = ids.new_empty(len(targets))
    buffer = features.new_empty((min(block_rows, len(targets)), len(features)))
    for start in range(0, len(targets), block_rows):
        block = slice(start, start + block_rows)
        self_ids = None if targets.ids is None else targets.ids[block]
        rows_BD = targets.queries[block] if targets.queries is not None else features[self_ids]
        sim_BN = cosines(rows_BD, features, self_ids=self_ids, out=buffer)
        values, order = sim_BN.topk(width, dim=1)
        counts[block] = (values > similarity).sum(1)
        if density is not None and targets.groups is not None:
            row_density = group_means(sim_BN, density) if self_ids is None else density.values[self_ids]
            values, order = subtract_density(sim_BN, row_density, targets.groups[block], density).topk(width, dim=1)
        ids[block], all_scores[block] = order, values
    return ids, all_scores, counts


def cosines(rows_BD: Tensor, features: Tensor, *, self_ids: Tensor | None, out: Tensor) -> Tensor:
    """Multiply a block of rows with all features into `out`; the rows' own images, `self_ids`, get -inf."""
    sim_BN = torch.mm(rows_BD, features.T, out=out[: len(rows_BD)])
    if self_ids is not None:
        sim_BN.scatter_(1, self_ids[:, None], -torch.inf)
    return sim_BN


def subtract_density(sim_BN: Tensor, row_density: Tensor, row_groups: Tensor, density: Density) -> Tensor:
    """Return 2 s_ij - d(i, group of j) - d(j, group of i), [B, N], for a block of cosines s_ij.

    `row_density` [B, G] and `row_groups` int64 [B] belong to the block's rows.
    """
    scores = 2 * sim_BN
    scores -= row_density[:, density.group_ids]
    scores -= density.values.T[row_groups]
    return scores


def group_means(sim_BN: Tensor, density: Density) -> Tensor:
    """Return the mean of each row's `density.ks` highest cosines within each group, [B, G]; 0 for an empty group."""
    means = []
    for group, k in enumerate(density.ks):
        sim = sim_BN if len(density.ks) == 1 else sim_BN[:, density.group_ids == group]
        best = sim.topk(min(k, sim.shape[1]), dim=1).values
        is_other = best > -torch.inf
        means.append(best.masked_fill(~is_other, 0).sum(1) / is_other.sum(1).clamp(min=1))
    return torch.stack(means, dim=1)


def group_images(num_images: int, metric: Metric, camids: Tensor | None, device: torch.device) -> Tensor:
    """Return the group of each image, int64 [N]: its camera for `camera`, 0 for `csls`."""
    if metric not in DENSITY_K:
        raise UserError(f"neighbors.metric must be one of {', '.join(get_args(Metric))}, but got {metric!r}")
    if metric == "csls":
        return torch.zeros(num_images, dtype=torch.int64, device=device)
    if camids is None:
        raise UserError("neighbors.metric: camera needs camera ids, but these images have none; use cosine or csls")
    if len(camids) != num_images:
        raise ValueError(f"camids must be as many as the {num_images} images, but got {len(camids)}")
    return camids.to(device=device, dtype=torch.int64)


def target_groups(density: Density, ids: Tensor | None, queries: Tensor | None, query_camids: Tensor | None) -> Tensor:
    """Return the group of each target, int64 [R]."""
    if queries is None:
        return density.group_ids[ids]
    if density.values.shape[1] == 1:
        return density.group_ids.new_zeros(len(queries))
    if query_camids is None or len(query_camids) != len(queries):
        raise UserError("neighbors.metric: camera needs a camera id for each query image")
    return query_camids.to(device=density.group_ids.device, dtype=torch.int64)


def cut_lists(ids: Tensor, counts: Tensor, *, k: int, k_max: int) -> NeighborTable:
    """Keep k_i ids a row (Sec. 5.2), pad to the longest list with -1, and mark the rows that `k_max` cut."""
    is_capped, counts = counts > k_max, counts.clamp(k, k_max)
    ids = ids[:, : int(counts.max()) if len(counts) else k]
    is_past = torch.arange(ids.shape[1], device=ids.device) >= counts[:, None]
    return NeighborTable(ids.masked_fill(is_past, PADDING), counts, is_capped)


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
