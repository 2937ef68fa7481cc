"""The K nearest of each image by the camera-corrected similarity c, and c of any pair: N x K, never N x N.

c_ij = 2 s_ij - (mean of i's highest cosines within j's camera) - (mean of j's highest within i's): what a pair has in
common beyond what these two cameras always have in common. Without cameras all images are one group, which is CSLS.
Shapes: N images, K list width, B rows of a block, D feature size, P pairs, G cameras.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mprd.neighbors.exact import check_features, cosines, rows_at_once

DENSITY_K = 20
"""Images of a camera of average size whose mean cosine is the local density."""
ENTRIES_AT_ONCE = 2**18
"""Feature entries gathered at a time for the cosines of pairs, which a core's cache holds."""
KEPT_MB = 768
"""Memory for the cosines that densities are measured from, which are read again to rank."""


@dataclass(frozen=True, eq=False)
class Density:
    """Local density of each image in each camera."""

    values: Tensor
    """`[N, G]`: the mean of the `ks[g]` highest cosines to other images of camera g; 0 if there are none."""
    group_ids: Tensor
    """int64 `[N]`, each image's camera."""
    ks: list[int]


@dataclass(frozen=True, eq=False)
class SimilarityGraph:
    """The K nearest of each image by c."""

    features: Tensor
    """`[N, D]`, unit length."""
    density: Density
    ids: Tensor
    """int64 `[N, K]`, nearest first; -1 where an index has found fewer."""
    scores: Tensor
    """`[N, K]`, c; -inf where an index has found fewer."""
    reads_lists: bool = False
    """Whether `between` reads c of listed pairs from the lists, which differ from a product of two rows by rounding."""

    def __len__(self) -> int:
        return len(self.ids)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return c of pairs of images, ids int64 `[P]` each."""
        if not self.reads_lists:
            return self.measure(first, second)
        ids, order = self.ids.sort(dim=1)
        # -1, the id of padding, must not meet the last image of the row before
        stride = len(self) + 1
        listed = (ids + stride * torch.arange(len(self), device=ids.device)[:, None]).flatten()
        keys = first * stride + second
        places = torch.searchsorted(listed, keys).clamp(max=len(listed) - 1)
        scores = self.scores.gather(1, order).flatten()[places]
        missing = (listed[places] != keys).nonzero().squeeze(1)
        return scores.index_put_((missing,), self.measure(first[missing], second[missing]))

    def measure(self, first: Tensor, second: Tensor) -> Tensor:
        """Measure c of pairs of images, ids int64 `[P]` each."""
        size = max(1, ENTRIES_AT_ONCE // self.features.shape[1])
        values, groups = self.density.values, self.density.group_ids
        parts = [
            2 * (self.features[i] * self.features[j]).sum(1) - values[i, groups[j]] - values[j, groups[i]]
            for i, j in zip(first.split(size), second.split(size), strict=True)
        ]
        return torch.cat([self.scores.new_zeros(0), *parts])


@torch.no_grad()
def find_graph(features: Tensor, camids: Tensor | None, *, width: int) -> SimilarityGraph:
    """Search the `width` nearest of all images by c exactly, in blocks of rows.

    Args:
        features: `[N, D]`, unit length.
        camids: `[N]`; None makes one group of all images.
    """
    check_features(features, "features")
    blocks = CosineBlocks(features, block_rows=rows_at_once(len(features), features.device))
    density = measure_density(blocks, group_images(features, camids))
    ids = density.group_ids.new_empty(len(features), min(width, len(features) - 1))
    scores = features.new_empty(ids.shape)
    for rows, sim_BN in blocks:
        c_BN = subtract_density(sim_BN, density.values[rows], density.group_ids[rows], density)
        scores[rows], ids[rows] = c_BN.topk(ids.shape[1], dim=1)
    return SimilarityGraph(features, density, ids, scores)


class CosineBlocks:
    """Cosines of consecutive images with all; as many blocks as fit into KEPT_MB are computed once and kept."""

    def __init__(self, features: Tensor, *, block_rows: int) -> None:
        """Divide the images of unit features `[N, D]` into blocks."""
        self.features = features
        self.blocks = torch.arange(len(features), device=features.device).split(block_rows)
        self.num_kept = KEPT_MB * 2**20 // max(1, features.element_size() * block_rows * len(features))
        self.kept: list[Tensor] = []
        self.buffer = features.new_empty(0 if self.num_kept >= len(self.blocks) else block_rows, len(features))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ids `[B]` and cosines `[B, N]`, -inf with themselves; a block may be overwritten by the next."""
        for number, ids in enumerate(self.blocks):
            if number < len(self.kept):
                yield ids, self.kept[number]
                continue
            is_kept = len(self.kept) < self.num_kept
            out = self.features.new_empty(len(ids), len(self.features)) if is_kept else self.buffer
            sim_BN = cosines(self.features[ids], self.features, self_ids=ids, out=out)
            if is_kept:
                self.kept.append(sim_BN)
            yield ids, sim_BN


def measure_density(blocks: CosineBlocks, group_ids: Tensor) -> Density:
    """Measure the density of the images of all blocks in each group of `group_ids` `[N]`.

    Of a camera of n images the max(1, round(20 n / mean n)) nearest count: a fixed number would reach beyond the mates
    of an image in a small camera, whose density would be too low and which would flood the lists.
    """
    density = Density(blocks.features.new_empty(0), group_ids, density_counts(group_ids))
    return Density(torch.cat([group_means(sim_BN, density) for _, sim_BN in blocks]), group_ids, density.ks)


def density_counts(group_ids: Tensor) -> list[int]:
    """Return for each group the number of nearest images whose mean is the density: 20 in a group of average size."""
    counts = torch.bincount(group_ids).tolist()
    share = DENSITY_K * sum(count > 0 for count in counts) / len(group_ids)
    return [max(1, round(share * count)) for count in counts]


def group_images(features: Tensor, camids: Tensor | None) -> Tensor:
    """Return the group of each image, int64 `[N]`: its camera, 0 where cameras are unknown."""
    if camids is None:
        return torch.zeros(len(features), dtype=torch.int64, device=features.device)
    if len(camids) != len(features):
        raise ValueError(f"camids must be as many as the {len(features)} images, but got {len(camids)}")
    return camids.to(device=features.device, dtype=torch.int64)


def subtract_density(sim_BN: Tensor, row_density: Tensor, row_groups: Tensor, density: Density) -> Tensor:
    """Return c = 2 s_ij - d(i, group of j) - d(j, group of i), [B, N], for a block of cosines s_ij.

    `row_density` [B, G] and `row_groups` int64 [B] belong to the block's rows.
    """
    scores = 2 * sim_BN
    scores -= row_density.index_select(1, density.group_ids)
    scores -= density.values.T.contiguous().index_select(0, row_groups)
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
