"""The row of figures that an epoch leaves behind."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from mprd.evaluate import label_quality
from mprd.evaluate.evaluation import can_evaluate, extract_sets, rank_sets
from mprd.runtime.seeding import RngStream, generator

if TYPE_CHECKING:
    from mprd.engine.trainer import Trainer

COLLAPSED = 0.95
"""Mean cosine of random pairs above which the features have run together."""


def epoch_row(trainer: Trainer) -> dict[str, Any]:
    """Return losses, label quality, the label-free score and, when due, the retrieval figures of this epoch.

    Every worker must call this: all extract. The first computes the figures, the others return an empty row. A figure
    that does not exist (no identities, no GCN) is None.
    """
    retrieval = retrieval_row(trainer)
    if not trainer.workers.is_first:
        return {}
    return training_row(trainer) | measure_labels(trainer) | speed_row(trainer) | retrieval


def training_row(trainer: Trainer) -> dict[str, Any]:
    """Return what describes the epoch without any identity: losses, schedules, sizes of P, label-free scores."""
    state, stats = trainer.state, trainer.stats
    memory = state.memory.features
    generated = generator(trainer.config.train.seed, RngStream.COLLAPSE, state.epoch)
    return {
        "epoch": state.epoch,
        "labeller": trainer.labeller,
        "cnn_loss": stats.mean("cnn_loss", "images"),
        "gcn_loss": stats.mean("gcn_loss", "gcn_steps"),
        "lr_backbone": state.optimizer.param_groups[0]["lr"],
        "lr_new": state.optimizer.param_groups[1]["lr"],
        "gamma": trainer.gamma,
        "eta": trainer.eta,
        "positives": float(state.positives.counts().float().mean()),
        "neighbors": stats.mean("k", "labelled"),
        "neighbors_capped": int(stats.sums.get("k_capped", 0)),
        "mean_random_cosine": label_quality.mean_random_cosine(memory, generator=generated),
        "label_free_score": label_quality.neighborhood_agreement(memory, trainer.camids),
        "silhouette": label_quality.silhouette(memory, state.positives),
    }


def speed_row(trainer: Trainer) -> dict[str, Any]:
    """Return the seconds of both phases, and images per second."""
    stats = trainer.stats
    return {
        "gcn_seconds": stats.sums.get("gcn_seconds", 0.0),
        "cnn_seconds": stats.sums.get("cnn_seconds", 0.0),
        "images_per_second": stats.mean("images", "cnn_seconds"),
    }


def measure_labels(trainer: Trainer) -> dict[str, float | None]:
    """Return how right P and the GCN's scores were; for the reader only, never for training."""
    state, quality = trainer.state, {}
    if len(state.meta) and trainer.config.meta.is_whole:
        quality = label_quality.labelled_quality(state.positives, state.meta)
    if trainer.pids is None:
        return quality
    quality |= label_quality.pair_quality(state.positives, trainer.pids, trainer.camids)
    if trainer.stats.candidates:
        judged = torch.cat([part.to(trainer.device) for part in trainer.stats.candidates])
        # pairs of a labeled image would flatter the GCN that was trained on them
        judged = judged[~torch.isin(judged[:, 0].long(), trainer.state.meta.ids)]
        first, second = judged[:, :2].long().unbind(1)
        is_true = trainer.pids[first] == trainer.pids[second]
        if trainer.labeller == "gcn":
            quality["gcn_auc"] = label_quality.auc(judged[:, 2], is_true)
        quality["cosine_auc"] = label_quality.auc(judged[:, 3], is_true)
        quality["jaccard_auc"] = label_quality.auc(judged[:, 4], is_true)
        if is_due(trainer):
            # the best score without learning; of all images at once, so only where an evaluation takes its time anyway
            scores = trainer.frozen_lists().similarities.between(first, second)
            quality["reciprocal_auc"] = label_quality.auc(scores, is_true)
        if trainer.config.pairs.decide == "agreement":
            quality["agreement_auc"] = label_quality.auc(judged[:, 5], is_true)
        quality["candidate_precision"] = label_quality.ratio(is_true.sum(), torch.tensor(len(judged)))
    return quality


def retrieval_row(trainer: Trainer) -> dict[str, float]:
    """Evaluate when this epoch is due, or the last."""
    return evaluate_trainer(trainer) if is_due(trainer) else {}


def untrained_row(trainer: Trainer) -> dict[str, float]:
    """Return the retrieval figures before training; empty without query and gallery, and on workers but the first.

    Every worker must call this: all extract.
    """
    return evaluate_trainer(trainer) if can_evaluate(trainer.dataset) else {}


def evaluate_trainer(trainer: Trainer) -> dict[str, float]:
    """Extract query and gallery on all workers, and rank on the first; empty on the others."""
    features = extract_sets(trainer.state.backbone, trainer.dataset, trainer.config, device=trainer.device)
    if not trainer.workers.is_first:
        return {}
    return rank_sets(*features, trainer.dataset).row()


def is_due(trainer: Trainer) -> bool:
    """Say whether this epoch is evaluated; the last always is, where it can be."""
    epoch, config = trainer.state.epoch, trainer.config
    is_last = epoch + 1 == config.train.epochs
    return can_evaluate(trainer.dataset) and (is_last or (epoch + 1) % config.eval.every == 0)
