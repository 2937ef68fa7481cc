"""What a run's features look like: hard identities by t-SNE (Fig. 5), and the queries that fail."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mprd.data.datasets import ReidDataset
from mprd.errors import UserError
from mprd.evaluate.evaluation import can_evaluate, known
from mprd.metrics import rank_features
from mprd.report.checkpoint import Snapshot

NUM_IDS = 100
"""Identities of the picture, as in Fig. 5."""
NUM_COLOURED = 12
"""Of these, so many of the hardest get a colour: more cannot be told apart."""
MAX_POINTS = 2000
NUM_QUERIES = 8
NUM_SHOWN = 10
"""Gallery images shown for a query."""


@dataclass(frozen=True, eq=False)
class HardIdentities:
    """Identities that runs on the same images find hard, and their images."""

    rows: np.ndarray
    """Training images to place, int64 `[n]`."""
    pids: np.ndarray
    """Their identities, int64 `[n]`."""
    hardest: list[int]
    """Identities that get a colour, the hardest first."""
    precisions: list[float]
    """By run, the mean average precision of the coloured ones' images among all training images."""

    @property
    def num_ids(self) -> int:
        """Count the identities, with and without a colour."""
        return len(np.unique(self.pids))


def identity_precisions(snapshot: Snapshot) -> dict[int, float]:
    """Return for each identity the mean AP of its images among all training images, by the memory.

    As in evaluation an image searches under other cameras; where none are known, under all.
    Raises UserError without identities.
    """
    pids = snapshot.need_pids()
    camids = snapshot.camids()
    if camids is None:
        camids = torch.arange(len(pids), device=pids.device)
    memory = snapshot.memory
    ranked = rank_features(memory, memory, pids, pids, camids, camids, memory_mb=snapshot.config.eval.memory_mb)
    numbers, cameras = pids.cpu().numpy(), camids.cpu().numpy()
    valid = numbers[has_match(numbers, numbers, q_camids=cameras, g_camids=cameras)]
    return {int(pid): float(ranked.average_precisions[valid == pid].mean()) for pid in np.unique(valid)}


def has_match(q_pids: np.ndarray, g_pids: np.ndarray, *, q_camids: np.ndarray, g_camids: np.ndarray) -> np.ndarray:
    """Say which queries have an image of their identity under another camera in the gallery, boolean `[Q]`."""
    by_pid = Counter(g_pids.tolist())
    by_both = Counter(zip(g_pids.tolist(), g_camids.tolist(), strict=True))
    queries = zip(q_pids.tolist(), q_camids.tolist(), strict=True)
    return np.array([by_pid[pid] > by_both[pid, camid] for pid, camid in queries], dtype=bool)


def choose_identities(snapshots: Sequence[Snapshot]) -> HardIdentities:
    """Choose the hardest identities of runs on the same images: those with the lowest mean AP over all runs.

    Raises UserError without identities.
    """
    precisions = [identity_precisions(snapshot) for snapshot in snapshots]
    order = sorted(precisions[0], key=lambda pid: sum(each[pid] for each in precisions))
    pids = known(snapshots[0].need_train().pids)
    rows = np.flatnonzero(np.isin(pids, choose_shown(order, pids)))
    hardest = order[:NUM_COLOURED]
    return HardIdentities(
        rows, pids[rows], hardest, [float(np.mean([each[pid] for pid in hardest])) for each in precisions]
    )


def choose_shown(order: list[int], pids: np.ndarray) -> list[int]:
    """Take identities in order while they and their images are not too many."""
    counts = Counter(pids.tolist())
    total, shown = 0, list[int]()
    for pid in order[:NUM_IDS]:
        total += counts[pid]
        if shown and total > MAX_POINTS:
            break
        shown.append(pid)
    return shown


