"""k-reciprocal Jaccard similarity of all images: the best that is said of a pair without learning (not in the paper).

An image's k-reciprocal set (Zhong et al., CVPR 2017) reaches to the neighbors of its neighbors and weighs each by its
distance, which a list of neighbors does not.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mprd.neighbors.jaccard import jaccard_distances

NEAREST, AVERAGED = 20, 6
"""k1 and k2, the values of its authors."""


@dataclass(frozen=True, eq=False)
class SimilarityTable:
    """The similarities of N images that are not 0, and of copies that stand for some of them."""

    keys: Tensor
    """int64 `[E]`, rising: i N + j of each entry."""
    values: Tensor
    """`[E]`, in 0..1."""
    images: Tensor
    """int64 `[N + X]`: 0..N-1, and the image that each copy was made from."""
    num_images: int
    """N."""

    @classmethod
    def empty(cls) -> SimilarityTable:
        """Return the table of no images."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return cls(nothing, torch.zeros(0), nothing, 0)

    def with_copies(self, originals: Tensor) -> SimilarityTable:
        """Put copies of the images `originals` int64 `[X]` behind the images; each is to others what its image is."""
        return replace(self, images=torch.cat([self.images[: self.num_images], originals]))

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the similarities of images, int64 ids of any shapes that broadcast; 0 where there is no entry."""
        keys = self.images[first] * self.num_images + self.images[second]
        # beyond the last entry is none either, so the last will do for what is not found there
        places = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return self.values[places].where(self.keys[places] == keys, 0)


def measure_similarities(features: Tensor, *, k1: int = NEAREST, k2: int = AVERAGED) -> SimilarityTable:
    """Measure the similarities of images by unit features `[N, D]`."""
    num_images, keys, values = len(features), [], []
    for ids, block in reciprocal_similarities(features, k1=k1, k2=k2):
        rows, columns = block.nonzero(as_tuple=True)
        keys.append(ids[rows] * num_images + columns)
        values.append(block[rows, columns])
    images = torch.arange(num_images, device=features.device)
    return SimilarityTable(torch.cat(keys), torch.cat(values), images, num_images)


def reciprocal_similarities(features: Tensor, *, k1: int, k2: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield image ids `[B]`, in order, and their similarities (1 - Jaccard distance) to all images `[B, N]`."""
    for rows, distances in jaccard_distances(features, k1=min(k1, len(features) - 1), k2=k2):
        yield torch.arange(rows.start, rows.stop, device=features.device), 1 - distances
