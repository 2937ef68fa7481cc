"""k-reciprocal Jaccard distances, re-ranking by them, and alpha query expansion, in blocks that bound the memory.

An image's k-reciprocal set is expanded and its members are weighted; two images are as near as their weighted sets
overlap (Zhong et al., CVPR 2017).
"""

# Q queries, G gallery images, N = Q + G, D feature size, B rows of a block, K list length, H half list length

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mprd.errors import UserError

Features = TypeVar("Features", np.ndarray, Tensor)


class SparseRows(NamedTuple):
    """A sparse matrix in CSR form."""

    indptr: Tensor
    """int64 [rows + 1]; row r holds the entries from indptr[r] to indptr[r + 1]."""
    columns: Tensor
    """int64 [entries], increasing within a row."""
    weights: Tensor
    """float [entries]."""


def re_rank(
    q_features: Features,
    g_features: Features,
    *,
    k1: int = 20,
    k2: int = 6,
    lambda_value: float = 0.3,
    memory_mb: int = 512,
) -> Features:
    """Return the re-ranked distances of Zhong et al. (CVPR 2017), float32 [Q, G].

    Features are [Q, D] and [G, D], used as given; float64 is computed in float64. With d the squared Euclidean
    distance divided by its largest value in the row, the result is `(1 - lambda_value) * Jaccard + lambda_value * d`.
    Besides the features and the result, it holds blocks of about `memory_mb` MB and the sparse neighbor weights.
    An image comes first in its own list; the order of other equal distances is undefined.
    Raise UserError for settings out of range and for empty, unequal or non-finite features.

    >>> import numpy as np
    >>> queries = np.array([[1.0, 0.0]], np.float32)
    >>> gallery = np.array([[0.0, 1.0], [0.8, 0.6], [0.98, 0.2]], np.float32)
    >>> re_rank(queries, gallery, k1=2, k2=1).argsort(1).tolist()  # nearest first
    [[2, 1, 0]]
    """
    if min(k1, k2) < 1 or not 0 <= lambda_value <= 1:
        raise UserError(
            "k1 and k2 must be at least 1 and lambda_value must lie in [0, 1], "
            f"but got k1={k1}, k2={k2}, lambda_value={lambda_value}"
        )
    num_queries, features = len(q_features), _join(q_features, g_features)
    weights, farthest = _encode(features, k1=k1, k2=k2, is_scaled=True, memory_mb=memory_mb)
    distances = torch.empty(num_queries, len(g_features), dtype=torch.float32, device=features.device)
    for rows, jaccard in _jaccard_blocks(weights, num_queries, memory_mb=memory_mb):
        euclidean = _squared_distances(features[rows], features[num_queries:]) / farthest[rows, None]
        distances[rows] = torch.lerp(jaccard, euclidean, lambda_value).float()
    return _like(distances, q_features)


def expand_queries(
    q_features: Features, g_features: Features, *, k: int, alpha: float, memory_mb: int = 512
) -> tuple[Features, Features]:
    """Replace each feature by the mean over its k nearest of feature x cosine^alpha; return queries and gallery.

    The nearest by cosine are taken among queries and gallery together, the image itself included. Neither the averaged
    features nor the results, float [Q, D] and [G, D], are normalized. k above Q + G takes all images. A negative cosine
    has weight 0 under a fractional alpha, where its power is undefined.
    Raise UserError for k < 1, alpha < 0 and for empty, unequal or non-finite features.

    >>> import numpy as np
    >>> queries, gallery = np.array([[1.0, 0.0]]), np.array([[0.6, 0.8]])
    >>> expanded, _ = expand_queries(queries, gallery, k=2, alpha=1)
    >>> np.round(expanded, 2).tolist()  # (1 (1, 0) + .6 (.6, .8)) / 2
    [[0.68, 0.24]]
    """
    if k < 1 or alpha < 0:
        raise UserError(f"k must be at least 1 and alpha at least 0, but got k={k}, alpha={alpha}")
    features = _join(q_features, g_features)
    unit, expanded = normalize(features), torch.empty_like(features)
    num_images, num_features = features.shape
    k = min(k, num_images)
    for rows in _blocks(num_images, features.element_size() * (2 * num_images + k * num_features), memory_mb):
        cosines, ids = (unit[rows] @ unit.T).topk(k)
        powers = cosines.pow(alpha).nan_to_num(0.0)
        expanded[rows] = torch.bmm(powers[:, None], features[ids]).squeeze(1) / k
    return _like(expanded[: len(q_features)], q_features), _like(expanded[len(q_features) :], g_features)


