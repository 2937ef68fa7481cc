"""k-reciprocal Jaccard similarities of all images, the strongest training-free pair score (not in the paper).

A k-reciprocal set (Zhong et al., CVPR 2017) includes neighbors of neighbors and weights members by distance, unlike a
neighbor list.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mprd.neighbors.jaccard import jaccard_distances

K1, K2 = 20, 6
"""Sizes of the lists that sets are built from and averaged over: the authors' values."""


@dataclass(frozen=True, eq=False)
class SimilarityTable:
    """The E non-zero similarities of N images, and X copies of images, which share those of their originals."""

    keys: Tensor
    """int64 `[E]`, ascending: i N + j of each entry."""
    values: Tensor
    """`[E]`, in 0..1."""
    images: Tensor
    """int64 `[N + X]`: 0..N-1, then the original of each copy."""
    num_images: int
    """N."""

    @classmethod
    def empty(cls) -> SimilarityTable:
        """Return the table of no images."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return cls(nothing, torch.zeros(0), nothing, 0)

    def with_copies(self, originals: Tensor) -> SimilarityTable:
        """Replace the copies by copies of the images `originals`, int64 `[X]`, with the ids N..N+X-1."""
        return replace(self, images=torch.cat([self.images[: self.num_images], originals]))

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the similarities of images, int64 ids of shapes that broadcast; 0 where there is no entry."""
        keys = self.images[first] * self.num_images + self.images[second]
        # a key beyond the last entry is compared with the last, and differs
        positions = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return self.values[positions].where(self.keys[positions] == keys, 0)


def measure_similarities(features: Tensor, *, k1: int = K1, k2: int = K2) -> SimilarityTable:
    """Measure the similarities of all images from unit features `[N, D]`."""
    num_images, keys, values = len(features), [], []
    for ids, block in reciprocal_similarities(features, k1=k1, k2=k2):
        rows, columns = block.nonzero(as_tuple=True)
        keys.append(ids[rows] * num_images + columns)
        values.append(block[rows, columns])
    images = torch.arange(num_images, device=features.device)
    return SimilarityTable(torch.cat(keys), torch.cat(values), images, num_images)


def reciprocal_similarities(features: Tensor, *, k1: int, k2: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield image ids `[B]`, ascending, and their similarities to all images, 1 - Jaccard distance, `[B, N]`."""
    for rows, distances in jaccard_distances(features, k1=min(k1, len(features) - 1), k2=k2):
        yield torch.arange(rows.start, rows.stop, device=features.device), 1 - distances
