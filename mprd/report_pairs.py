"""How a run labels pairs: its candidates by score, and P by the cameras of a pair."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mprd import checkpoint, diagnostics
from mprd.agreement import agreements, likelihood_graph
from mprd.data.datasets import choose_meta_images
from mprd.errors import UserError
from mprd.labelling import NeighborLists, spread
from mprd.pairs import PADDING
from mprd.report_snapshot import Snapshot
from mprd.state import build_gcn
from mprd.subgraphs import build_subgraphs, overlap

CHUNK = 4096
"""Pairs judged at a time."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The pairs (i, j), j in NN_k(i), as this state of the networks sees them; those of labelled images left out."""

    scores: dict[str, np.ndarray]
    """`[P]` each: `cosine` of the memory, `list overlap` of NN(i) and NN(j), `g_ij` where the GCN is trained, and
    `agreement` where that decides."""
    is_true: np.ndarray | None
    """Whether both show one person, boolean `[P]`; None without identities."""
    decides: str | None
    """The score that labels them; None under a labeller that has none of these."""
    threshold: float
    """What it must exceed."""

    def __len__(self) -> int:
        return len(self.scores["cosine"])

    def auc(self, name: str) -> float | None:
        """Return the area under the ROC curve of a score."""
        if self.is_true is None:
            return None
        return diagnostics.auc(torch.as_tensor(self.scores[name]), torch.as_tensor(self.is_true))

    @property
    def precision(self) -> float | None:
        """Return the share of the candidates that are true."""
        return None if self.is_true is None or not len(self) else float(self.is_true.mean())

    @property
    def is_accepted(self) -> np.ndarray | None:
        """Say which candidates pass the threshold, boolean `[P]`."""
        return None if self.decides is None or not len(self) else self.scores[self.decides] > self.threshold

    @property
    def accepted_precision(self) -> float | None:
        """Return the share of those that pass that are true."""
        accepted = self.is_accepted
        if self.is_true is None or accepted is None or not accepted.any():
            return None
        return float(self.is_true[accepted].mean())


def judge_candidates(snapshot: Snapshot) -> Candidates:
    """Search the lists as the run's settings say and judge all pairs in them.

    Raises UserError where the training images are gone.
    """
    config, memory = snapshot.config, snapshot.memory
    lists = NeighborLists(list_features(snapshot), snapshot.camids(), config.neighbors)
    lists.refresh()
    pairs = candidate_pairs(snapshot, lists.ids)
    judges = {
        "cosine": lambda chunk: (memory[chunk[:, 0]] * memory[chunk[:, 1]]).sum(1),
        "list overlap": lambda chunk: overlap(build_subgraphs(chunk, lists.ids)),
    }
    if has_gcn(snapshot):
        gcn = build_gcn(config.gcn, num_features=memory.shape[1]).to(memory.device).eval()
        checkpoint.load_module(gcn, snapshot.state["gcn"], path=snapshot.run.folder.last, name="GCN")
        judges = {"g_ij": lambda chunk: gcn.predict(memory, lists.ids, chunk), **judges}
    scores = {
        name: torch.cat([memory.new_zeros(0), *map(judge, pairs.split(CHUNK))]).cpu().numpy()
        for name, judge in judges.items()
    }
    decides, threshold = ("g_ij", config.pairs.mu) if has_gcn(snapshot) else (None, config.pairs.jaccard)
    if config.pairs.labeller == "jaccard":
        decides = "list overlap"
    if decides is not None and config.pairs.decide == "agreement":
        scores["agreement"] = agreement_of(pairs, lists.ids, judges[decides])
        decides = "agreement"
    is_true = None
    if snapshot.need_train().pids is not None:
        first, second = snapshot.need_pids()[pairs].T.cpu().numpy()
        is_true = first == second
    return Candidates(scores, is_true, decides, threshold)


def agreement_of(pairs: Tensor, neighbor_ids: Tensor, judge: Callable[[Tensor], Tensor]) -> np.ndarray:
    """Return how far the ends of pairs `[P, 2]` agree in what `judge` says of all candidates `[N, K]`, `[P]`."""
    where = neighbor_ids != PADDING
    everyones = torch.stack([where.nonzero()[:, 0], neighbor_ids[where]], dim=1)
    graph = likelihood_graph(neighbor_ids, spread(torch.cat([*map(judge, everyones.split(CHUNK))]), where))
    found = [graph.new_zeros(0).to_dense()]
    for chunk in pairs.split(CHUNK):
        rows, where_found = chunk[:, 0].unique(return_inverse=True)
        found.append(agreements(graph, rows)[where_found, chunk[:, 1]])
    return torch.cat(found).cpu().numpy()


