"""Which images become positives: the threshold of Eq. 7, and the rules of Tables 1 and 2 (Sec. 5.3).

Shapes: B batch, N images, K candidates of an image, W width of the widest P_i, D feature size.
A rule returns a boolean `[B, N]` in which an image's own index is always true (Alg. 1 line 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from mprd.neighbors.exact import PADDING
from mprd.pairs.positives import MetaSet

KNN_K = 8
"""K of the rule "KNN" (Sec. 5.3)."""


def mask_to_ids(mask: Tensor) -> Tensor:
    """Turn a boolean `[B, N]` into ids `[B, W]`, rising, padded with -1."""
    counts = mask.sum(1)
    width = max(1, int(counts.max())) if len(mask) else 1
    ids = torch.full((len(mask), width), PADDING, device=mask.device)
    ids[torch.arange(width, device=mask.device) < counts[:, None]] = mask.nonzero()[:, 1]
    return ids


def accept(rows: Tensor, candidates: Tensor, likelihoods: Tensor, *, mu: float) -> Tensor:
    """Keep the candidates with g_ij > mu (Eq. 7).

    Args:
        rows: `[B]`, the images i.
        candidates: `[B, K]`, NN_k(i), padded with -1.
        likelihoods: `[B, K]`, g_ij; whatever stands at padding does not count.

    Returns:
        `[B, 1 + K]`: P_i with i first, -1 where a candidate was refused.
    """
    refused = (likelihoods <= mu) | (candidates == PADDING)
    return torch.cat([rows[:, None], candidates.masked_fill(refused, PADDING)], dim=1)


def own_index(targets: Tensor, num_images: int) -> Tensor:
    """Mark each image's own index: the labels of "Single" (Table 1)."""
    mask = torch.zeros(len(targets), num_images, dtype=torch.bool, device=targets.device)
    return mask.scatter_(1, targets[:, None], True)


def knn(memory: Tensor, targets: Tensor, *, k: int = KNN_K) -> Tensor:
    """Mark the k images most similar to each target, and itself: "KNN" (Table 1).

    >>> memory = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    >>> knn(memory, torch.tensor([0]), k=1).tolist()
    [[True, True, False, False]]
    """
    own = own_index(targets, len(memory))
    similarities = (memory[targets] @ memory.T).masked_fill(own, -torch.inf)
    nearest = similarities.topk(min(k, len(memory) - 1), dim=1).indices
    return own.scatter(1, nearest, True)


def ss(memory: Tensor, targets: Tensor, *, similarity: float) -> Tensor:
    """Mark the images whose cosine to a target is above a threshold, and itself: "SS" (Table 1).

    >>> memory = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    >>> ss(memory, torch.tensor([0]), similarity=0.5).tolist()
    [[True, True, True, False]]
    """
    return (memory[targets] @ memory.T > similarity) | own_index(targets, len(memory))


def supervised(pids: Tensor, targets: Tensor) -> Tensor:
    """Mark the images of each target's identity: "Super." (Table 1).

    >>> supervised(torch.tensor([7, 8, 7]), torch.tensor([0])).tolist()
    [[True, False, True]]
    """
    return pids[targets][:, None] == pids[None]


def relabel(mask: Tensor, targets: Tensor, meta: MetaSet) -> Tensor:
    """Give targets within Z their true positives within Z: MLCR(+5id) of Table 2.

    Args:
        mask: boolean `[B, N]`, the pseudo labels.
        meta: Z.
    """
    is_meta = torch.zeros(mask.shape[1], dtype=torch.bool, device=mask.device)
    is_meta[meta.ids] = True
    pids = meta.pids.new_zeros(mask.shape[1])
    pids[meta.ids] = meta.pids
    truth = supervised(pids, targets) & is_meta
    return torch.where(is_meta[targets][:, None], truth, mask)


def mplp(memory: Tensor, targets: Tensor, *, t: float) -> Tensor:
    """Predict labels by similarity and cycle consistency: MLCReID's MPLP.

    For target i, the images are sorted by cosine to i (i among them). With `n` the number above t and
    `top = max(n, 10)`, candidates are taken in order until one ranks i's own best match beyond `top`
    (counted from 0); at most n are kept, and i always is.

    Args:
        memory: `[N, D]`, unit length.
        targets: `[B]`, image ids.

    Returns:
        Boolean `[B, N]`.

    >>> memory = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, 1.0]])
    >>> mplp(memory, torch.tensor([0]), t=0.7).tolist()
    [[True, True, False, False]]
    """
    if len(targets) == 0:
        return own_index(targets, len(memory))
    similarities_BN = memory[targets] @ memory.T
    counts_B = (similarities_BN > t).sum(1)
    tops_B = counts_B.clamp(min=10)
    # only the first n of the prefix can be kept, so no candidate beyond n needs its ranking
    width = max(1, int(counts_B.max()))
    order_BK = similarities_BN.argsort(dim=1, descending=True, stable=True)[:, :width]
    is_candidate_BK = torch.arange(width, device=memory.device) < counts_B[:, None]
    best_B = order_BK[:, 0]
    ranks_BK = reciprocal_ranks(memory, order_BK, best_B, is_candidate_BK)
    kept_BK = (ranks_BK <= tops_B[:, None]).long().cumprod(dim=1).bool() & is_candidate_BK
    labels = own_index(targets, len(memory))
    rows, columns = kept_BK.nonzero(as_tuple=True)
    labels[rows, order_BK[rows, columns]] = True
    return labels


def reciprocal_ranks(memory: Tensor, candidates: Tensor, best: Tensor, is_candidate: Tensor) -> Tensor:
    """Rank `best[b]` in the ranking of each candidate j of row b: the number of images nearer to j, `[B, K]`.

    A candidate's own row of the similarity matrix is computed once, in blocks.
    """
    ranks = torch.zeros_like(candidates)
    rows, columns = is_candidate.nonzero(as_tuple=True)
    images, inverse = candidates[rows, columns].unique(return_inverse=True)
    order = inverse.argsort(stable=True)
    block = 256
    starts = torch.searchsorted(inverse[order], torch.arange(0, len(images) + block, block, device=memory.device))
    for number, (start, stop) in enumerate(zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True)):
        pairs = order[start:stop]
        similarities = memory[images[number * block : (number + 1) * block]] @ memory.T
        for chunk in pairs.split(block):
            row = similarities[inverse[chunk] - number * block]
            own = row.gather(1, best[rows[chunk]][:, None])
            ranks[rows[chunk], columns[chunk]] = (row > own).sum(1)
    return ranks
