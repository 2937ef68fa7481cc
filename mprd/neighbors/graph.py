"""The K nearest of each image by the camera-corrected similarity c, and c of any pair: N x K, never N x N.

c_ij = 2 s_ij - (mean of i's highest cosines within j's camera) - (mean of j's highest within i's): what a pair has in
common beyond what these two cameras always have in common. Without cameras all images are one group, which is CSLS.
Shapes: N images, K list width, D feature size, P pairs, G cameras.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mprd.neighbors.exact import DENSITY_K, Density, Metric, Targets, measure_density, rank_images, rows_at_once

ENTRIES_AT_ONCE = 2**23
"""Feature entries gathered at a time for the cosines of pairs."""


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

    def __len__(self) -> int:
        return len(self.ids)

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return c of pairs of images, ids int64 `[P]` each."""
        size = max(1, ENTRIES_AT_ONCE // self.features.shape[1])
        values, groups = self.density.values, self.density.group_ids
        parts = [
            2 * (self.features[i] * self.features[j]).sum(1) - values[i, groups[j]] - values[j, groups[i]]
            for i, j in zip(first.split(size), second.split(size), strict=True)
        ]
        return torch.cat([self.scores.new_zeros(0), *parts])


GraphSearch = Callable[..., SimilarityGraph]
"""Called like `find_graph`."""


@torch.no_grad()
def find_graph(features: Tensor, camids: Tensor | None, *, width: int, density_k: int | None = None) -> SimilarityGraph:
    """Search the `width` nearest of all images by c exactly, in blocks of rows.

    Args:
        features: `[N, D]`, unit length.
        camids: `[N]`; None makes one group of all images.
        density_k: images of a camera of average size whose mean cosine is the density.
    """
    block_rows = rows_at_once(len(features), features.device)
    metric: Metric = "csls" if camids is None else "camera"
    density = measure_density(
        features, metric=metric, k=density_k or DENSITY_K["camera"], camids=camids, block_rows=block_rows
    )
    everyone = torch.arange(len(features), device=features.device)
    ids, scores, _ = rank_images(
        features,
        Targets(everyone, None, density.group_ids),
        min(width, len(features) - 1),
        similarity=1.0,
        density=density,
        block_rows=block_rows,
    )
    return SimilarityGraph(features, density, ids, scores)
