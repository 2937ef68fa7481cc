"""Eq. 2, Eq. 6 and MMCL as pure functions.

Shapes: B batch or anchors, N images, P pairs.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ALPHA, LAMBDA_1, LAMBDA_2 = 4.0, 0.2, 0.2
"""Slope and margins of Eq. 2 (Sec. 5.2)."""


def hard_negatives(
    similarities: Tensor, positives: Tensor, doubtful: Tensor | None = None, *, r: float
) -> tuple[Tensor, Tensor]:
    """Find N_i*, the r negatives most similar to each row's image (Eq. 3).

    Args:
        similarities: `[B, N]`, cosine to the memory.
        positives: boolean `[B, N]`.
        doubtful: likewise, images that are neither positives nor negatives; every other image is a negative.
        r: below 1 a share of the negatives, otherwise a number; at least one negative, where there is any.

    Returns:
        Image ids `[B, R]` in descending similarity, and a boolean `[B, R]`, false for the padding of rows with fewer
        hard negatives.

    >>> import torch
    >>> similarities = torch.tensor([[1.0, 0.9, 0.1, 0.3]])
    >>> ids, counts = hard_negatives(similarities, torch.tensor([[True, True, False, False]]), r=1)
    >>> ids.tolist(), counts.tolist()
    ([[3]], [[True]])
    """
    positives = positives if doubtful is None else positives | doubtful
    num_negatives = (~positives).sum(1)
    wanted = (num_negatives.double() * r).long() if r < 1 else torch.full_like(num_negatives, int(r))
    counts = torch.minimum(wanted.clamp(min=1), num_negatives)
    # a width that depends on the data would force a sync with a GPU
    num_images = similarities.shape[1]
    width = max(1, int(num_images * r)) if r < 1 else min(int(r), num_images)
    ids = similarities.masked_fill(positives, -torch.inf).topk(width, dim=1).indices
    return ids, torch.arange(width, device=ids.device) < counts[:, None]


def binomial_deviance(
    similarities: Tensor, positives: Tensor, doubtful: Tensor | None = None, *, delta: float = 5.0, r: float = 0.01
) -> Tensor:
    """Pull positive pairs above lambda_1 and push hard negatives below lambda_2 (Eq. 2, Eq. 3).

    Args:
        similarities: `[B, N]`, <F(x_i), M[j]>; the memory side detached.
        positives: boolean `[B, N]`, P_i; each row holds at least one.
        doubtful: boolean `[B, N]`, neither positives nor negatives.
        r: hard negatives, a share of the negatives below 1, otherwise a number.

    Returns:
        The mean over the batch, a scalar.

    >>> import torch
    >>> similarities = torch.tensor([[1.0, 0.9, 0.1, -0.2]])
    >>> positives = torch.tensor([[True, True, False, False]])
    >>> print(f"{binomial_deviance(similarities, positives, r=1):.4f}")  # 5 (.0400 + .0590) / 2 + .5130
    0.7605
    """
    pull = F.softplus(ALPHA * (LAMBDA_1 - similarities)) * positives
    pull_B = pull.sum(1) / positives.sum(1)
    ids, counts = hard_negatives(similarities.detach(), positives, doubtful, r=r)
    push = F.softplus(ALPHA * (similarities.gather(1, ids) - LAMBDA_2)) * counts
    push_B = push.sum(1) / counts.sum(1).clamp(min=1)
    return (delta * pull_B + push_B).mean()


def mmcl(
    logits: Tensor, positives: Tensor, doubtful: Tensor | None = None, *, delta: float = 5.0, r: float = 0.01
) -> Tensor:
    """Return MLCReID's memory-based multi-label classification loss.

    Per row `delta * mean((1 - positive)^2) + mean((1 + hard negative)^2)`, hard negatives as in Eq. 3;
    the mean over the batch.

    Args:
        logits: `[B, N]`, cosines to the memory.
        positives: boolean `[B, N]`; each row holds at least one.
        doubtful: boolean `[B, N]`, neither positives nor negatives.

    >>> import torch
    >>> mmcl(torch.tensor([[1.0, 0.5, -0.8]]), torch.tensor([[True, False, False]]), r=1)  # 5 * 0 + 1.5^2
    tensor(2.2500)
    """
    pull_B = ((1 - logits) ** 2 * positives).sum(1) / positives.sum(1)
    ids, counts = hard_negatives(logits.detach(), positives, doubtful, r=r)
    push = (1 + logits.gather(1, ids)) ** 2 * counts
    push_B = push.sum(1) / counts.sum(1).clamp(min=1)
    return (delta * pull_B + push_B).mean()


def pair_bce(logits: Tensor, is_positive: Tensor, anchors: Tensor, *, num_anchors: int) -> Tensor:
    """Return the binary cross-entropy of pair graphs, each anchor's means first (Eq. 6).

    Departs from Eq. 6: the printed `1 - log g` of a negative is unbounded below as g goes to 1; we take `-log(1 - g)`,
    and the sign of the first term for both.

    Args:
        logits: `[P]`, before the sigmoid.
        is_positive: boolean `[P]`.
        anchors: `[P]`, in 0..num_anchors-1: the i of the P_g^i or N_g^i that holds the pair.
        num_anchors: n', the number of anchors, including those without a pair.

    >>> import torch
    >>> is_positive, anchors = torch.tensor([True, False]), torch.tensor([0, 0])
    >>> pair_bce(torch.zeros(2), is_positive, anchors, num_anchors=1)  # 2 ln 2
    tensor(1.3863)
    """
    costs = F.binary_cross_entropy_with_logits(logits, is_positive.to(logits.dtype), reduction="none")
    cells = 2 * anchors + is_positive.long()
    zeros = torch.zeros(2 * num_anchors, dtype=costs.dtype, device=costs.device)
    sums = zeros.index_add(0, cells, costs)
    counts = zeros.index_add(0, cells, torch.ones_like(costs))
    return (sums / counts.clamp(min=1)).sum() / num_anchors
