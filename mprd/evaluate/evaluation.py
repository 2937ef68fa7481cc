"""Query against gallery with a trained backbone (Sec. 5.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from mprd.backbone.features import extract
from mprd.backbone.network import Backbone
from mprd.data.datasets import ReidDataset
from mprd.data.images import PlainImages
from mprd.metrics import RankMetrics, rank_features, rank_metrics, re_rank
from mprd.neighbors.similarity import Whitening

if TYPE_CHECKING:
    from mprd.config.schema import Config


@dataclass(frozen=True)
class Evaluation:
    """Rank metrics of the features after and before the appended batch norm."""

    after_bn: RankMetrics
    """The headline."""
    before_bn: RankMetrics
    extra: dict[str, RankMetrics]
    """The features after the batch norm, `reranked` or `whitened`, in columns of their own."""

    def row(self) -> dict[str, float]:
        """Return the figures under the column names of metrics.jsonl, fractions in [0, 1]."""
        row = metric_columns(self.after_bn)
        row |= {f"{name}_before_bn": value for name, value in metric_columns(self.before_bn).items()}
        for extra, metrics in self.extra.items():
            row |= {f"{name}_{extra}": value for name, value in metric_columns(metrics).items()}
        return row


def metric_columns(metrics: RankMetrics) -> dict[str, float]:
    """Return mAP, mINP and the CMC at ranks 1, 5 and 10."""
    ranks = {f"rank{k}": float(metrics.cmc[min(k, len(metrics.cmc)) - 1]) for k in (1, 5, 10)}
    return {
        "mAP": float(metrics.mAP),
        "mAP_trapezoid": float(metrics.mAP_trapezoid),
        "mINP": float(metrics.mINP),
        **ranks,
    }


def evaluate(
    backbone: Backbone,
    dataset: ReidDataset,
    config: Config,
    *,
    device: torch.device,
    reranks: bool = False,
    whitening: Whitening | None = None,
    camera_rows: Tensor | None = None,
) -> Evaluation:
    """Extract query and gallery, and rank the gallery for each query (Sec. 5.1).

    Args:
        reranks: evaluate the features also with k-reciprocal re-ranking.
        whitening: evaluate them also whitened as the training images are.
        camera_rows: the number in training of each camera of the data set, -1 where it was not trained on; None where
            the data set is that of the training. Batch norms have statistics of each.
    """
    features = extract_sets(backbone, dataset, config, device=device, camera_rows=camera_rows)
    return rank_sets(*features, dataset, reranks=reranks, whitening=whitening)


def rank_sets(
    query_features: tuple[Tensor, Tensor],
    gallery_features: tuple[Tensor, Tensor],
    dataset: ReidDataset,
    *,
    reranks: bool = False,
    whitening: Whitening | None = None,
) -> Evaluation:
    """Rank the gallery for each query.

    Args:
        query_features: after and before the batch norm, as from `extract_sets`.
        gallery_features: likewise.
        reranks: see `evaluate`, also for `whitening`.
    """
    query, gallery = dataset.query, dataset.gallery
    (q_after, q_before), (g_after, g_before) = query_features, gallery_features
    ids = tuple(require_ids(ids) for ids in (query.pids, gallery.pids, query.camids, gallery.camids))
    extra = {}
    if reranks:
        extra["reranked"] = rank_metrics(re_rank(q_after, g_after), *ids)
    if whitening is not None:
        extra["whitened"] = rank_features(whitening(q_after), whitening(g_after), *ids)
    return Evaluation(
        rank_features(q_after, g_after, *ids),
        rank_features(q_before, g_before, *ids),
        extra,
    )


def require_ids(ids: np.ndarray | None) -> np.ndarray:
    """Narrow the type of ids that `ReidDataset.can_evaluate` has checked."""
    assert ids is not None
    return ids


def trained_cameras(camids: np.ndarray | None, camera_rows: Tensor | None) -> Tensor:
    """Return the number in training of each image's camera `[n]`; see `evaluate`."""
    numbers = torch.as_tensor(require_ids(camids))
    return numbers if camera_rows is None else camera_rows[numbers]


def extract_sets(
    backbone: Backbone,
    dataset: ReidDataset,
    config: Config,
    *,
    device: torch.device,
    camera_rows: Tensor | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the features of query and gallery, each after and before the batch norm, `[n, D]`.

    Every worker must call this, extracts its shard, and gets all features. `camera_rows` as in `evaluate`.
    """
    after_and_before = [
        extract(
            backbone,
            PlainImages(images.paths, config.data, packs=dataset.packs),
            batch_size=config.eval.batch_size,
            num_workers=config.data.num_workers,
            device=device,
            cameras=trained_cameras(images.camids, camera_rows),
        )
        for images in (dataset.query, dataset.gallery)
    ]
    return after_and_before[0], after_and_before[1]