def jaccard_distances(
    features: Tensor, *, k1: int = 30, k2: int = 6, memory_mb: int = 512
) -> Iterator[tuple[slice, Tensor]]:
    """Yield a slice of the images and its k-reciprocal Jaccard distances to all images [B, N], as SpCL clusters by.

    Unlike in `re_rank`, the squared distances d of features [N, D] are not divided by their largest, and lists hold k1
    images with the image itself, one fewer: SpCL's search by faiss returns so many.
    """
    weights, _ = _encode(features, k1=k1, k2=k2, is_scaled=False, memory_mb=memory_mb, length=k1)
    # every image is a query and a gallery image
    indptr = torch.cat([weights.indptr, weights.indptr[1:] + weights.indptr[-1]])
    twice = SparseRows(indptr, weights.columns.repeat(2), weights.weights.repeat(2))
    return _jaccard_blocks(twice, len(features), memory_mb=memory_mb)


def to_tensor(values: np.ndarray | Tensor, name: str) -> Tensor:
    """Return `values` [rows, columns] as detached float32 or float64, copied only if needed."""
    if not isinstance(values, Tensor):
        # torch shares memory only with writable arrays
        values = torch.from_numpy(np.require(values, requirements=["C", "W"]))
    if values.ndim != 2:
        raise UserError(f"{name} must have two dimensions, but got shape {tuple(values.shape)}")
    if not values.is_floating_point():
        return values.double()
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def check_query_gallery(q_features: Tensor, g_features: Tensor) -> None:
    """Raise UserError unless both are non-empty, finite and of one feature size."""
    if q_features.shape[1] != g_features.shape[1]:
        raise UserError(
            f"q_features and g_features must have one feature size, but got {q_features.shape[1]} "
            f"and {g_features.shape[1]}"
        )
    for name, features in (("q_features", q_features), ("g_features", g_features)):
        if features.numel() == 0:
            raise UserError(f"{name} must not be empty, but got shape {tuple(features.shape)}")
        # a finite sum proves that all are finite; a sum that overflows needs the full check
        if not features.sum().isfinite() and not features.isfinite().all():
            raise UserError(f"{name} must be finite, but hold NaN or infinity")


def _join(q_features: np.ndarray | Tensor, g_features: np.ndarray | Tensor) -> Tensor:
    queries, gallery = to_tensor(q_features, "q_features"), to_tensor(g_features, "g_features")
    check_query_gallery(queries, gallery)
    return torch.cat([queries, gallery.to(queries.device)])


def _like(values: Tensor, given: Features) -> Features:
    return values if isinstance(given, Tensor) else values.numpy()


