"""J, the k-reciprocal Jaccard similarity on the camera-corrected similarity c: a training-free pair score.

The sets of Zhong et al. (CVPR 2017) are built from lists by c, and members weigh exp(c) in place of exp(-distance).
Not in the paper. All work is on the sparse graph: N x K in, the pairs that share a member out, on the CPU.
Shapes: N images, E pairs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mprd.neighbors.exact import PADDING
from mprd.neighbors.graph import SimilarityGraph
from mprd.neighbors.jaccard import average_weights, jaccard_blocks, reciprocal_sets

if TYPE_CHECKING:
    from scipy.sparse import csr_array

K1, K2 = 20, 6
"""Sizes of the lists that sets are built from and averaged over: the authors' values."""
LEAST = 0.02
"""Similarities that are not above this are left out of the table."""


@dataclass(frozen=True, eq=False)
class SimilarityTable:
    """The E pairs of N images whose similarity is above LEAST."""

    keys: Tensor
    """int64 `[E]`, ascending: i N + j of each pair i < j."""
    values: Tensor
    """`[E]`, in 0..1."""
    num_images: int
    """N."""

    def between(self, first: Tensor, second: Tensor) -> Tensor:
        """Return the similarities of images, int64 ids of shapes that broadcast; 0 where there is no entry."""
        first, second = torch.broadcast_tensors(first, second)
        own = (first == second).to(self.values.dtype)
        if len(self.keys) == 0:
            return own
        keys = torch.minimum(first, second) * self.num_images + torch.maximum(first, second)
        # a key beyond the last entry is compared with the last, and differs
        positions = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return self.values[positions].where(self.keys[positions] == keys, own)

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """The images of each pair, int64 `[E]` each, the smaller id first."""
        return self.keys // self.num_images, self.keys % self.num_images

    def above(self, least: float) -> tuple[Tensor, Tensor]:
        """List for each image itself and the images whose similarity to it exceeds `least`.

        Returns:
            Ids `[N, W]`, ascending and padded with -1, and their similarities `[N, W]`.
        """
        is_near = self.values > least
        first, second = (ids[is_near] for ids in self.pairs)
        own = torch.arange(self.num_images, device=first.device)
        keys, order = torch.cat([self.keys[is_near], second * len(own) + first, own * (len(own) + 1)]).sort()
        near = self.values[is_near]
        values = torch.cat([near, near, near.new_ones(len(own))])[order]
        rows = keys // len(own)
        counts = torch.bincount(rows)
        places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
        ids = torch.full((len(own), int(counts.max())), PADDING, device=rows.device)
        ids[rows, places] = keys % len(own)
        return ids, values.new_zeros(ids.shape).index_put_((rows, places), values)

    def surest(self, count: int) -> Tensor:
        """Return the positions `[count]` of the pairs of highest similarity; all where there are fewer."""
        return self.values.argsort(descending=True, stable=True)[:count]


def measure_similarities(graph: SimilarityGraph, *, k1: int = K1, k2: int = K2) -> SimilarityTable:
    """Measure J of all pairs, with lists of k1 and means over k2 images."""
    num_images, device = len(graph), graph.ids.device
    blocks = jaccard_blocks(reciprocal_weights(graph, k1=k1, k2=k2), least=LEAST)
    parts = [(first * num_images + second, similarities) for first, second, similarities in blocks]
    keys, values = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*parts, strict=True))
    return SimilarityTable(keys, values.float(), num_images)


def reciprocal_weights(graph: SimilarityGraph, *, k1: int, k2: int) -> csr_array:
    """Weight member j of the set of i by exp(c_ij), i itself by exp(largest c of any pair): `[N, N]`, rows of sum 1."""
    num_images = len(graph)
    k1 = min(k1, num_images - 1)
    near = np.concatenate([np.arange(num_images)[:, None], graph.ids[:, : max(k1, k2 - 1)].numpy(force=True)], axis=1)
    sets = reciprocal_sets(near, k1)
    rows, columns = (torch.from_numpy(ids.astype(np.int64)).to(graph.ids.device) for ids in sets.coords)
    similarities = graph.between(rows, columns).where(rows != columns, graph.scores.max()).numpy(force=True)
    return average_weights(sets, np.exp(similarities.astype(np.float64)), near[:, :k2])
