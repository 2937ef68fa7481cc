"""The candidate pairs of a run by score, and its pairs of P by camera."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mprd.engine.epoch_lists import fit_with_meta, list_features
from mprd.errors import UserError
from mprd.evaluate import label_quality
from mprd.gcn.network import PairGCN
from mprd.neighbors.exact import PADDING
from mprd.neighbors.lists import FrozenLists
from mprd.neighbors.similarity import Similarity
from mprd.pairs.labellers import CandidateLabeller, RuleLabeller, choose_labeller, label_all
from mprd.pairs.positives import MetaSet, choose_limit, choose_meta
from mprd.report.checkpoint import Snapshot
from mprd.runtime import checkpoint
from mprd.runtime.distributed import WorkerGroup
from mprd.subgraphs import build_serially

CHUNK = 4096
"""Pairs scored at a time."""


@dataclass(frozen=True, eq=False)
class CandidateScores:
    """Scores of the candidate pairs (i, j), j in NN_k(i), in one state of the networks."""

    scores: dict[str, np.ndarray]
    """`[P]` each: `g_ij` of a trained GCN; of the features that lists are drawn from, `cosine` and `k-reciprocal`
    similarity."""
    is_true: np.ndarray | None
    """Whether both images show one identity, boolean `[P]`; None without identities."""
    threshold: float | None
    """Of g_ij, above which pairs are positives; None under a labeler that does not read it."""
    is_positive: np.ndarray | None
    """Which pairs the labeler makes positive, boolean `[P]`, after the limit; None under such a labeler."""

    def __len__(self) -> int:
        return len(self.scores["cosine"])

    def auc(self, name: str) -> float | None:
        """Return the area under the ROC curve of a score; None without identities."""
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


def score_candidates(snapshot: Snapshot) -> CandidateScores:
    """Search the lists under the run's settings, and score and label all pairs in them.

    Raises UserError where the training images are missing or have changed.
    """
    snapshot.need_train()
    meta = choose_meta(snapshot.config, snapshot.need_dataset(), snapshot.model.device)
    lists = build_lists(snapshot, meta)
    labeller = build_labeller(snapshot, lists, meta)
    tables = label_candidates(labeller, lists)
    where = lists.ids != PADDING
    if has_gcn(snapshot):
        # the GCN was trained on pairs of labeled images, which would flatter it
        where[meta.ids] = False
        where &= ~torch.isin(lists.ids, meta.ids)
    pairs = torch.stack([where.nonzero()[:, 0], lists.ids[where]], dim=1)
    scores = pair_scores(lists, pairs)
    threshold, is_positive = None, None
    if isinstance(labeller, CandidateLabeller):
        threshold, is_positive = labeller.mu, tables["is_positive"][where].cpu().numpy()
        scores = {"g_ij": tables["likelihoods"][where], **scores}
    found = {name: part.cpu().numpy() for name, part in scores.items()}
    return CandidateScores(found, same_identity(snapshot, pairs), threshold, is_positive)


def has_gcn(snapshot: Snapshot) -> bool:
    """Return whether the GCN labels pairs in this state: it does not before it is trained."""
    return snapshot.config.pairs.labeller == "gcn" and snapshot.num_epochs > snapshot.config.train.warmup_epochs


def build_lists(snapshot: Snapshot, meta: MetaSet) -> FrozenLists:
    """Return the neighbor lists of all images as training draws them; it makes features and similarity if need be."""
    config, camids, features = snapshot.config, snapshot.camids(), snapshot.state["list_features"]
    if features is None:
        features = list_features(config, snapshot.memory, extract=lambda: snapshot.extract(snapshot.need_train()))
    features = features.to(snapshot.model.device)
    similarity = Similarity() if config.searches_live else snapshot.model.similarity
    if similarity is None:
        similarity = fit_with_meta(config, features, camids, meta)
    return FrozenLists(features, camids, config.neighbors, similarity=similarity)


def build_labeller(snapshot: Snapshot, lists: FrozenLists, meta: MetaSet) -> CandidateLabeller | RuleLabeller:
    """Build the labeler that training uses in this state."""
    config = snapshot.config
    is_untrained = config.pairs.labeller == "gcn" and not has_gcn(snapshot)
    return choose_labeller(
        "single" if is_untrained else config.pairs.labeller,
        config,
        lists,
        gcn=load_gcn(snapshot) if has_gcn(snapshot) else PairGCN(snapshot.model.num_features),
        pids=None,
        meta=meta,
        limit=choose_limit(config, meta, snapshot.camids(), len(snapshot.state["memory"])),
    )


def load_gcn(snapshot: Snapshot) -> PairGCN:
    """Return G of this state."""
    gcn = PairGCN(snapshot.model.num_features).to(snapshot.model.device).eval()
    checkpoint.load_module(gcn, snapshot.state["gcn"], path=snapshot.path, name="GCN")
    return gcn


def label_candidates(labeller: CandidateLabeller | RuleLabeller, lists: FrozenLists) -> dict[str, Tensor]:
    """Return `likelihoods` and `is_positive` over the lists, `[N, K]` each.

    Empty for a labeler that scores no candidates.
    """
    if not isinstance(labeller, CandidateLabeller):
        return {}
    everyone = torch.arange(len(lists.ids), device=lists.ids.device)
    parts = [*label_all(labeller, everyone, build=build_serially, workers=WorkerGroup(device=everyone.device))]
    columns: dict[str, list[Tensor]] = {
        "is_positive": [contained(lists.ids[ids], part.positives) for ids, part in parts],
        "likelihoods": [part.likelihoods for _, part in parts if part.likelihoods is not None],
    }
    return {name: torch.cat(column) for name, column in columns.items() if column}


def contained(candidates: Tensor, positives: Tensor) -> Tensor:
    """Return which candidates `[B, K]` are in the P_i `[B, W]` of their rows, boolean `[B, K]`; false at padding."""
    return (candidates[:, :, None] == positives[:, None]).any(2) & (candidates != PADDING)


def pair_scores(lists: FrozenLists, pairs: Tensor) -> dict[str, Tensor]:
    """Return the scores of pairs `[P, 2]` that need no training, `[P]` each."""
    features = lists.features
    chunks = (features[chunk] for chunk in pairs.split(CHUNK))
    cosines = torch.cat([(ends[:, 0] * ends[:, 1]).sum(1) for ends in chunks])
    return {"cosine": cosines, "k-reciprocal": lists.similarities.between(*pairs.unbind(1))}


def same_identity(snapshot: Snapshot, pairs: Tensor) -> np.ndarray | None:
    """Return whether the images of pairs `[P, 2]` show one identity, boolean `[P]`; None without identities."""
    if snapshot.need_train().pids is None:
        return None
    first, second = snapshot.need_pids()[pairs].unbind(1)
    return (first == second).cpu().numpy()


@dataclass(frozen=True, eq=False)
class CameraPairs:
    """Pairs of P by the camera of i (row) and of j (column), each int64 `[C, C]`."""

    cameras: list[str]
    """Their names in file names."""
    num_pairs: np.ndarray
    num_true: np.ndarray
    num_same: np.ndarray
    """All pairs of one identity, in P or not."""

    @property
    def precision(self) -> np.ndarray:
        """Return the share of the pairs in P that are true; NaN where there are none."""
        return divide(self.num_true, self.num_pairs)

    @property
    def recall(self) -> np.ndarray:
        """Return the share of the true pairs that are in P; NaN where there are none."""
        return divide(self.num_true, self.num_same)


def divide(parts: np.ndarray, wholes: np.ndarray) -> np.ndarray:
    """Divide counts; NaN where the whole is 0."""
    return np.where(wholes > 0, parts / np.maximum(wholes, 1), np.nan)


def count_camera_pairs(snapshot: Snapshot) -> CameraPairs:
    """Count P by camera pair; raise UserError without identities, cameras, or any pair."""
    pids, camids = snapshot.need_pids().cpu().numpy(), snapshot.camids()
    if camids is None:
        raise UserError("the file names carry no cameras")
    ids = snapshot.state["positives"].numpy()
    rows, columns = np.nonzero((ids != PADDING) & (ids != np.arange(len(ids))[:, None]))
    if not len(rows):
        raise UserError("P holds no pairs: the only positive of every image is the image itself")
    names = snapshot.need_dataset().camera_names
    return camera_counts(rows, ids[rows, columns], pids=pids, camids=camids.cpu().numpy(), names=names)


def camera_counts(
    first: np.ndarray, second: np.ndarray, *, pids: np.ndarray, camids: np.ndarray, names: Sequence[str]
) -> CameraPairs:
    """Count the pairs (first, second), int64 `[P]` each, of images with `pids` and `camids` `[N]`."""
    num_cameras = int(camids.max()) + 1
    is_true = pids[first] == pids[second]
    pairs, true = (np.zeros((num_cameras, num_cameras), dtype=np.int64) for _ in range(2))
    np.add.at(pairs, (camids[first], camids[second]), 1)
    np.add.at(true, (camids[first[is_true]], camids[second[is_true]]), 1)
    _, numbers = np.unique(pids, return_inverse=True)
    images = np.zeros((int(numbers.max()) + 1, num_cameras), dtype=np.int64)
    np.add.at(images, (numbers, camids), 1)
    # without the pairs of an image with itself
    same = images.T @ images - np.diag(images.sum(0))
    seen = np.flatnonzero(images.sum(0))
    picked = np.ix_(seen, seen)
    return CameraPairs([names[camid] for camid in seen.tolist()], pairs[picked], true[picked], same[picked])
