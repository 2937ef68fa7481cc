"""Query against gallery with a trained backbone (Sec. 5.1)."""

from __future__ import annotations

from collections.abc import Collection
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
from mprd.neighbors.camera_norm import CameraStatistics

if TYPE_CHECKING:
    from mprd.config.schema import Config, Extra


@dataclass(frozen=True)
class Retrieval:
    """Figures of one evaluation."""

    after_bn: RankMetrics
    """By the feature after the appended batch norm: the headline."""
    before_bn: RankMetrics
    """By the pooled feature before it."""
    extra: dict[Extra, RankMetrics]
    """By the feature after it, and more."""

    def row(self) -> dict[str, float]:
        """Return the figures under the names of the metrics file, fractions in [0, 1]."""
        row = figures(self.after_bn) | {f"{name}_before_bn": v for name, v in figures(self.before_bn).items()}
        for extra, metrics in self.extra.items():
            row |= {f"{name}_{extra}": value for name, value in figures(metrics).items()}
        return row


def figures(metrics: RankMetrics) -> dict[str, float]:
    """Name the figures that the field reports."""
    ranks = {f"rank{k}": float(metrics.cmc[min(k, len(metrics.cmc)) - 1]) for k in (1, 5, 10)}
    return {
        "mAP": float(metrics.mAP),
        "mAP_trapezoid": float(metrics.mAP_trapezoid),
        "mINP": float(metrics.mINP),
        **ranks,
    }


def can_evaluate(dataset: ReidDataset) -> bool:
    """Say whether query and gallery are there, with identities and cameras."""
    return all(len(s) and s.pids is not None and s.camids is not None for s in (dataset.query, dataset.gallery))


def evaluate(
    backbone: Backbone,
    dataset: ReidDataset,
    config: Config,
    *,
    device: torch.device,
    extras: Collection[Extra] = (),
) -> Retrieval:
    """Extract query and gallery, rank, and count (Sec. 5.1).

    Args:
        extras: also the same features k-reciprocally re-ranked, or standardised by camera (Song et al., ICLR 2025).
    """
    features = extract_sets(backbone, dataset, config, device=device)
    return rank_sets(*features, dataset, memory_mb=config.eval.memory_mb, extras=extras)


def rank_sets(
    query_features: tuple[Tensor, Tensor],
    gallery_features: tuple[Tensor, Tensor],
    dataset: ReidDataset,
    *,
    memory_mb: int,
    extras: Collection[Extra] = (),
) -> Retrieval:
    """Rank the gallery for each query by features as `extract_sets` returns them."""
    query, gallery = dataset.query, dataset.gallery
    (q_after, q_before), (g_after, g_before) = query_features, gallery_features
    ids = tuple(known(ids) for ids in (query.pids, gallery.pids, query.camids, gallery.camids))
    extra: dict[Extra, RankMetrics] = {}
    if "reranked" in extras:
        extra["reranked"] = rank_metrics(re_rank(q_after, g_after), *ids)
    if "standardised" in extras:
        extra["standardised"] = rank_features(*without_cameras(q_after, g_after, *ids[2:]), *ids, memory_mb=memory_mb)
    return Retrieval(
        rank_features(q_after, g_after, *ids, memory_mb=memory_mb),
        rank_features(q_before, g_before, *ids, memory_mb=memory_mb),
        extra,
    )


def without_cameras(
    q_features: Tensor, g_features: Tensor, q_camids: np.ndarray, g_camids: np.ndarray
) -> tuple[Tensor, Tensor]:
    """Standardise both by the statistics of each camera in the gallery, by that of all where a camera is not there."""
    q_cameras, g_cameras = (torch.as_tensor(ids, device=g_features.device) for ids in (q_camids, g_camids))
    statistics = CameraStatistics.measure(g_features, g_cameras, num_cameras=int(q_cameras.max()) + 1)
    return statistics.standardize(q_features, q_cameras), statistics.standardize(g_features, g_cameras)


def known(ids: np.ndarray | None) -> np.ndarray:
    """Insist on ids that `can_evaluate` has seen."""
    assert ids is not None
    return ids


def extract_sets(
    backbone: Backbone, dataset: ReidDataset, config: Config, *, device: torch.device
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Extract query and gallery; several workers share the images, and each must call this."""
    query = PlainImages(dataset.query, config.data, packs=dataset.packs)
    gallery = PlainImages(dataset.gallery, config.data, packs=dataset.packs)
    return (
        extract_set(backbone, query, config, device=device),
        extract_set(backbone, gallery, config, device=device),
    )


def extract_set(
    backbone: Backbone, images: PlainImages, config: Config, *, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Extract the images of one split, after and before the batch norm."""
    return extract(
        backbone,
        images,
        batch_size=config.eval.batch_size,
        num_workers=config.data.num_workers,
        device=device,
    )
