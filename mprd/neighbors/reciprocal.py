"""J, the k-reciprocal Jaccard similarity on the camera-corrected similarity c: a training-free pair score.

The sets of Zhong et al. (CVPR 2017) are built from lists by c, and members weigh exp(c) in place of exp(-distance).
Not in the paper. All work is on the sparse graph: N x K in, the pairs that share a member out, on the CPU.
Shapes: N images, K list width, E entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mprd.neighbors.exact import PADDING
from mprd.neighbors.graph import SimilarityGraph

if TYPE_CHECKING:
    from scipy.sparse import csr_array

K1, K2 = 20, 6
"""Sizes of the lists that sets are built from and averaged over: the authors' values."""
LEAST = 0.02
"""Similarities that are not above this are left out of the table."""
TERMS_AT_ONCE = 2**22
"""Minima held at a time, unless one row has more."""


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
    parts = [*jaccard_blocks(reciprocal_weights(graph, k1=k1, k2=k2))]
    keys, values = (torch.from_numpy(np.concatenate(part)).to(device) for part in zip(*parts, strict=True))
    return SimilarityTable(keys, values.float(), num_images)


def reciprocal_weights(graph: SimilarityGraph, *, k1: int, k2: int) -> csr_array:
    """Return the weights of each image's expanded k-reciprocal set, `[N, N]` with rows that sum to 1.

    The set of i is its k1-reciprocal neighbors R(i) and the k1/2-reciprocal neighbors of those members m for which
    more than two thirds of R(m, k1/2) lie in R(i). Member j weighs exp(c_ij), i itself exp(largest c of any pair). A
    row is then replaced by the mean of the rows of its k2 nearest, itself among them (local query expansion).
    """
    from scipy.sparse import csr_array, diags_array

    num_images = len(graph)
    k1 = min(k1, num_images - 1)
    near = np.concatenate([np.arange(num_images)[:, None], graph.ids[:, : max(k1, k2 - 1)].numpy(force=True)], axis=1)
    members, half = mutual(near[:, : k1 + 1]), mutual(near[:, : round(k1 / 2) + 1])
    shared = members.multiply(members @ half).tocoo()
    is_taken = 3 * shared.data > 2 * half.sum(1)[shared.col]
    taken = csr_array((shared.data[is_taken] > 0, (shared.row[is_taken], shared.col[is_taken])), members.shape)
    expanded = (members + taken.astype(np.float32) @ half).tocoo()
    rows, columns = (torch.from_numpy(ids.astype(np.int64)).to(graph.ids.device) for ids in expanded.coords)
    similarities = graph.between(rows, columns).where(rows != columns, graph.scores.max()).numpy(force=True)
    weights = csr_array((np.exp(similarities.astype(np.float64)), expanded.coords), members.shape)
    weights = diags_array(1 / weights.sum(1)) @ weights
    averaging = list_matrix(near[:, :k2])
    return (diags_array(1 / averaging.sum(1)) @ averaging @ weights).tocsr()


def mutual(lists: np.ndarray) -> csr_array:
    """Return which images of each list hold the image in their own list, 1 or 0, `[N, N]`."""
    is_listed = list_matrix(lists)
    return is_listed.multiply(is_listed.T).tocsr()


def list_matrix(lists: np.ndarray) -> csr_array:
    """Return lists `[N, K]`, padded with -1, as a matrix `[N, N]` of 1 and 0."""
    from scipy.sparse import csr_array

    rows, places = np.nonzero(lists != PADDING)
    entries = (np.ones(len(rows), np.float32), (rows, lists[rows, places]))
    return csr_array(entries, shape=(len(lists), len(lists)))


def jaccard_blocks(weights: csr_array) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the pairs i < j above LEAST, as keys i N + j ascending and J: sum of minima over sum of maxima of rows.

    Rows sum to 1, so J = m / (2 - m) with m the sum of minima. By columns, an entry meets those of later rows: the
    work grows with the pairs that share a member.
    """
    num_images = weights.shape[0]
    by_column = weights.tocsc()
    by_column.sort_indices()
    rows, values = by_column.indices.astype(np.int64), by_column.data
    # entries in the order of rows, each with its place among the entries by column
    order = np.argsort(rows, kind="stable")
    ends = np.repeat(by_column.indptr[1:].astype(np.int64), np.diff(by_column.indptr))[order]
    counts = ends - order - 1
    starts = np.searchsorted(rows[order], np.arange(num_images + 1))
    terms = np.concatenate([[0], counts.cumsum()])[starts]
    first = 0
    while first < num_images:
        last = int(np.searchsorted(terms, terms[first] + TERMS_AT_ONCE, side="right")) - 1
        stop = min(max(last, first + 1), num_images)
        block = slice(starts[first], starts[stop])
        minima = sums_of_minima(order[block], counts[block], terms[first : stop + 1] - terms[first], rows, values)
        # m / (2 - m) > LEAST
        minima.data *= minima.data > 2 * LEAST / (1 + LEAST)
        minima.eliminate_zeros()
        minima.sort_indices()
        own = np.repeat(np.arange(first, stop), np.diff(minima.indptr))
        yield own * num_images + minima.indices, minima.data / (2 - minima.data)
        first = stop


def sums_of_minima(
    entries: np.ndarray, counts: np.ndarray, indptr: np.ndarray, rows: np.ndarray, values: np.ndarray
) -> csr_array:
    """Return the sums of minima of B consecutive rows with later rows, `[B, N]`, from their entries by column.

    Each entry meets the next `counts` ones of its column; row b has `indptr[b + 1] - indptr[b]` such terms.
    """
    from scipy.sparse import csr_array, eye_array

    num_images = int(rows.max()) + 1
    mine = np.repeat(entries, counts)
    theirs = mine + 1 + np.arange(len(mine)) - np.repeat(counts.cumsum() - counts, counts)
    terms = (np.minimum(values[mine], values[theirs]), rows[theirs], indptr)
    # the product adds terms of one pair, in their order
    return csr_array(terms, shape=(len(indptr) - 1, num_images)) @ eye_array(num_images, format="csr")