def place(snapshot: Snapshot, rows: np.ndarray) -> np.ndarray:
    """Place training images `[n]` in the plane by t-SNE of the memory, float64 `[n, 2]`, from a fixed seed.

    Raises UserError for too few, and for features that are all alike.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    num_points = len(rows)
    if num_points < 5:
        raise UserError(f"t-SNE wants at least 5 images, but there are {num_points}")
    points = snapshot.memory[torch.as_tensor(rows, device=snapshot.model.device)].double().cpu().numpy()
    # scikit-learn's t-SNE starts from the first component divided by its deviation, and crashes on what then comes
    if not np.ptp(points, axis=0).max() > 1e-6:
        raise UserError("the features of all images are alike")
    if min(points.shape) > 50:
        points = PCA(50, random_state=0).fit_transform(points)
    perplexity = min(30.0, (num_points - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points).astype(np.float64)


@dataclass(frozen=True)
class Hit:
    """A gallery image in a ranking."""

    row: int
    """Its index in the gallery."""
    rank: int
    """From 1."""
    cosine: float
    is_right: bool


@dataclass(frozen=True)
class Ranking:
    """What a run answers to a query."""

    precision: float
    """AP."""
    first_match: int
    """Rank of the first right image, from 1."""
    num_matches: int
    hits: list[Hit]
    """The first `NUM_SHOWN`, and behind them the first right one where it comes later."""


@dataclass(frozen=True)
class QueryCase:
    """A query with the answer of each run."""

    row: int
    """Its index among the queries."""
    rankings: list[Ranking]


@dataclass(frozen=True)
class QueryCases:
    """The queries worth a look, by runs on the same images."""

    worst: list[QueryCase]
    """Lowest mean AP over the runs, at most one an identity."""
    changed: list[QueryCase]
    """Those that gained and lost most from the first run to the last; empty for one run."""
    mAP: list[float]  # noqa: N815
    """Of each run."""
    num_valid: int


class Retriever:
    """Query and gallery under one run's network."""

    def __init__(self, snapshot: Snapshot) -> None:
        """Extract both; raise UserError where there is nothing to evaluate."""
        self.dataset = need_evaluation(snapshot)
        self.query, self.gallery = map(snapshot.extract, (self.dataset.query, self.dataset.gallery))
        ids = all_ids(self.dataset)
        # nan for a query without a match
        self.precisions = np.full(len(ids[0]), np.nan)
        ranked = rank_features(self.query, self.gallery, *ids, memory_mb=snapshot.config.eval.memory_mb)
        self.precisions[has_match(ids[0], ids[1], q_camids=ids[2], g_camids=ids[3])] = ranked.average_precisions

    def rank(self, row: int) -> Ranking:
        """Rank the gallery for one query."""
        q_pids, g_pids, q_camids, g_camids = all_ids(self.dataset)
        cosines = (self.gallery @ self.query[row]).cpu().numpy()
        is_own, is_here = g_pids == q_pids[row], g_camids == q_camids[row]
        precision = float(self.precisions[row])
        return rank_gallery(cosines, is_own & ~is_here, is_removed=is_own & is_here, precision=precision)


def rank_gallery(cosines: np.ndarray, is_match: np.ndarray, *, is_removed: np.ndarray, precision: float) -> Ranking:
    """Rank gallery images, `[G]` each, by cosine; ties go to the lower index, removed images do not take part."""
    order = np.argsort(-cosines, kind="stable")
    order = order[~is_removed[order]]
    matches = np.flatnonzero(is_match[order])
    first = int(matches[0])
    ranks = [*range(min(NUM_SHOWN, len(order))), *([first] if first >= NUM_SHOWN else [])]
    hits = [Hit(int(order[at]), at + 1, float(cosines[order[at]]), bool(is_match[order[at]])) for at in ranks]
    return Ranking(precision, first + 1, len(matches), hits)


def need_evaluation(snapshot: Snapshot) -> ReidDataset:
    """Return the data set; raise UserError where it cannot be evaluated."""
    dataset = snapshot.need_dataset()
    if not can_evaluate(dataset):
        raise UserError("the data set has no query and gallery with identities and cameras")
    return dataset


def all_ids(dataset: ReidDataset) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return pids of query and gallery, then camids of query and gallery."""
    query, gallery = dataset.query, dataset.gallery
    return known(query.pids), known(gallery.pids), known(query.camids), known(gallery.camids)


def find_cases(snapshots: Sequence[Snapshot]) -> QueryCases:
    """Find the queries on which runs with the same query and gallery fail, and on which they differ most."""
    runs = [Retriever(snapshot) for snapshot in snapshots]
    precisions = np.stack([run.precisions for run in runs])
    valid = np.flatnonzero(~np.isnan(precisions[0]))
    pids = known(runs[0].dataset.query.pids)
    worst = one_an_identity(valid[np.argsort(precisions[:, valid].mean(0), kind="stable")], pids)[:NUM_QUERIES]
    changed = choose_changed(precisions[-1] - precisions[0], pids)
    cases = {row: QueryCase(row, [run.rank(row) for run in runs]) for row in {*worst, *changed}}
    return QueryCases(
        [cases[row] for row in worst],
        [cases[row] for row in changed],
        precisions[:, valid].mean(1).tolist(),
        len(valid),
    )


def choose_changed(gains: np.ndarray, pids: np.ndarray) -> list[int]:
    """Choose the queries that gained most, then those that lost most, by the gains `[Q]`, NaN where there is none."""
    order = np.argsort(gains, kind="stable")
    won = one_an_identity(order[::-1][gains[order[::-1]] > 0], pids)
    lost = one_an_identity(order[gains[order] < 0], pids)
    return won[: NUM_QUERIES // 2] + lost[: NUM_QUERIES // 2]


def one_an_identity(rows: Iterable[int], pids: np.ndarray) -> list[int]:
    """Keep the first row of each identity: five pictures of one person teach less than five persons."""
    first: dict[int, int] = {}
    for row in rows:
        first.setdefault(int(pids[row]), int(row))
    return list(first.values())
