"""Agreement of two images: the cosine of their rows of likelihoods, over the whole graph of candidates.

Not in the paper, whose Eq. 7 looks at each pair alone. Two images of one identity have high likelihoods with the same
other images; a pair with a wrong likelihood lacks this support. All work is on the sparse graph, on the CPU.
Shapes: N images, K candidates of an image, B rows, E entries, W width of the widest list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mprd.neighbors.exact import PADDING, pad_rows

if TYPE_CHECKING:
    from scipy.sparse import csr_array

POWER = 3
"""Exponent of a likelihood in an image's row: without it many doubtful candidates outweigh the few sure ones."""


def likelihood_graph(candidates: Tensor, likelihoods: Tensor) -> csr_array:
    """Return the row of each image: its likelihoods to all images to the power of 3, 1 to itself, of unit length.

    A pair that is a candidate in one direction counts in both; of two likelihoods the larger counts.

    Args:
        candidates: `[N, K]`, NN_k padded with -1.
        likelihoods: `[N, K]`, g_ij; values at padding are ignored.

    Returns:
        `[N, N]`, at most 2 K + 1 entries a row on average.
    """
    from scipy.sparse import csr_array, diags_array, eye_array

    num_images = len(candidates)
    rows, columns = (candidates != PADDING).nonzero(as_tuple=True)
    pairs = rows.numpy(force=True), candidates[rows, columns].numpy(force=True)
    one_way = csr_array((likelihoods[rows, columns].numpy(force=True), pairs), (num_images, num_images))
    own = eye_array(num_images, dtype=one_way.dtype, format="csr")
    weights = one_way.maximum(one_way.T).maximum(own).power(POWER)
    lengths = np.sqrt(weights.power(2).sum(1))
    return csr_array(diags_array(1 / lengths, dtype=weights.dtype) @ weights)


class Agreements(NamedTuple):
    """The agreements of B consecutive images with all that share a likely image with them, in order of the ids."""

    rows: Tensor
    """int64 `[E]`, 0..B-1, ascending."""
    ids: Tensor
    """int64 `[E]`, ascending within a row."""
    values: Tensor
    """`[E]`, in 0..1."""

    @classmethod
    def of_block(cls, graph: csr_array, transposed: csr_array, block: slice) -> Agreements:
        """Multiply the rows `block` of a graph with the columns of its transpose."""
        found = graph[block] @ transposed
        found.sort_indices()
        rows, ids = found.tocoo().coords
        return cls(*(torch.from_numpy(part) for part in (rows.astype(np.int64), ids.astype(np.int64), found.data)))

    def above(self, mu: float, own: Tensor) -> tuple[Tensor, Tensor]:
        """List for the images `own` `[B]` themselves and the images of an agreement above mu.

        Returns:
            Ids `[B, W]`, ascending and padded with -1, and their agreements.
        """
        is_taken = (self.values > mu) | (self.ids == own[self.rows])
        return pad_rows(self.rows[is_taken], self.ids[is_taken], self.values[is_taken], num_rows=len(own))

    def at(self, lists: Tensor, num_images: int) -> Tensor:
        """Return the agreements with listed images, ids `[B, K]`; 0 where there is none and at padding."""
        keys, first = self.rows * num_images + self.ids, torch.arange(len(lists))[:, None] * num_images
        places = torch.searchsorted(keys, first + lists).clamp(max=len(keys) - 1)
        is_found = (keys[places] == first + lists) & (lists != PADDING)
        return self.values[places].where(is_found, 0)
