"""Pairs with labels for the GCN (Sec. 4.2), of one step or of several at once.

Shapes: A anchors, W width of P, K neighbors, R hard negatives, N images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mprd.losses import hard_negatives
from mprd.pairs.rules import PADDING, PositiveTable
from mprd.runtime.device import send


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs, their labels, and the anchor in whose P_g^i or N_g^i each stands."""

    pairs: Tensor
    """`[P, 2]` int64."""
    is_positive: Tensor
    """`[P]` boolean."""
    anchors: Tensor
    """`[P]` int64, in 0..A-1."""

    def __len__(self) -> int:
        return len(self.pairs)


class StepDraws:
    """Random numbers for the anchors of several steps, a row each.

    Each step draws from a generator of its own, so that how many steps are drawn at once changes nothing.
    """

    def __init__(self, generators: Sequence[torch.Generator], counts: Sequence[int]) -> None:
        """Draw for `counts[s]` anchors of step s from `generators[s]`."""
        self.steps = list(zip(generators, counts, strict=True))

    def uniform(self, num_columns: int) -> Tensor:
        """Draw from 0..1, float32 `[A, num_columns]` on the CPU."""
        return self.rows(lambda draw, count: torch.rand(count, num_columns, generator=draw))

    def integers(self, high: int) -> Tensor:
        """Draw from 0..high-1, int64 `[A]` on the CPU."""
        return self.rows(lambda draw, count: torch.randint(high, (count,), generator=draw))

    def rows(self, function: Callable[[torch.Generator, int], Tensor]) -> Tensor:
        """Put the rows of all steps one behind the other."""
        return torch.cat([function(draw, count) for draw, count in self.steps])


def join(parts: list[LabelledPairs]) -> LabelledPairs:
    """Concatenate, anchors as they are."""
    return LabelledPairs(
        torch.cat([p.pairs for p in parts]),
        torch.cat([p.is_positive for p in parts]),
        torch.cat([p.anchors for p in parts]),
    )


def no_pairs(device: torch.device) -> LabelledPairs:
    """Return an empty set of pairs."""
    ids = torch.zeros(0, dtype=torch.long, device=device)
    return LabelledPairs(ids.reshape(0, 2), ids.bool(), ids)


def split_steps(pairs: LabelledPairs, counts: Sequence[int]) -> list[LabelledPairs]:
    """Part the pairs of several steps, with `counts[s]` anchors each, and count each step's anchors from 0."""
    device = pairs.anchors.device
    sizes = torch.tensor(counts)
    numbers = send(torch.arange(len(counts)).repeat_interleave(sizes), device)
    firsts = send(sizes.cumsum(0) - sizes, device)
    steps, order = numbers[pairs.anchors].sort(stable=True)
    found = torch.bincount(steps, minlength=len(counts)).tolist()
    columns = (pairs.pairs[order], pairs.is_positive[order], pairs.anchors[order] - firsts[steps])
    return [LabelledPairs(*step) for step in zip(*(column.split(found) for column in columns), strict=True)]


def label(first: Tensor, second: Tensor, wanted: Tensor, *, is_positive: bool) -> LabelledPairs:
    """Pair `first` `[A]` with the wanted entries of `second` `[A, X]`; images are not paired with themselves."""
    wanted = wanted & (second != PADDING) & (second != first[:, None])
    anchors, columns = wanted.nonzero(as_tuple=True)
    pairs = torch.stack([first[anchors], second[anchors, columns]], dim=1)
    return LabelledPairs(pairs, torch.full((len(pairs),), is_positive, device=pairs.device), anchors)


def choose(is_valid: Tensor, counts: Tensor, draws: StepDraws) -> Tensor:
    """Draw `counts[a]` of the valid columns of each row without replacement; boolean like `is_valid`."""
    keys = send(draws.uniform(is_valid.shape[1]), is_valid.device).masked_fill(~is_valid, -1.0)
    ranks = keys.argsort(dim=1, descending=True, stable=True).argsort(dim=1, stable=True)
    return (ranks < counts[:, None]) & is_valid


def perturbed_pairs(anchors: Tensor, perturbed_ids: Tensor) -> LabelledPairs:
    """Pair each image with its perturbed copy, as positives (Sec. 4.2 item 1, first iteration).

    Args:
        perturbed_ids: `[A]`, the row of x'_i behind the memory, or -1 for anchors that take no such pair.
    """
    second = perturbed_ids[:, None]
    return label(anchors, second, torch.ones_like(second, dtype=torch.bool), is_positive=True)


