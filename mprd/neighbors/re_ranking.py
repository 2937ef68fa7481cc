"""Re-ranking by k-reciprocal Jaccard distances (Zhong et al., CVPR 2017), and alpha query expansion."""

# Q queries, G gallery images, N = Q + G, D feature size, B rows of a block, K list length, E members of all sets

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mprd.errors import UserError
from mprd.neighbors.exact import rows_at_once
from mprd.neighbors.jaccard import average_weights, jaccard_blocks, reciprocal_sets

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Features = TypeVar("Features", np.ndarray, Tensor)
ENTRIES_AT_ONCE = 2**24
"""Feature entries of differences held at a time."""


def re_rank(
    q_features: Features, g_features: Features, *, k1: int = 20, k2: int = 6, lambda_value: float = 0.3
) -> Features:
    """Return the re-ranked distances of Zhong et al. (CVPR 2017), float32 [Q, G].

    Features are [Q, D] and [G, D], used as given; float64 is computed in float64. With d the squared Euclidean
    distance divided by its largest value in the row, the result is `(1 - lambda_value) * Jaccard + lambda_value * d`.
    Besides the features and the result, memory holds blocks of distances and the sparse weights of neighbors.
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
    lists, farthest = find_nearest(features, max(k1 + 1, k2))
    weights = distance_weights(features, lists, k1=k1, k2=k2, scale=farthest)
    distances = torch.empty(num_queries, len(g_features), dtype=torch.float32, device=features.device)
    for rows in _blocks(num_queries, features):
        euclidean = squared_distances(features[rows], features[num_queries:]) / farthest[rows, None]
        distances[rows] = lambda_value * euclidean + (1 - lambda_value)
    for first, second, jaccard in jaccard_blocks(weights, least=0, num_rows=num_queries):
        is_gallery = second >= num_queries
        ids = (torch.from_numpy(ids[is_gallery]).to(features.device) for ids in (first, second - num_queries))
        near = torch.from_numpy(jaccard[is_gallery]).to(distances)
        distances.index_put_(tuple(ids), -(1 - lambda_value) * near, accumulate=True)
    return _like(distances, q_features)


def expand_queries(q_features: Features, g_features: Features, *, k: int, alpha: float) -> tuple[Features, Features]:
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
    k = min(k, len(features))
    for rows in _blocks(len(features), features):
        cosines, ids = (unit[rows] @ unit.T).topk(k)
        powers = cosines.pow(alpha).nan_to_num(0.0)
        # the k features of each row at once would take k D entries, whatever the block
        weights = features.new_zeros(len(ids), len(features)).scatter_(1, ids, powers)
        expanded[rows] = weights @ features / k
    return _like(expanded[: len(q_features)], q_features), _like(expanded[len(q_features) :], g_features)


def distance_weights(features: Tensor, lists: Tensor, *, k1: int, k2: int, scale: Tensor | None = None) -> csr_array:
    """Weight the members of each image's k-reciprocal set by exp(-d / scale), d their squared distance.

    Args:
        features: `[N, D]`.
        lists: int64 `[N, K]`, each image itself and its nearest; k1 + 1 columns count.
        scale: `[N]`; 1 by default.

    Returns:
        Float64 `[N, N]`, rows of sum 1, averaged over the first k2 of each list.
    """
    near = lists.numpy(force=True)
    sets = reciprocal_sets(near, k1)
    images, members = (torch.from_numpy(ids.astype(np.int64)).to(features.device) for ids in sets.coords)
    size = max(1, ENTRIES_AT_ONCE // features.shape[1])
    parts = zip(images.split(size), members.split(size), strict=True)
    distances = torch.cat([(features[i] - features[j]).square_().sum(1) for i, j in parts])
    if scale is not None:
        distances /= scale[images]
    return average_weights(sets, distances.neg_().exp_().numpy(force=True), near[:, :k2])


def find_nearest(features: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return each image and its nearest, int64 `[N, min(width, N)]`, and its largest squared distance `[N]`."""
    lists = torch.empty(len(features), min(width, len(features)), dtype=torch.int64, device=features.device)
    farthest = features.new_empty(len(features))
    for rows in _blocks(len(features), features):
        distances = squared_distances(features[rows], features)
        farthest[rows] = distances.amax(1)
        distances[:, rows].fill_diagonal_(-1)  # sorts an image before its exact copies
        lists[rows] = distances.topk(lists.shape[1], largest=False).indices
    # if all features are equal, every distance is 0, and 0 / tiny stays 0
    return lists, farthest.clamp(min=torch.finfo(farthest.dtype).tiny)


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """Return the squared Euclidean distances of rows, `[A, B]`."""
    squares = a.square().sum(1, keepdim=True) + b.square().sum(1)
    return squares.addmm_(a, b.T, alpha=-2).clamp_(min=0)


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


def _blocks(num_rows: int, features: Tensor) -> Iterator[slice]:
    size = rows_at_once(len(features), features.device)
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