def candidate_pairs(snapshot: Snapshot, neighbor_ids: Tensor) -> Tensor:
    """Return the pairs `[P, 2]` of each image with its neighbours `[N, K]`, without those of labelled images.

    They would flatter the GCN that was trained on them.
    """
    config = snapshot.config
    num_meta = config.meta.num_ids if has_gcn(snapshot) else 0
    meta = choose_meta_images(snapshot.need_train().pids, num_ids=num_meta, seed=config.train.seed)
    is_pair = neighbor_ids != PADDING
    is_pair[torch.as_tensor(meta, device=neighbor_ids.device)] = False
    return torch.stack([is_pair.nonzero()[:, 0], neighbor_ids[is_pair]], dim=1)


def has_gcn(snapshot: Snapshot) -> bool:
    """Say whether the GCN of this state has been trained."""
    return snapshot.config.pairs.labeller == "gcn" and snapshot.num_epochs > snapshot.config.train.warmup_epochs


def list_features(snapshot: Snapshot) -> Tensor:
    """Return the features `[N, D]` that the lists are drawn from: the memory, or clean ones extracted now."""
    if snapshot.config.neighbors.source == "memory":
        return snapshot.memory
    return snapshot.extract(snapshot.need_train())


@dataclass(frozen=True, eq=False)
class CameraPairs:
    """Pairs of P by the camera of i (row) and of j (column), each int64 `[C, C]`."""

    cameras: list[int]
    """Numbers from 1."""
    num_pairs: np.ndarray
    num_true: np.ndarray
    num_same: np.ndarray
    """All pairs of one identity, what P could hold."""

    @property
    def precision(self) -> np.ndarray:
        """Return the share of the pairs that are right; NaN where there are none."""
        return divide(self.num_true, self.num_pairs)

    @property
    def recall(self) -> np.ndarray:
        """Return the share of the true pairs that were found; NaN where there are none."""
        return divide(self.num_true, self.num_same)


def divide(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Divide counts; NaN where there is nothing to divide by."""
    return np.where(wholes > 0, parts / np.maximum(wholes, 1), np.nan)


def count_camera_pairs(snapshot: Snapshot) -> CameraPairs:
    """Count P by camera pair; raise UserError without identities, cameras, or any pair."""
    pids, camids = snapshot.need_pids().cpu().numpy(), snapshot.camids()
    if camids is None:
        raise UserError("the file names carry no cameras")
    ids = snapshot.positives().ids.cpu().numpy()
    rows, columns = np.nonzero((ids != PADDING) & (ids != np.arange(len(ids))[:, None]))
    if not len(rows):
        raise UserError("P holds no pairs: every image has itself alone as a positive")
    return camera_counts(rows, ids[rows, columns], pids=pids, camids=camids.cpu().numpy())


def camera_counts(first: np.ndarray, second: np.ndarray, *, pids: np.ndarray, camids: np.ndarray) -> CameraPairs:
    """Count the pairs (first, second), int64 `[P]` each, of images with `pids` and `camids` `[N]`."""
    num_cameras = int(camids.max()) + 1
    is_true = pids[first] == pids[second]
    pairs, true = (np.zeros((num_cameras, num_cameras), dtype=np.int64) for _ in range(2))
    np.add.at(pairs, (camids[first], camids[second]), 1)
    np.add.at(true, (camids[first[is_true]], camids[second[is_true]]), 1)
    _, numbers = np.unique(pids, return_inverse=True)
    images = np.zeros((int(numbers.max()) + 1, num_cameras), dtype=np.int64)
    np.add.at(images, (numbers, camids), 1)
    # an image is no pair with itself
    same = images.T @ images - np.diag(images.sum(0))
    seen = np.flatnonzero(images.sum(0))
    picked = np.ix_(seen, seen)
    return CameraPairs((seen + 1).tolist(), pairs[picked], true[picked], same[picked])
