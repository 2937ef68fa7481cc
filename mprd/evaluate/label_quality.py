"""Measure label quality: precision, recall and AUC with identities, label-free scores without. Not used by training.

Shapes: N images, D feature size, k neighbors.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mprd.neighbors.exact import PADDING
from mprd.neighbors.similarity import KnownIds
from mprd.pairs.positives import MetaSet, PositiveTable


def pair_quality(positives: PositiveTable, pids: Tensor, camids: Tensor | None) -> dict[str, float | None]:
    """Return precision and recall of P without self-pairs, over all pairs and over cross-camera pairs.

    A ratio with denominator 0 is None.

    Args:
        pids: int64 `[N]`.
        camids: int64 `[N]`, or None, which leaves out the cross-camera figures.
    """
    ids = positives.ids
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    is_pair = (ids != PADDING) & (ids != rows)
    is_true = is_pair & (pids[ids.clamp(min=0)] == pids[:, None])
    same = group_sizes(pids) - 1
    quality = {
        "pair_precision": ratio(is_true.sum(), is_pair.sum()),
        "pair_recall": ratio(is_true.sum(), same.sum()),
    }
    if camids is not None:
        is_cross = camids[ids.clamp(min=0)] != camids[:, None]
        same_camera = group_sizes(pids * (int(camids.max()) + 1) + camids) - 1
        cross_true = (is_true & is_cross).sum()
        quality["pair_precision_cross"] = ratio(cross_true, (is_pair & is_cross).sum())
        quality["pair_recall_cross"] = ratio(cross_true, (same - same_camera).sum())
    return quality


def labelled_quality(positives: PositiveTable, meta: MetaSet) -> dict[str, float | None]:
    """Return precision and recall of the P_i of labeled images, without using other identities.

    Optimistic where the GCN is trained on the pairs within Z. A ratio with denominator 0 is None.

    Args:
        meta: Z, with all images of its identities.
    """
    ids = positives.ids[meta.ids]
    is_pair = (ids != PADDING) & (ids != meta.ids[:, None])
    pids = KnownIds.of(meta.ids, meta.pids, num_images=len(positives), is_whole=True).pids
    is_true = is_pair & (pids[ids.clamp(min=0)] == pids[meta.ids][:, None])
    return {
        "labelled_precision": ratio(is_true.sum(), is_pair.sum()),
        "labelled_recall": ratio(is_true.sum(), (group_sizes(meta.pids) - 1).sum()),
    }


def group_sizes(ids: Tensor) -> Tensor:
    """Return for each element the number of elements with its id, itself included."""
    _, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
    return counts[inverse]


def ratio(count: Tensor, total: Tensor) -> float | None:
    """Divide two counts; None if the total is 0."""
    return float(count / total) if int(total) else None


def auc(scores: Tensor, is_true: Tensor) -> float | None:
    """Return the area under the ROC curve, with ties counted half; None if a class is empty.

    Args:
        scores: `[n]`, higher for pairs more likely true.
        is_true: bool `[n]`.
    """
    num_true = int(is_true.sum())
    num_false = len(is_true) - num_true
    if num_true == 0 or num_false == 0:
        return None
    _, inverse, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    mean_ranks = (ends - (counts - 1) / 2)[inverse]
    return float((mean_ranks[is_true].sum() - num_true * (num_true + 1) / 2) / (num_true * num_false))


@torch.no_grad()
def neighborhood_agreement(features: Tensor, camids: Tensor | None, *, k: int = 8, block_rows: int = 1024) -> float:
    """Return the label-free score: the agreement of neighborhoods across cameras, in [0, 1].

    It is the mean Jaccard overlap of NN_k, the image itself included, between image i and each of the two images of
    other cameras that are most similar to it. Identities that form tight groups across cameras score 1; features that
    group by camera or at random score low. With one camera, or none known, all other images are eligible.

    Args:
        features: `[N, D]`, unit length, N of at least 2.
        camids: `[N]`, or None.
    """
    near, partners = nearest_and_partners(features, camids, k=k, block_rows=block_rows)
    groups = torch.cat([torch.arange(len(features), device=features.device)[:, None], near], dim=1)
    size = groups.shape[1]
    overlaps = []
    for column in partners.T:
        rows = (column != PADDING).nonzero().squeeze(1)
        shared = (groups[rows][:, :, None] == groups[column[rows]][:, None]).sum((1, 2))
        overlaps.append(shared / (2 * size - shared))
    agreement = torch.cat(overlaps)
    return float(agreement.mean()) if len(agreement) else 0.0


def nearest_and_partners(features: Tensor, camids: Tensor | None, *, k: int, block_rows: int) -> tuple[Tensor, Tensor]:
    """Return the k nearest other images `[N, k]`, and the two nearest of other cameras `[N, 2]`, padded with -1."""
    num_images = len(features)
    near, partners = [], []
    for rows in torch.arange(num_images, device=features.device).split(block_rows):
        similarities = features[rows] @ features.T
        similarities.scatter_(1, rows[:, None], -torch.inf)
        near.append(similarities.topk(min(k, num_images - 1), dim=1).indices)
        if camids is not None and int(camids.min()) != int(camids.max()):
            similarities.masked_fill_(camids[rows][:, None] == camids[None], -torch.inf)
        best = similarities.topk(min(2, num_images - 1), dim=1)
        partners.append(best.indices.masked_fill(best.values == -torch.inf, PADDING))
    return torch.cat(near), torch.cat(partners)


@torch.no_grad()
def silhouette(features: Tensor, positives: PositiveTable, *, block_rows: int = 256) -> float:
    """Return the mean silhouette (Rousseeuw 1987) of P, a label-free measure of the fit of labels and features.

    For image i it is (b - a) / max(a, b), where a is the mean distance to P_i, b the distance to the nearest image
    outside P_i, and distances are 1 - cosine. False positives raise a, missed positives lower b. An image without
    positives counts as -1, the limit for growing a, since with 0 no labels would score above bad labels. An image with
    none outside counts as 0.

    Args:
        features: `[N, D]`, unit length.
        positives: P of the N images.
    """
    total = features.new_zeros(())
    for rows in torch.arange(len(features), device=features.device).split(block_rows):
        distances = 1 - features[rows] @ features.T
        is_positive = positives.mask(rows).scatter_(1, rows[:, None], False)
        outside = distances.masked_fill(is_positive, torch.inf).scatter_(1, rows[:, None], torch.inf).amin(1)
        counts = is_positive.sum(1)
        inside = distances.masked_fill(~is_positive, 0).sum(1) / counts.clamp(min=1)
        # duplicate images have distance 0
        widths = (outside - inside) / torch.maximum(outside, inside).clamp(min=1e-6)
        total += widths.where(counts > 0, -1).where(outside.isfinite(), 0).sum()
    return float(total / len(features))


def mean_random_cosine(features: Tensor, *, generator: torch.Generator) -> float:
    """Return the mean cosine of random pairs of images; near 1 the features have collapsed."""
    ids = torch.randint(len(features), (2, 4096), generator=generator).to(features.device)
    ids = ids[:, ids[0] != ids[1]]
    return float((features[ids[0]] * features[ids[1]]).sum(1).mean()) if ids.shape[1] else 0.0
