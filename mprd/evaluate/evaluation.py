"""Query against gallery with a trained backbone (Sec. 5.1)."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from mprd.backbone.features import extract
from mprd.backbone.network import Backbone
from mprd.data.datasets import ReidDataset
from mprd.data.images import PlainImages
from mprd.metrics import RankMetrics, rank_features, rank_metrics, re_rank
from mprd.neighbors.camera_norm import CameraStatistics
from mprd.neighbors.similarity import SimilarityChain

if TYPE_CHECKING:
    from mprd.config.schema import Config

Extra = Literal["reranked", "standardised", "whitened"]
"""Common post-processing, reported in columns of its own."""


@dataclass(frozen=True)
class Evaluation:
    """Rank metrics of the features after and before the appended batch norm."""

    after_bn: RankMetrics
    """The headline."""
    before_bn: RankMetrics
    extra: dict[Extra, RankMetrics]
    """The features after the batch norm, re-ranked, standardised or whitened."""

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
    extras: Collection[Extra] = (),
    chain: SimilarityChain | None = None,
    camera_rows: Tensor | None = None,
) -> Evaluation:
    """Extract query and gallery, and rank the gallery for each query (Sec. 5.1).

    Args:
        extras: evaluate the features also with k-reciprocal re-ranking, standardised by camera (Song et al., ICLR
            2025), or whitened as the training images are.
        chain: for `whitened`.
        camera_rows: the number in training of each camera of the data set, -1 where it was not trained on; None where
            the data set is that of the training. Batch norms and chain have statistics of each.
    """
    features = extract_sets(backbone, dataset, config, device=device, camera_rows=camera_rows)
    return rank_sets(*features, dataset, extras=extras, chain=chain, camera_rows=camera_rows)


def rank_sets(
    query_features: tuple[Tensor, Tensor],
    gallery_features: tuple[Tensor, Tensor],
    dataset: ReidDataset,
    *,
    extras: Collection[Extra] = (),
    chain: SimilarityChain | None = None,
    camera_rows: Tensor | None = None,
) -> Evaluation:
    """Rank the gallery for each query.

    Args:
        query_features: after and before the batch norm, as from `extract_sets`.
        gallery_features: likewise.
        extras: see `evaluate`, also for the others.
    """
    query, gallery = dataset.query, dataset.gallery
    (q_after, q_before), (g_after, g_before) = query_features, gallery_features
    ids = tuple(require_ids(ids) for ids in (query.pids, gallery.pids, query.camids, gallery.camids))
    extra: dict[Extra, RankMetrics] = {}
    if "reranked" in extras:
        extra["reranked"] = rank_metrics(re_rank(q_after, g_after), *ids)
    if "standardised" in extras:
        standardised = standardize_sets(q_after, g_after, *ids[2:])
        extra["standardised"] = rank_features(*standardised, *ids)
    if "whitened" in extras:
        assert chain is not None
        sets = ((q_after, query.camids), (g_after, gallery.camids))
        mapped = [chain(rows, trained_cameras(camids, camera_rows).to(rows.device)) for rows, camids in sets]
        extra["whitened"] = rank_features(mapped[0], mapped[1], *ids)
    return Evaluation(
        rank_features(q_after, g_after, *ids),
        rank_features(q_before, g_before, *ids),
        extra,
    )


def standardize_sets(
    q_features: Tensor, g_features: Tensor, q_camids: np.ndarray, g_camids: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Standardise both by the gallery's statistics of each camera, and by those of all its images for other cameras."""
    q_cameras, g_cameras = (torch.as_tensor(ids, device=g_features.device) for ids in (q_camids, g_camids))
    statistics = CameraStatistics.measure(g_features, g_cameras)
    return statistics.standardize(q_features, q_cameras), statistics.standardize(g_features, g_cameras)


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