def _blocks(num_rows: int, bytes_per_row: int, memory_mb: int) -> Iterator[slice]:
    size = max(1, memory_mb * 2**20 // max(1, bytes_per_row))
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _encode(
    features: Tensor, *, k1: int, k2: int, is_scaled: bool, memory_mb: int, length: int | None = None
) -> tuple[SparseRows, Tensor]:
    """Return each image's weights of its expanded k-reciprocal set, [N, N], and its largest squared distance, [N].

    A member at squared distance d weighs exp(-d), or exp(-d / largest d) if scaled. Lists hold the image and its k1
    nearest; `length` cuts them to so many in all.
    """
    num_nearest = max(k1 + 1 if length is None else length, k2)
    nearest, farthest = _find_nearest(features, min(num_nearest, len(features)), memory_mb=memory_mb)
    parts = zip(*_expand_reciprocal(nearest, k1, memory_mb=memory_mb), strict=True)
    images, members = (torch.cat(ids) for ids in parts)
    scale = farthest if is_scaled else torch.ones_like(farthest)
    weights = _weigh(features, scale, images, members, memory_mb=memory_mb)
    if k2 > 1:
        weights = _average_rows(weights, nearest[:, :k2], memory_mb=memory_mb)
    return weights, farthest


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return squares.addmm_(a, b.T, alpha=-2).clamp_(min=0)


def _find_nearest(features: Tensor, num_nearest: int, *, memory_mb: int) -> tuple[Tensor, Tensor]:
    """Return each image's nearest, itself first, int64 [N, num_nearest], and its largest squared distance [N]."""
    num_images = len(features)
    nearest = torch.empty(num_images, num_nearest, dtype=torch.int64, device=features.device)
    farthest = features.new_empty(num_images)
    for rows in _blocks(num_images, 3 * num_images * features.element_size(), memory_mb):
        distances = _squared_distances(features[rows], features)
        farthest[rows] = distances.amax(1)
        distances[:, rows].fill_diagonal_(-1)  # sorts an image before its exact copies
        nearest[rows] = distances.topk(num_nearest, largest=False).indices
    # if all features are equal, every distance is 0, and 0 / tiny stays 0
    return nearest, farthest.clamp(min=torch.finfo(farthest.dtype).tiny)


def _expand_reciprocal(nearest: Tensor, k1: int, *, memory_mb: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield sorted (image, member) ids of the expanded k1-reciprocal set of every image.

    The set of i is its k1-reciprocal neighbors R(i) and the k1/2-reciprocal neighbors of those members c for which
    more than two thirds of R(c, k1/2) lie in R(i).
    """
    num_images = len(nearest)
    lists, half_lists = nearest[:, : k1 + 1], nearest[:, : round(k1 / 2) + 1]
    is_mutual, is_half_mutual = _is_mutual(lists, memory_mb), _is_mutual(half_lists, memory_mb)
    for rows in _blocks(num_images, 4 * num_images + 64 * lists.shape[1] * half_lists.shape[1], memory_mb):
        is_member = torch.zeros(rows.stop - rows.start, num_images, dtype=torch.bool, device=nearest.device)
        is_member.scatter_(1, lists[rows], is_mutual[rows])
        others, is_other = half_lists[lists[rows]], is_half_mutual[lists[rows]]  # [B, K, H]
        is_shared = is_member.gather(1, others.flatten(1)).view_as(is_other) & is_other
        is_taken = is_mutual[rows] & (3 * is_shared.sum(2) > 2 * is_other.sum(2))
        row, position, half_position = (is_taken[:, :, None] & is_other).nonzero(as_tuple=True)
        is_member[row, others[row, position, half_position]] = True
        row, member = is_member.nonzero(as_tuple=True)
        yield row + rows.start, member


def _is_mutual(lists: Tensor, memory_mb: int) -> Tensor:
    """Return for each listed neighbor whether its own list holds the image, bool [N, K]."""
    num_images, length = lists.shape
    is_mutual = torch.empty_like(lists, dtype=torch.bool)
    for rows in _blocks(num_images, 9 * length * length, memory_mb):
        images = torch.arange(rows.start, rows.stop, device=lists.device)
        is_mutual[rows] = (lists[lists[rows]] == images[:, None, None]).any(2)
    return is_mutual


def _weigh(features: Tensor, scale: Tensor, images: Tensor, members: Tensor, *, memory_mb: int) -> SparseRows:
    """Weight each member of an image's set by exp(-d / scale), normalized to sum 1 over the set; `scale` is [N]."""
    num_images, num_features = features.shape
    weights = features.new_empty(len(images))
    for part in _blocks(len(images), 3 * num_features * features.element_size(), memory_mb):
        weights[part] = (features[images[part]] - features[members[part]]).square_().sum(1)
    weights.div_(scale[images]).neg_().exp_()
    sums = features.new_zeros(num_images).index_add_(0, images, weights)
    return SparseRows(_row_starts(images, num_images), members, weights / sums[images])


def _average_rows(sparse: SparseRows, lists: Tensor, *, memory_mb: int) -> SparseRows:
    """Replace row i by the mean of the rows in lists[i] (local query expansion)."""
    num_rows, length = lists.shape
    most = int(sparse.indptr.diff().max())
    rows_of, columns, weights = [], [], []
    for rows in _blocks(num_rows, num_rows * sparse.weights.element_size() * 2 + 64 * length * most, memory_mb):
        owner, entry = _entries_of(sparse.indptr, lists[rows].flatten())
        dense = sparse.weights.new_zeros((rows.stop - rows.start) * num_rows)
        dense.index_add_(0, owner // length * num_rows + sparse.columns[entry], sparse.weights[entry] / length)
        found = dense.nonzero().squeeze(1)
        rows_of.append(found // num_rows + rows.start)
        columns.append(found % num_rows)
        weights.append(dense[found])
    return SparseRows(_row_starts(torch.cat(rows_of), num_rows), torch.cat(columns), torch.cat(weights))


def _jaccard_blocks(sparse: SparseRows, num_queries: int, *, memory_mb: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield a slice of queries and its Jaccard distances to the gallery, 1 - m / (2 - m) with m the sum of minima.

    An inverted index finds the gallery entries of a column, so the work grows with shared neighbors only.
    """
    num_images = len(sparse.indptr) - 1
    num_gallery, first = num_images - num_queries, int(sparse.indptr[num_queries])
    order = sparse.columns[first:].argsort(stable=True)
    gallery_ids = torch.repeat_interleave(torch.arange(num_images, device=order.device), sparse.indptr.diff())
    gallery_ids, gallery_weights = gallery_ids[first:][order] - num_queries, sparse.weights[first:][order]
    starts = _row_starts(sparse.columns[first:][order], num_images)
    # gallery entries that share a column with each query's entries, which bound the block size
    met = torch.cat([starts.new_zeros(1), starts.diff()[sparse.columns[:first]].cumsum(0)])
    most = int(met[sparse.indptr[: num_queries + 1]].diff().max())
    for rows in _blocks(num_queries, 3 * num_gallery * sparse.weights.element_size() + 64 * most, memory_mb):
        owner, mine = _entries_of(sparse.indptr, torch.arange(rows.start, rows.stop, device=order.device))
        column_owner, theirs = _entries_of(starts, sparse.columns[mine])
        minima = torch.minimum(sparse.weights[mine][column_owner], gallery_weights[theirs])
        overlap = sparse.weights.new_zeros((rows.stop - rows.start) * num_gallery)
        overlap.index_add_(0, owner[column_owner] * num_gallery + gallery_ids[theirs], minima)
        yield rows, (1 - overlap / (2 - overlap)).view(-1, num_gallery)


def _entries_of(indptr: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return, for all entries of `rows` in order, the index of their row within `rows` and their own index."""
    counts = indptr[rows + 1] - indptr[rows]
    owner = torch.repeat_interleave(torch.arange(len(rows), device=rows.device), counts)
    before = counts.cumsum(0) - counts
    return owner, torch.arange(len(owner), device=rows.device) + (indptr[rows] - before)[owner]


def _row_starts(sorted_rows: Tensor, num_rows: int) -> Tensor:
    return torch.searchsorted(sorted_rows, torch.arange(num_rows + 1, device=sorted_rows.device))
