"""Pictures of a run's features: hard identities by t-SNE (Fig. 5), and the queries with the lowest AP."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mprd.data.datasets import ReidDataset
from mprd.errors import UserError
from mprd.evaluate.evaluation import require_ids
from mprd.metrics import rank_features
from mprd.report.checkpoint import Snapshot

NUM_IDS = 100
"""Identities in the t-SNE picture, as in Fig. 5."""
NUM_COLORED = 12
"""The hardest of these get a color; more colors are hard to distinguish."""
MAX_POINTS = 2000
NUM_QUERIES = 8
NUM_SHOWN = 10
"""Gallery images shown per query."""


@dataclass(frozen=True, eq=False)
class HardIdentities:
    """The identities with the lowest mean AP over runs on the same images, and their images."""

    rows: np.ndarray
    """Their training images, int64 `[n]`."""
    pids: np.ndarray
    """The identities of these, int64 `[n]`."""
    hardest: list[int]
    """Identities that get a color, the hardest first."""
    precisions: list[float]
    """Per run, the mean AP of the colored identities' images among all training images."""

    @property
    def num_ids(self) -> int:
        """Count the identities, with and without a color."""
        return len(np.unique(self.pids))


def identity_precisions(snapshot: Snapshot) -> dict[int, float]:
    """Return the mean AP of each identity's images as queries among all training images, by the memory.

    As in evaluation, matches are images under other cameras; without cameras, all images.
    Raises UserError without identities.
    """
    pids = snapshot.need_pids()
    camids = snapshot.camids()
    if camids is None:
        camids = torch.arange(len(pids), device=pids.device)
    memory = snapshot.memory
    ranked = rank_features(memory, memory, pids, pids, camids, camids)
    numbers, cameras = pids.cpu().numpy(), camids.cpu().numpy()
    valid = numbers[has_match(numbers, numbers, q_camids=cameras, g_camids=cameras)]
    return {int(pid): float(ranked.average_precisions[valid == pid].mean()) for pid in np.unique(valid)}


def has_match(q_pids: np.ndarray, g_pids: np.ndarray, *, q_camids: np.ndarray, g_camids: np.ndarray) -> np.ndarray:
    """Return which queries have an image of their identity under another camera in the gallery, boolean `[Q]`."""
    by_pid = Counter(g_pids.tolist())
    by_both = Counter(zip(g_pids.tolist(), g_camids.tolist(), strict=True))
    queries = zip(q_pids.tolist(), q_camids.tolist(), strict=True)
    return np.array([by_pid[pid] > by_both[pid, camid] for pid, camid in queries], dtype=bool)


def choose_identities(snapshots: Sequence[Snapshot]) -> HardIdentities:
    """Choose the identities with the lowest mean AP over runs on the same images.

    Raises UserError without identities.
    """
    precisions = [identity_precisions(snapshot) for snapshot in snapshots]
    order = sorted(precisions[0], key=lambda pid: sum(each[pid] for each in precisions))
    pids = require_ids(snapshots[0].need_train().pids)
    rows = np.flatnonzero(np.isin(pids, choose_shown(order, pids)))
    hardest = order[:NUM_COLORED]
    return HardIdentities(
        rows, pids[rows], hardest, [float(np.mean([each[pid] for pid in hardest])) for each in precisions]
    )


def choose_shown(order: list[int], pids: np.ndarray) -> list[int]:
    """Take identities in order, at most `NUM_IDS` of them with `MAX_POINTS` images."""
    counts = Counter(pids.tolist())
    total, shown = 0, list[int]()
    for pid in order[:NUM_IDS]:
        total += counts[pid]
        if shown and total > MAX_POINTS:
            break
        shown.append(pid)
    return shown


