"""How good the labels are: with identities known their precision, recall and AUC; without, a label-free score.

None of it reaches training. Shapes: N images, W width of P, P pairs, C cameras.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mprd.pairs import PADDING, PositiveTable


def pair_quality(positives: PositiveTable, pids: Tensor, camids: Tensor | None) -> dict[str, float | None]:
    """Return precision and recall of P without the self-pairs, over all pairs and over cross-camera pairs.

    A share of nothing is None.
    """
    ids = positives.ids
    rows = torch.arange(len(ids), device=ids.device)[:, None]
    is_pair = (ids != PADDING) & (ids != rows)
    is_true = is_pair & (pids[ids.clamp(min=0)] == pids[:, None])
    same = group_sizes(pids) - 1
    quality = {
        "pair_precision": share(is_true.sum(), is_pair.sum()),
        "pair_recall": share(is_true.sum(), same.sum()),
    }
    if camids is not None:
        is_cross = camids[ids.clamp(min=0)] != camids[:, None]
        same_camera = group_sizes(pids * (int(camids.max()) + 1) + camids) - 1
        cross_true = (is_true & is_cross).sum()
        quality["pair_precision_cross"] = share(cross_true, (is_pair & is_cross).sum())
        quality["pair_recall_cross"] = share(cross_true, (same - same_camera).sum())
    return quality


def group_sizes(ids: Tensor) -> Tensor:
    """Return for each element how many elements carry its id, itself included."""
    _, inverse, counts = ids.unique(return_inverse=True, return_counts=True)
    return counts[inverse]


def share(part: Tensor, whole: Tensor) -> float | None:
    """Divide two counts; None where there is nothing to divide by."""
    return float(part / whole) if int(whole) else None


def auc(scores: Tensor, is_true: Tensor) -> float | None:
    """Return the area under the ROC curve, ties counted half; None where one class is missing."""
    num_true = int(is_true.sum())
    num_false = len(is_true) - num_true
    if num_true == 0 or num_false == 0:
        return None
    _, inverse, counts = scores.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    mean_ranks = (ends - (counts - 1) / 2)[inverse]
    return float((mean_ranks[is_true].sum() - num_true * (num_true + 1) / 2) / (num_true * num_false))


@torch.no_grad()
def reciprocity(features: Tensor, camids: Tensor | None, *, block_rows: int = 1024) -> float:
    """Return the share of an image's nearest neighbours in each other camera that are mutual: a label-free score.

    For image i and camera c other than its own let j be i's nearest image in c; the pair is mutual when i is
    j's nearest in i's camera. Features that ignore the camera and tell people apart make such pairs the rule.
    With one camera, or none known, the nearest other image takes the place of j.
    """
    num_images = len(features)
    if camids is None or len(camids.unique()) < 2:
        camids = torch.zeros(num_images, dtype=torch.long, device=features.device)
    _, cameras = camids.unique(return_inverse=True)
    nearest_NC = nearest_by_camera(features, cameras, block_rows=block_rows)
    back = nearest_NC[nearest_NC.clamp(min=0), cameras[:, None]]
    is_mutual = back == torch.arange(num_images, device=features.device)[:, None]
    counts = nearest_NC != PADDING
    if nearest_NC.shape[1] > 1:
        counts.scatter_(1, cameras[:, None], False)
    return float((is_mutual & counts).sum() / counts.sum().clamp(min=1))


def nearest_by_camera(features: Tensor, cameras: Tensor, *, block_rows: int) -> Tensor:
    """Return each image's most similar other image in each camera, `[N, C]`; -1 where there is none."""
    members = [(cameras == c).nonzero().squeeze(1) for c in range(int(cameras.max()) + 1)]
    nearest = torch.full((len(features), len(members)), PADDING, device=features.device)
    for rows in torch.arange(len(features), device=features.device).split(block_rows):
        similarities = features[rows] @ features.T
        similarities[torch.arange(len(rows), device=rows.device), rows] = -torch.inf
        for camera, ids in enumerate(members):
            best = similarities[:, ids].max(1)
            nearest[rows, camera] = torch.where(best.values > -torch.inf, ids[best.indices], PADDING)
    return nearest


def mean_random_cosine(features: Tensor, *, generator: torch.Generator, num_pairs: int = 4096) -> float:
    """Return the mean cosine of random pairs of images; near 1 the features have collapsed to one point."""
    ids = torch.randint(len(features), (2, num_pairs), generator=generator).to(features.device)
    ids = ids[:, ids[0] != ids[1]]
    return float((features[ids[0]] * features[ids[1]]).sum(1).mean()) if ids.shape[1] else 0.0
