"""How a run labels pairs: its candidates by score, and P by the cameras of a pair."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mprd.engine.state import build_gcn
from mprd.errors import UserError
from mprd.evaluate import label_quality
from mprd.gcn.network import PairGCN
from mprd.neighbors.lists import NeighborLists, list_features
from mprd.pairs.labellers import CandidateLabeller, Labels, ListOverlap, label_all
from mprd.pairs.rules import PADDING, MetaSet, choose_limit, choose_meta
from mprd.report.checkpoint import Snapshot
from mprd.runtime import checkpoint
from mprd.runtime.distributed import WorkerGroup
from mprd.subgraphs import build_serially

CHUNK = 4096
"""Pairs whose cosines are taken at a time."""


@dataclass(frozen=True, eq=False)
class Candidates:
    """The pairs (i, j), j in NN_k(i), as this state of the networks sees them; those of labeled images left out."""

    scores: dict[str, np.ndarray]
    """`[P]` each: `cosine` of the memory, `list overlap` of NN(i) and NN(j), `k-reciprocal` similarity by what lists
    are drawn from, `g_ij` where the GCN is trained, and `agreement` where that decides."""
    is_true: np.ndarray | None
    """Whether both show one person, boolean `[P]`; None without identities."""
    decides: str | None
    """The score that labels them; None under a labeller that has none of these."""
    threshold: float
    """What it must exceed."""
    is_positive: np.ndarray | None
    """Which of them it makes positives, boolean `[P]`, limit and clusters included; None under such a labeller."""

    def __len__(self) -> int:
        return len(self.scores["cosine"])

    def auc(self, name: str) -> float | None:
        """Return the area under the ROC curve of a score."""
        if self.is_true is None:
            return None
        return label_quality.auc(torch.as_tensor(self.scores[name]), torch.as_tensor(self.is_true))

    @property
    def precision(self) -> float | None:
        """Return the share of the candidates that are true."""
        return None if self.is_true is None or not len(self) else float(self.is_true.mean())

    @property
    def positive_share(self) -> float | None:
        """Return the share of the candidates that become positives."""
        return None if self.is_positive is None or not len(self) else float(self.is_positive.mean())

    @property
    def positive_precision(self) -> float | None:
        """Return the share of the positives that are true."""
        if self.is_true is None or self.is_positive is None or not self.is_positive.any():
            return None
        return float(self.is_true[self.is_positive].mean())


def judge_candidates(snapshot: Snapshot) -> Candidates:
    """Search the lists as the run's settings say and judge all pairs in them, as a labelling pass of the training does.

    Raises UserError where the training images are gone.
    """
    memory, decides = snapshot.memory, judge_name(snapshot)
    snapshot.need_train()  # images that have changed since would get the labels of others
    meta = choose_meta(snapshot.config, snapshot.need_dataset(), memory.device)
    labeller = rebuild_labeller(snapshot, meta)
    lists = labeller.lists
    everyone = torch.arange(len(memory), device=memory.device)
    found, is_positive = [], torch.zeros_like(lists.ids, dtype=torch.bool)
    for ids, part in label_all(labeller, everyone, build=build_serially, workers=WorkerGroup(device=memory.device)):
        found.append(part)
        is_positive[ids] = stand_in(lists.ids[ids], part.positives)
    where = lists.ids != PADDING
    if decides == "g_ij":
        # pairs of a labeled image would flatter the GCN that was trained on them
        where[meta.ids] = False
    first, second = where.nonzero()[:, 0], lists.ids[where]
    pairs = torch.stack([first, second], dim=1)
    cosines = [(memory[chunk[:, 0]] * memory[chunk[:, 1]]).sum(1) for chunk in pairs.split(CHUNK)]
    scores = {
        "cosine": torch.cat([memory.new_zeros(0), *cosines]),
        "list overlap": join(found, "overlaps")[where],
        "k-reciprocal": lists.similarities.between(first, second),
    }
    if decides == "g_ij":
        scores = {"g_ij": join(found, "likelihoods")[where], **scores}
    if labeller.decide_by == "agreement":
        scores["agreement"] = join(found, "agreements")[where]
        decides = "agreement"
    is_true = None
    if snapshot.need_train().pids is not None:
        pids = snapshot.need_pids()
        is_true = (pids[first] == pids[second]).cpu().numpy()
    return Candidates(
        {name: part.cpu().numpy() for name, part in scores.items()},
        is_true,
        decides,
        labeller.mu,
        None if decides is None else is_positive[where].cpu().numpy(),
    )


def judge_name(snapshot: Snapshot) -> str | None:
    """Name the score that judges candidates in this state; None where nothing does."""
    if has_gcn(snapshot):
        return "g_ij"
    return "list overlap" if snapshot.config.pairs.labeller == "jaccard" else None


def rebuild_labeller(snapshot: Snapshot, meta: MetaSet) -> CandidateLabeller:
    """Build the labeller of this state, its lists searched anew; list overlap judges where nothing else does."""
    config, memory, camids, name = snapshot.config, snapshot.memory, snapshot.camids(), judge_name(snapshot)
    features = list_features(config.neighbors.source, memory, lambda: snapshot.extract(snapshot.need_train()))
    return CandidateLabeller(
        trained_gcn(snapshot) if name == "g_ij" else ListOverlap(),
        memory,
        NeighborLists(features, camids, config.neighbors),
        mu=config.pairs.jaccard if name == "list overlap" else config.pairs.mu,
        is_live=False,
        decide="likelihood" if name is None else config.pairs.decide,
        limit=choose_limit(config, meta, camids, len(memory)),
        clustering=config.clusters,
    )


def stand_in(candidates: Tensor, positives: Tensor) -> Tensor:
    """Say which candidates `[B, K]` stand in the P_i `[B, W]` of their rows, boolean `[B, K]`; false at padding."""
    return (candidates[:, :, None] == positives[:, None]).any(2) & (candidates != PADDING)


def join(parts: list[Labels], name: str) -> Tensor:
    """Return one table of all parts, `[N, K]`."""
    return torch.cat([getattr(part, name) for part in parts])


def trained_gcn(snapshot: Snapshot) -> PairGCN:
    """Return G as this state has it."""
    gcn = build_gcn(snapshot.config.gcn, num_features=snapshot.memory.shape[1]).to(snapshot.memory.device).eval()
    checkpoint.load_module(gcn, snapshot.state["gcn"], path=snapshot.run.folder.last, name="GCN")
    return gcn


def has_gcn(snapshot: Snapshot) -> bool:
    """Say whether the GCN of this state has been trained."""
    return snapshot.config.pairs.labeller == "gcn" and snapshot.num_epochs > snapshot.config.train.warmup_epochs


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
