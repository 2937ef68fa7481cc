"""Collect the figures of an epoch: one row of metrics.jsonl."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mprd.evaluate import label_quality
from mprd.evaluate.evaluation import extract_sets, rank_sets
from mprd.runtime.seeding import RngStream, generator

if TYPE_CHECKING:
    from mprd.engine.trainer import Trainer

COLLAPSED = 0.95
"""Mean cosine of random pairs above which the features count as collapsed."""


def epoch_row(trainer: Trainer) -> dict[str, Any]:
    """Return the figures of this epoch by column; a figure without its input (no identities, no GCN) is None.

    Every worker must call this, since all extract. The first returns the figures, the others an empty row. The lists of
    the epoch are renewed: evaluation whitens by differences of the network that it evaluates.
    """
    is_first = trainer.workers.is_first
    row = training_row(trainer) | label_row(trainer) | speed_row(trainer) if is_first else {}
    trainer.epoch_lists.renew()
    evaluation = evaluate_trainer(trainer) if is_due(trainer) else {}
    return row | evaluation if is_first else {}


def training_row(trainer: Trainer) -> dict[str, Any]:
    """Return what needs no identities: losses, schedules, sizes of P and label-free scores."""
    state, stats = trainer.state, trainer.stats
    memory = state.memory.features
    rng = generator(trainer.config.train.seed, RngStream.COLLAPSE, state.epoch)
    return {
        "epoch": state.epoch,
        "labeller": trainer.labeller,
        "cnn_loss": stats.mean("cnn_loss", "images"),
        "gcn_loss": stats.mean("gcn_loss", "gcn_steps"),
        "lr_backbone": state.optimizer.param_groups[0]["lr"],
        "lr_new": state.optimizer.param_groups[-1]["lr"],
        "gamma": trainer.gamma,
        "eta": trainer.eta,
        "positives": float(state.positives.counts().float().mean()),
        "neighbors": stats.mean("k", "labelled"),
        "neighbors_capped": int(stats.sums.get("k_capped", 0)),
        "mean_random_cosine": label_quality.mean_random_cosine(memory, generator=rng),
        "label_free_score": label_quality.neighborhood_agreement(memory, trainer.camids),
        "silhouette": label_quality.silhouette(memory, state.positives),
        **({} if state.similarity is None else state.similarity.report),
    }


def label_row(trainer: Trainer) -> dict[str, float | None]:
    """Return the quality of P and of the pair scores; training never uses these identities."""
    state = trainer.state
    row: dict[str, float | None] = {}
    if len(state.meta) and trainer.config.meta.is_whole:
        row |= label_quality.labelled_quality(state.positives, state.meta)
    if trainer.pids is not None:
        row |= label_quality.pair_quality(state.positives, trainer.pids, trainer.camids)
        if trainer.stats.candidates:
            row |= candidate_row(trainer, trainer.pids)
    return row


def candidate_row(trainer: Trainer, pids: Tensor) -> dict[str, float | None]:
    """Return the AUC of each pair score on the epoch's candidate pairs, and the share of true pairs among them."""
    candidates = torch.cat([part.to(trainer.device) for part in trainer.stats.candidates])
    # the GCN is trained on the pairs of labeled images, on either side
    candidates = candidates[~torch.isin(candidates[:, :2].long(), trainer.state.meta.ids).any(1)]
    first, second = candidates[:, :2].long().unbind(1)
    g, cosine = candidates[:, 2:].unbind(1)
    is_true = pids[first] == pids[second]
    scores = {"gcn_auc": g} if trainer.labeller == "gcn" else {}
    scores["cosine_auc"] = cosine
    if is_due(trainer) and not trainer.config.searches_live:
        # from the features that g was computed from; live lists have none of all images
        scores["reciprocal_auc"] = trainer.frozen_lists().similarities.between(first, second)
    row = {column: label_quality.auc(score, is_true) for column, score in scores.items()}
    return row | {"candidate_precision": label_quality.ratio(is_true.sum(), torch.tensor(len(is_true)))}


def speed_row(trainer: Trainer) -> dict[str, Any]:
    """Return the seconds of both phases, and images per second."""
    stats = trainer.stats
    return {
        "gcn_seconds": stats.sums.get("gcn_seconds", 0.0),
        "cnn_seconds": stats.sums.get("cnn_seconds", 0.0),
        "similarity_seconds": stats.sums.get("similarity_seconds", 0.0),
        "images_per_second": stats.mean("images", "cnn_seconds"),
    }


def untrained_row(trainer: Trainer) -> dict[str, float]:
    """Return the evaluation before training; empty without query and gallery, and on workers other than the first.

    Every worker must call this, since all extract.
    """
    return evaluate_trainer(trainer) if trainer.dataset.can_evaluate else {}


def evaluate_trainer(trainer: Trainer) -> dict[str, float]:
    """Extract query and gallery on all workers, and rank on the first; the others return an empty row."""
    features = extract_sets(trainer.state.backbone, trainer.dataset, trainer.config, device=trainer.device)
    if not trainer.workers.is_first:
        return {}
    return rank_sets(*features, trainer.dataset, whitening=trainer.state.whitening).row()


def is_due(trainer: Trainer) -> bool:
    """Return whether this epoch is evaluated: every `eval.every` epochs and the last, given query and gallery."""
    epoch, config = trainer.state.epoch, trainer.config
    is_last = epoch + 1 == config.train.epochs
    return trainer.dataset.can_evaluate and (is_last or (epoch + 1) % config.eval.every == 0)