def pseudo_positives(
    anchors: Tensor, positives: PositiveTable, neighbor_ids: Tensor, *, draws: StepDraws
) -> LabelledPairs:
    """Draw r_i from P_i and pair it with every other r_j of P_i that lies in NN_k(r_i) (Sec. 4.2 item 1).

    Args:
        neighbor_ids: `[N, K]`, NN_k padded with -1.
    """
    members_AW = positives.ids[anchors]
    is_member_AW = members_AW != PADDING
    one_A = torch.ones_like(anchors)
    drawn_A = choose(is_member_AW, one_A, draws).long().argmax(1)
    first_A = members_AW.gather(1, drawn_A[:, None]).squeeze(1)
    near_AK = neighbor_ids[first_A]
    is_near_AW = (members_AW[:, :, None] == near_AK[:, None, :]).any(2)
    return label(first_A, members_AW, is_near_AW & is_member_AW, is_positive=True)


def random_negatives(anchors: Tensor, positives: PositiveTable, *, num_images: int, draws: StepDraws) -> LabelledPairs:
    """Pair each anchor with a random other image as a negative (Sec. 4.2 item 1, first iteration).

    An image is passed over where it happens to stand in P_i.
    """
    second = send(draws.integers(num_images), anchors.device)[:, None]
    is_known = (positives.ids[anchors] == second).any(1, keepdim=True)
    return label(anchors, second, ~is_known, is_positive=False)


def hard_negative_pairs(
    anchors: Tensor, positives: PositiveTable, memory: Tensor, *, r: float, draws: StepDraws
) -> LabelledPairs:
    """Pair each anchor with |P_i| random members of N_i* as negatives (Sec. 4.2 item 1, Eq. 3)."""
    mask = positives.mask(anchors)
    ids_AR, counts_AR = hard_negatives(memory[anchors] @ memory.T, mask, r=r)
    return label(anchors, ids_AR, choose(counts_AR, mask.sum(1), draws), is_positive=False)


def random_meta_pairs(
    meta_ids: Tensor, meta_pids: Tensor, drawn: Tensor, images: Tensor, *, draws: StepDraws
) -> LabelledPairs:
    """Pair labeled images by the paper's random rule (Sec. 4.2 item 2).

    For each drawn z: one other image of its identity (positive), one labeled image of another identity
    (negative), and one image x_j of the training set (negative). Only labels of Z are read: an x_j outside Z
    is of another identity because Z holds all images of its identities.

    Args:
        meta_ids: `[Z]`, image ids of Z. meta_pids: `[Z]`, their identities.
        drawn: `[A]`, positions in Z. images: `[A]`, the x_j.
    """
    first = meta_ids[drawn]
    is_same = meta_pids[drawn][:, None] == meta_pids[None]
    others = meta_ids[None].expand(len(drawn), -1)
    one = torch.ones_like(drawn)
    same = choose(is_same & (others != first[:, None]), one, draws)
    different = choose(~is_same, one, draws)
    is_known_match = ((others == images[:, None]) & is_same).any(1)
    return join(
        [
            label(first, others, same, is_positive=True),
            label(first, others, different, is_positive=False),
            label(first, images[:, None], ~is_known_match[:, None], is_positive=False),
        ]
    )


def candidate_meta_pairs(
    meta_ids: Tensor,
    meta_pids: Tensor,
    drawn: Tensor,
    images: Tensor,
    neighbor_ids: Tensor,
    *,
    draws: StepDraws,
) -> LabelledPairs:
    """Label each drawn z's own candidates NN_k(z), beside the random pairs.

    Departs from Sec. 4.2 item 2: pairs drawn at random are far easier than the pairs that Eq. 7 judges, which
    leaves mu uncalibrated; the candidates of a labeled image are of the judged kind.
    """
    first = meta_ids[drawn]
    near = neighbor_ids[first]
    hits = (near[:, :, None] == meta_ids[None, None]) & (meta_pids[drawn][:, None] == meta_pids[None])[:, None]
    is_match = hits.any(2)
    return join(
        [
            random_meta_pairs(meta_ids, meta_pids, drawn, images, draws=draws),
            label(first, near, is_match, is_positive=True),
            label(first, near, ~is_match, is_positive=False),
        ]
    )