def embed(snapshot: Snapshot, rows: np.ndarray) -> np.ndarray:
    """Embed the memory rows of training images `[n]` by t-SNE with a fixed seed; return float64 `[n, 2]`.

    Raises UserError for fewer than 5 images, and where all features are equal.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    num_points = len(rows)
    if num_points < 5:
        raise UserError(f"t-SNE needs at least 5 images, but got {num_points}")
    points = snapshot.memory[torch.as_tensor(rows, device=snapshot.model.device)].double().cpu().numpy()
    # scikit-learn's t-SNE divides the first component by its deviation, and crashes on the NaN of equal features
    if not np.ptp(points, axis=0).max() > 1e-6:
        raise UserError("the features of all images are equal")
    if min(points.shape) > 50:
        points = PCA(50, random_state=0).fit_transform(points)
    perplexity = min(30.0, (num_points - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points).astype(np.float64)


@dataclass(frozen=True)
class RankedImage:
    """A gallery image in a ranking."""

    row: int
    """Its index in the gallery."""
    rank: int
    """From 1."""
    cosine: float
    is_right: bool


@dataclass(frozen=True)
class QueryRanking:
    """The gallery as one run ranks it for a query."""

    precision: float
    """AP."""
    first_match: int
    """Rank of the first right image, from 1."""
    num_matches: int
    hits: list[RankedImage]
    """The first `NUM_SHOWN`, then the first right image if it ranks lower."""


@dataclass(frozen=True)
class QueryCase:
    """A query with the ranking of each run."""

    row: int
    """Its index among the queries."""
    rankings: list[QueryRanking]


@dataclass(frozen=True)
class QueryCases:
    """The queries to show of runs on the same images."""

    worst: list[QueryCase]
    """Lowest mean AP over the runs, at most one per identity."""
    changed: list[QueryCase]
    """The largest gains and losses of AP from the first run to the last; empty for one run."""
    mAP: list[float]  # noqa: N815
    """Per run."""
    num_valid: int


class Retriever:
    """Query and gallery features of one run's network."""

    def __init__(self, snapshot: Snapshot) -> None:
        """Extract both; raise UserError where the data set cannot be evaluated."""
        self.dataset = need_evaluation(snapshot)
        self.query, self.gallery = map(snapshot.extract, (self.dataset.query, self.dataset.gallery))
        ids = all_ids(self.dataset)
        # NaN for a query without a match
        self.precisions = np.full(len(ids[0]), np.nan)
        ranked = rank_features(self.query, self.gallery, *ids)
        self.precisions[has_match(ids[0], ids[1], q_camids=ids[2], g_camids=ids[3])] = ranked.average_precisions

    def rank(self, row: int) -> QueryRanking:
        """Rank the gallery for the query of this index."""
        q_pids, g_pids, q_camids, g_camids = all_ids(self.dataset)
        cosines = (self.gallery @ self.query[row]).cpu().numpy()
        is_own, is_here = g_pids == q_pids[row], g_camids == q_camids[row]
        precision = float(self.precisions[row])
        return rank_gallery(cosines, is_own & ~is_here, is_removed=is_own & is_here, precision=precision)


def rank_gallery(
    cosines: np.ndarray, is_match: np.ndarray, *, is_removed: np.ndarray, precision: float
) -> QueryRanking:
    """Rank gallery images, `[G]` each, by cosine without the removed ones; ties go to the lower index."""
    order = np.argsort(-cosines, kind="stable")
    order = order[~is_removed[order]]
    matches = np.flatnonzero(is_match[order])
    first = int(matches[0])
    ranks = [*range(min(NUM_SHOWN, len(order))), *([first] if first >= NUM_SHOWN else [])]
    hits = [RankedImage(int(order[at]), at + 1, float(cosines[order[at]]), bool(is_match[order[at]])) for at in ranks]
    return QueryRanking(precision, first + 1, len(matches), hits)


def need_evaluation(snapshot: Snapshot) -> ReidDataset:
    """Return the data set; raise UserError where it cannot be evaluated."""
    dataset = snapshot.need_dataset()
    if not dataset.can_evaluate:
        raise UserError("the data set has no query and gallery with identities and cameras")
    return dataset


def all_ids(dataset: ReidDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the pids of query and gallery, then their camids."""
    query, gallery = dataset.query, dataset.gallery
    return require_ids(query.pids), require_ids(gallery.pids), require_ids(query.camids), require_ids(gallery.camids)


def find_cases(snapshots: Sequence[Snapshot]) -> QueryCases:
    """Find the queries with the lowest AP of runs on the same images, and those whose AP differs most."""
    runs = [Retriever(snapshot) for snapshot in snapshots]
    precisions = np.stack([run.precisions for run in runs])
    valid = np.flatnonzero(~np.isnan(precisions[0]))
    pids = require_ids(runs[0].dataset.query.pids)
    worst = first_per_identity(valid[np.argsort(precisions[:, valid].mean(0), kind="stable")], pids)[:NUM_QUERIES]
    changed = choose_changed(precisions[-1] - precisions[0], pids)
    cases = {row: QueryCase(row, [run.rank(row) for run in runs]) for row in {*worst, *changed}}
    return QueryCases(
        [cases[row] for row in worst],
        [cases[row] for row in changed],
        precisions[:, valid].mean(1).tolist(),
        len(valid),
    )


def choose_changed(gains: np.ndarray, pids: np.ndarray) -> list[int]:
    """Choose the queries with the largest gains `[Q]`, then those with the largest losses; NaN is neither."""
    order = np.argsort(gains, kind="stable")
    won = first_per_identity(order[::-1][gains[order[::-1]] > 0], pids)
    lost = first_per_identity(order[gains[order] < 0], pids)
    return won[: NUM_QUERIES // 2] + lost[: NUM_QUERIES // 2]


def first_per_identity(rows: Iterable[int], pids: np.ndarray) -> list[int]:
    """Keep the first row of each identity."""
    first: dict[int, int] = {}
    for row in rows:
        first.setdefault(int(pids[row]), int(row))
    return list(first.values())
