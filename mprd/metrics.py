"""CMC, mAP and mINP under the Market-1501 protocol, from distances or from features; re-ranking and query expansion."""

# Q queries, G gallery images, D feature size, B queries of a block, W maximum of their identities' gallery images

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mprd.errors import UserError
from mprd.neighbors.re_ranking import check_query_gallery, expand_queries, re_rank, to_tensor

__all__ = ["RankMetrics", "expand_queries", "rank_features", "rank_metrics", "re_rank"]

JUNK_PID = -1
_CHUNK = 2**22  # distances ranked at a time: 16 MB of float32


@dataclass(frozen=True, eq=False)
class RankMetrics:
    """Retrieval figures of the queries; all fractions in [0, 1]."""

    cmc: np.ndarray
    """float64 [min(max_rank, G without junk)]; entry r is the share of queries with a match among the first r + 1."""
    mAP: float  # noqa: N815
    """Mean over the valid queries of the mean over matches of n / rank of the n-th match."""
    mAP_trapezoid: float  # noqa: N815
    """As mAP, with n / rank averaged with (n - 1) / (rank - 1), which is 1 for a match at rank 1."""
    mINP: float  # noqa: N815
    """Mean over the valid queries of the number of matches / rank of the last match."""
    num_valid_queries: int
    """Queries with at least one match; the others are ignored."""
    average_precisions: np.ndarray
    """float64 [num_valid_queries], the terms of mAP in query order."""
    inverse_penalties: np.ndarray
    """float64 [num_valid_queries], the terms of mINP in query order."""


