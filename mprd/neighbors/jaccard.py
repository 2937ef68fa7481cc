"""Jaccard similarities of expanded k-reciprocal sets (Zhong et al., CVPR 2017), on sparse matrices, on the CPU.

An image's set holds the images that list each other with it, and the sets of those among them that lie mostly within.
Its members are weighted, and two images are as near as their weights overlap. How images are listed and members
weighed is the caller's: by c for J (`reciprocal`), by Euclidean distances for re-ranking and DBSCAN (`re_ranking`).
Shapes: N images, K list width, E entries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from mprd.neighbors.exact import PADDING

if TYPE_CHECKING:
    from scipy.sparse import coo_array, csr_array

TERMS_AT_ONCE = 2**22
"""Minima held at a time, unless one row has more."""


def reciprocal_sets(lists: np.ndarray, k1: int) -> coo_array:
    """Return the members of each image's expanded k-reciprocal set, the non-zero entries of `[N, N]`.

    The set of i is its k1-reciprocal neighbors R(i) and the k1/2-reciprocal neighbors of those members m for which
    more than two thirds of R(m, k1/2) lie in R(i).

    Args:
        lists: int `[N, K]`, the image itself first, then its nearest, padded with -1; k1 + 1 columns count.
    """
    from scipy.sparse import csr_array

    members, half = mutual(lists[:, : k1 + 1]), mutual(lists[:, : round(k1 / 2) + 1])
    shared = members.multiply(members @ half).tocoo()
    is_taken = 3 * shared.data > 2 * half.sum(1)[shared.col]
    taken = csr_array((shared.data[is_taken] > 0, (shared.row[is_taken], shared.col[is_taken])), members.shape)
    return (members + taken.astype(np.float32) @ half).tocoo()


def average_weights(sets: coo_array, weights: np.ndarray, lists: np.ndarray) -> csr_array:
    """Normalize the weights `[E]` of the members of each set to sum 1, and average over lists: float64 `[N, N]`.

    Row i becomes the mean of the rows of `lists` `[N, k2]`, i itself among them (local query expansion).
    """
    from scipy.sparse import csr_array, diags_array

    matrix = csr_array((weights.astype(np.float64), sets.coords), sets.shape)
    matrix = diags_array(1 / matrix.sum(1)) @ matrix
    averaging = list_matrix(lists)
    return (diags_array(1 / averaging.sum(1, dtype=np.float64)) @ averaging @ matrix).tocsr()


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


def jaccard_blocks(
    weights: csr_array, *, least: float, num_rows: int | None = None
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Yield the pairs i < j above `least`, ascending, and J: sum of minima over sum of maxima of their rows.

    Rows sum to 1, so J = m / (2 - m) with m the sum of minima. By columns, an entry meets those of later rows: the
    work grows with the pairs that share a member. `num_rows` stops before that i.
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
    first, end = 0, num_images if num_rows is None else num_rows
    while first < end:
        last = int(np.searchsorted(terms, terms[first] + TERMS_AT_ONCE, side="right")) - 1
        stop = min(max(last, first + 1), end)
        block = slice(starts[first], starts[stop])
        minima = sums_of_minima(order[block], counts[block], terms[first : stop + 1] - terms[first], rows, values)
        # m / (2 - m) > least
        minima.data *= minima.data > 2 * least / (1 + least)
        minima.eliminate_zeros()
        minima.sort_indices()
        own = np.repeat(np.arange(first, stop), np.diff(minima.indptr))
        yield own, minima.indices.astype(np.int64), minima.data / (2 - minima.data)
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