def rank_metrics(
    distances: np.ndarray | Tensor,
    q_pids: np.ndarray | Tensor,
    g_pids: np.ndarray | Tensor,
    q_camids: np.ndarray | Tensor,
    g_camids: np.ndarray | Tensor,
    *,
    max_rank: int = 50,
) -> RankMetrics:
    """Rank the gallery for every query by `distances` [Q, G], on their device.

    Gallery images with pid -1 (junk) are dropped, pid 0 (distractors) is kept, and per query the gallery images of
    the same pid and camera are removed. Equal distances rank in the order of the gallery index. Distances that are
    not float32 or float64 are converted. Raise UserError for sizes that do not fit, an empty query or gallery,
    distances that are not finite, and when no query has a match.

    >>> import numpy as np
    >>> distances = np.array([[0.1, 0.2, 0.3, 0.4]])
    >>> q_pids, g_pids = np.array([1]), np.array([1, 2, 1, 1])
    >>> q_camids, g_camids = np.array([1]), np.array([1, 1, 2, 2])
    >>> metrics = rank_metrics(distances, q_pids, g_pids, q_camids, g_camids)
    >>> round(metrics.mAP, 4)  # the first image is of the query's camera; matches at ranks 2 and 3: (1/2 + 2/3) / 2
    0.5833
    >>> metrics.cmc.tolist()  # Rank-1, Rank-2, ...
    [0.0, 1.0, 1.0, 1.0]
    """
    distances = to_tensor(distances, "distances")
    ids = _check_ids(q_pids, g_pids, q_camids, g_camids, device=distances.device)
    if distances.shape != (len(ids.q_pids), len(ids.g_pids)):
        raise UserError(
            f"distances must be queries x gallery, ({len(ids.q_pids)}, {len(ids.g_pids)}) by the pids, "
            f"but got {tuple(distances.shape)}"
        )
    is_kept = ids.g_pids != JUNK_PID
    blocks: Iterable[Tensor] = distances.split(max(1, _CHUNK // distances.shape[1]))
    if not is_kept.all():
        blocks = (block[:, is_kept] for block in blocks)
    return _summarize(blocks, ids, max_rank=max_rank)


def rank_features(
    q_features: np.ndarray | Tensor,
    g_features: np.ndarray | Tensor,
    q_pids: np.ndarray | Tensor,
    g_pids: np.ndarray | Tensor,
    q_camids: np.ndarray | Tensor,
    g_camids: np.ndarray | Tensor,
    *,
    max_rank: int = 50,
    memory_mb: int = 512,
) -> RankMetrics:
    """Rank the gallery for every query by cosine, from unit features [Q, D] and [G, D]; rules as in rank_metrics.

    Needs about `memory_mb` MB beside the features, and at least one query's distances.

    >>> import numpy as np
    >>> gallery = np.array([[0.0, 1.0], [0.6, 0.8]])
    >>> metrics = rank_features(gallery[:1], gallery, [5], [5, 5], [1], [1, 2])
    >>> metrics.mAP, metrics.num_valid_queries
    (1.0, 1)
    """
    queries = to_tensor(q_features, "q_features")
    gallery = to_tensor(g_features, "g_features").to(queries)
    ids = _check_ids(q_pids, g_pids, q_camids, g_camids, device=queries.device)
    if (len(queries), len(gallery)) != (len(ids.q_pids), len(ids.g_pids)):
        raise UserError(
            f"there must be a pid for every feature, but got {len(queries)} and {len(gallery)} features "
            f"for {len(ids.q_pids)} and {len(ids.g_pids)} pids"
        )
    check_query_gallery(queries, gallery)
    is_kept = ids.g_pids != JUNK_PID
    if not is_kept.all():
        gallery = gallery[is_kept]
    return _summarize(_distance_blocks(queries, gallery, memory_mb=memory_mb), ids, max_rank=max_rank)


class _Ids(NamedTuple):
    q_pids: Tensor
    g_pids: Tensor
    q_camids: Tensor
    g_camids: Tensor


class _Groups(NamedTuple):
    """The gallery without junk, grouped by identity, and the group of each query's identity."""

    order: Tensor
    """int64 [G], gallery ids sorted by pid, then by id."""
    starts: Tensor
    """int64 [Q]."""
    counts: Tensor
    """int64 [Q]."""
    q_camids: Tensor
    g_camids: Tensor


class _Scores(NamedTuple):
    """Figures of the valid queries of a block, float64 `[valid]` each; `first_rank` is that of the first match."""

    precision: Tensor
    trapezoid: Tensor
    inverse_penalty: Tensor
    first_rank: Tensor


def _check_ids(*given: np.ndarray | Tensor, device: torch.device) -> _Ids:
    arrays = [values.cpu().numpy() if isinstance(values, Tensor) else np.asarray(values) for values in given]
    for name, values in zip(_Ids._fields, arrays, strict=True):
        if values.ndim != 1 or (values.size and values.dtype.kind not in "iu"):
            raise UserError(f"{name} must be a list of whole numbers, but got {values.dtype} {values.shape}")
    ids = _Ids(*(torch.tensor(values.astype(np.int64), device=device) for values in arrays))
    for side, pids, camids in (("query", ids.q_pids, ids.q_camids), ("gallery", ids.g_pids, ids.g_camids)):
        if len(pids) != len(camids):
            raise UserError(f"{side}: every pid needs a camid, but got {len(pids)} pids and {len(camids)} camids")
        if (pids == JUNK_PID).all():
            raise UserError(f"{side} must hold an image with a pid other than -1 (junk), but got {len(pids)} images")
    return ids


def _distance_blocks(queries: Tensor, gallery: Tensor, *, memory_mb: int) -> Iterator[Tensor]:
    """Yield the negative cosines `[B, G]` of blocks of queries, in a buffer that is reused."""
    num_queries, num_gallery = len(queries), len(gallery)
    # a quarter of the memory, because ranking a block needs about three times its size
    num_rows = min(num_queries, max(1, memory_mb * 2**20 // (4 * num_gallery * queries.element_size())))
    buffer = queries.new_empty(num_rows, num_gallery)
    for block in queries.split(num_rows):
        distances = torch.mm(-block, gallery.T, out=buffer[: len(block)])
        yield from distances.split(max(1, min(_CHUNK // num_gallery, num_rows)))


def _summarize(blocks: Iterable[Tensor], ids: _Ids, *, max_rank: int) -> RankMetrics:
    if max_rank < 1:
        raise UserError(f"max_rank must be at least 1, but got {max_rank}")
    groups, scores, start = _group(ids), [], 0
    for distances in blocks:
        scores.append(_score(distances, groups, start))
        start += len(distances)
    precision, trapezoid, inverse_penalty, first_rank = (torch.cat(x).cpu().numpy() for x in zip(*scores, strict=True))
    if not len(precision):
        raise UserError(
            f"no query has a match: none of the {len(ids.q_pids)} queries' pids is in the gallery under another camera"
        )
    ranks = np.arange(1, min(max_rank, len(groups.order)) + 1)
    return RankMetrics(
        cmc=np.searchsorted(np.sort(first_rank), ranks, side="right") / len(first_rank),
        mAP=float(precision.mean()),
        mAP_trapezoid=float(trapezoid.mean()),
        mINP=float(inverse_penalty.mean()),
        num_valid_queries=len(precision),
        average_precisions=precision,
        inverse_penalties=inverse_penalty,
    )


def _group(ids: _Ids) -> _Groups:
    is_kept = ids.g_pids != JUNK_PID
    g_pids, order = ids.g_pids[is_kept].sort(stable=True)
    starts = torch.searchsorted(g_pids, ids.q_pids)
    counts = torch.searchsorted(g_pids, ids.q_pids, right=True) - starts
    return _Groups(order, starts, counts, ids.q_camids, ids.g_camids[is_kept])


def _score(distances: Tensor, groups: _Groups, start: int) -> _Scores:
    """Score the queries from `start` on, given their distances, float [B, G]; other tensors are [B, W].

    Only the images of the query's own identity are ranked: the rank of a match is 1 plus the number of closer gallery
    images, minus the removed ones among them, and needs no ordering of the gallery.
    """
    rows = slice(start, start + len(distances))
    counts = groups.counts[rows]
    positions = torch.arange(max(1, int(counts.max())), device=counts.device)
    is_own = positions < counts[:, None]
    own = groups.order[(groups.starts[rows, None] + positions).clamp(max=len(groups.order) - 1)]
    own_distances = distances.gather(1, own).masked_fill(~is_own, torch.inf)
    # stable, and `own` is ascending: equal distances stay in the order of the gallery index
    own_distances, by_distance = own_distances.sort(dim=1, stable=True)
    own, is_own = own.gather(1, by_distance), is_own.gather(1, by_distance)
    is_match = is_own & (groups.g_camids[own] != groups.q_camids[rows, None])
    num_closer = _count_closer(distances, own_distances, own, is_own)
    ranks = 1 + num_closer - (is_own & ~is_match).cumsum(1)
    return _average(ranks, is_match)


def _count_closer(distances: Tensor, own_distances: Tensor, own: Tensor, is_own: Tensor) -> Tensor:
    """Return the number of gallery images before each of the query's own by (distance, gallery index), int64 [B, W]."""
    ordered = _sort_rows(distances)
    if not torch.isfinite(ordered[:, [0, -1]]).all():
        raise UserError("distances must be finite, but hold NaN or infinity")
    num_closer = torch.searchsorted(ordered, own_distances)
    num_equal = torch.searchsorted(ordered, own_distances, right=True) - num_closer
    return num_closer + _count_equal_before(distances, own_distances, own, is_own & (num_equal > 1))


def _sort_rows(distances: Tensor) -> Tensor:
    """Sort each row; on the CPU by NumPy, whose vectorized sort is faster than torch's."""
    if distances.device.type == "cpu":
        return torch.from_numpy(np.sort(distances.numpy(), axis=1))
    return distances.sort(dim=1).values


def _count_equal_before(distances: Tensor, own_distances: Tensor, own: Tensor, is_tied: Tensor) -> Tensor:
    """Return for each tied image the number of equally distant ones with a lower gallery index; 0 for the others."""
    num_before = torch.zeros_like(own)
    while is_tied.any():
        rows = is_tied.any(1).nonzero().squeeze(1)
        # per tied row one distance at a time, the first that is left
        value = own_distances[rows].gather(1, is_tied[rows].int().argmax(1, keepdim=True))
        is_same = is_tied[rows] & (own_distances[rows] == value)
        num_upto = (distances[rows] == value).cumsum(1, dtype=torch.int32)
        num_before[rows] += (num_upto.gather(1, own[rows]) - 1) * is_same
        is_tied = is_tied.index_put((rows,), is_tied[rows] & ~is_same)
    return num_before


def _average(ranks: Tensor, is_match: Tensor) -> _Scores:
    """Return the scores of the queries that have a match, from the ascending ranks (from 1) of their matches."""
    is_valid = is_match.any(1)
    # only a removed image can have rank 0
    ranks, is_match = ranks[is_valid].clamp(min=1).double(), is_match[is_valid]
    nth = is_match.cumsum(1)
    num_matches = nth[:, -1]
    precision = nth / ranks
    # before rank 1 nothing is retrieved, and precision is 1
    earlier = torch.where(ranks > 1, (nth - 1) / (ranks - 1).clamp(min=1), 1.0)
    return _Scores(
        precision=(precision * is_match).sum(1) / num_matches,
        trapezoid=((precision + earlier) / 2 * is_match).sum(1) / num_matches,
        inverse_penalty=num_matches / (ranks * is_match).amax(1),
        first_rank=ranks.masked_fill(~is_match, torch.inf).amin(1),
    )
