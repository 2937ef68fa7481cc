"""The pairs of every step of a GCN epoch: from unlabeled images and from labeled ones (Sec. 4.2, Eq. 10).

Shapes: A anchors, W width of P, K neighbors, R hard negatives, N images, Z labeled images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mprd.backbone.features import ordered_batches
from mprd.losses import hard_negatives, pair_bce
from mprd.neighbors.exact import PADDING
from mprd.pairs.positives import MetaSet, PositiveTable
from mprd.runtime.device import send
from mprd.runtime.seeding import RngStream, generator

CELLS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Similarities held at a time while pairs are drawn."""


@dataclass(frozen=True)
class LabelledPairs:
    """Pairs with their labels and the anchor whose P_g^i or N_g^i holds them."""

    pairs: Tensor
    """`[P, 2]` int64."""
    is_positive: Tensor
    """`[P]` boolean."""
    anchors: Tensor
    """`[P]` int64, in 0..A-1."""

    def __len__(self) -> int:
        return len(self.pairs)


@dataclass(frozen=True)
class PairSources:
    """What the pairs of a GCN epoch are drawn from; all of it is fixed for the epoch."""

    positives: PositiveTable
    memory: Tensor
    """`[N, D]`."""
    neighbor_ids: Tensor
    """`[N, K]`, padded with -1."""
    perturbed: Tensor
    """`[N]`, the row of an image's perturbed copy behind the memory, -1 without one."""
    meta: MetaSet
    use: Literal["both", "unlabelled", "meta"]
    is_first: bool
    """Whether no P has been labeled yet: negatives are then drawn at random."""
    r: float
    """Hard negatives of Eq. 3."""


@dataclass(frozen=True)
class StepPairs:
    """The pairs of one step, those of unlabeled anchors first."""

    unlabelled: LabelledPairs
    meta: LabelledPairs
    num_anchors: int

    def __len__(self) -> int:
        return len(self.unlabelled) + len(self.meta)

    @property
    def pairs(self) -> Tensor:
        """`[P, 2]`, in the order of the logits."""
        return torch.cat([self.unlabelled.pairs, self.meta.pairs])

    def losses(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_G^u and L_G^m (Eq. 6) of logits `[P]`; a side without pairs costs 0."""
        sides = zip(logits.tensor_split([len(self.unlabelled)]), (self.unlabelled, self.meta), strict=True)
        unlabelled, meta = (
            pair_bce(part, side.is_positive, side.anchors, num_anchors=self.num_anchors) for part, side in sides
        )
        return unlabelled, meta


class StepDraws:
    """Random numbers for the anchors of several steps, a row each.

    Each step has its own generator, so the number of steps drawn at once changes nothing.
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
        """Concatenate the rows of all steps."""
        return torch.cat([function(draw, count) for draw, count in self.steps])


def draw_epoch(sources: PairSources, *, batch_size: int, seed: int, epoch: int) -> list[StepPairs]:
    """Draw the pairs of every step: each step has n'/2 unlabeled and n'/2 labeled anchors (Sec. 4.2)."""
    draw = generator(seed, RngStream.GCN_ORDER, epoch)
    order = torch.randperm(len(sources.memory), generator=draw)
    chunks = ordered_batches(order, max(1, batch_size // 2))
    draws = [generator(seed, RngStream.GCN_PAIRS, epoch, number) for number in range(len(chunks))]
    many = steps_at_once(sources, num_anchors=max(map(len, chunks), default=1))
    return [
        step
        for start in range(0, len(chunks), many)
        for step in draw_steps(chunks[start : start + many], sources, draws[start : start + many])
    ]


def steps_at_once(sources: PairSources, *, num_anchors: int) -> int:
    """Return the number of steps, of so many anchors each, whose pairs are drawn together."""
    device = sources.memory.device
    # each anchor is compared with all images, and its P with a neighbor list
    width = len(sources.memory) + sources.positives.ids.shape[1] * sources.neighbor_ids.shape[1]
    return max(1, CELLS_AT_ONCE.get(device.type, CELLS_AT_ONCE["cpu"]) // (num_anchors * width))


def draw_steps(chunks: list[list[int]], sources: PairSources, draws: list[torch.Generator]) -> list[StepPairs]:
    """Draw the pairs of some steps: for each anchor, and for one labeled image an anchor."""
    counts = [*map(len, chunks)]
    anchors = send([anchor for chunk in chunks for anchor in chunk], sources.memory.device)
    steps = StepDraws(draws, counts)
    nothing = no_pairs(anchors.device)
    unlabelled = nothing if sources.use == "meta" else draw_unlabelled(anchors, sources, steps)
    has_meta = sources.use != "unlabelled" and len(sources.meta) > 0
    meta = draw_meta(anchors, sources, steps) if has_meta else nothing
    sides = zip(split_steps(unlabelled, counts), split_steps(meta, counts), counts, strict=True)
    return [StepPairs(first, second, num_anchors=count) for first, second, count in sides]


def draw_unlabelled(anchors: Tensor, sources: PairSources, draws: StepDraws) -> LabelledPairs:
    """Draw positives from P or from perturbed copies, negatives at random or from N* (Sec. 4.2 item 1)."""
    positives = sources.positives
    if sources.is_first:
        negatives = random_negatives(anchors, positives, num_images=len(sources.memory), draws=draws)
    else:
        negatives = hard_negative_pairs(anchors, positives, sources.memory, r=sources.r, draws=draws)
    return join_pairs(
        [
            perturbed_pairs(anchors, sources.perturbed[anchors]),
            pseudo_positives(anchors, positives, sources.neighbor_ids, draws=draws),
            negatives,
        ]
    )


def draw_meta(images: Tensor, sources: PairSources, draws: StepDraws) -> LabelledPairs:
    """Draw a z_j for each image x_i (Alg. 1 line 4), and its pairs (Sec. 4.2 item 2)."""
    meta = sources.meta
    drawn = send(draws.integers(len(meta)), images.device)
    return random_meta_pairs(meta.ids, meta.pids, drawn, images, draws=draws)


def join_pairs(parts: list[LabelledPairs]) -> LabelledPairs:
    """Concatenate; anchors keep their numbers."""
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
    """Split the pairs of several steps, with `counts[s]` anchors each; anchors of a step count from 0."""
    device = pairs.anchors.device
    sizes = torch.tensor(counts)
    numbers = send(torch.arange(len(counts)).repeat_interleave(sizes), device)
    firsts = send(sizes.cumsum(0) - sizes, device)
    steps, order = numbers[pairs.anchors].sort(stable=True)
    found = torch.bincount(steps, minlength=len(counts)).tolist()
    columns = (pairs.pairs[order], pairs.is_positive[order], pairs.anchors[order] - firsts[steps])
    return [LabelledPairs(*step) for step in zip(*(column.split(found) for column in columns), strict=True)]


def label(first: Tensor, second: Tensor, wanted: Tensor, *, is_positive: bool) -> LabelledPairs:
    """Pair `first` `[A]` with the wanted entries of `second` `[A, X]`, but no image with itself."""
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
    """Pair each image with its perturbed copy as a positive (Sec. 4.2 item 1, first iteration).

    Args:
        perturbed_ids: `[A]`, the row of x'_i behind the memory, -1 for anchors without a copy.
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

    An image that happens to be in P_i, or to be refused by `pairs.limit`, is skipped.
    """
    second = send(draws.integers(num_images), anchors.device)[:, None]
    known = torch.cat([positives.ids, positives.refused], dim=1)[anchors]
    is_known = (known == second).any(1, keepdim=True)
    return label(anchors, second, ~is_known, is_positive=False)


def hard_negative_pairs(
    anchors: Tensor, positives: PositiveTable, memory: Tensor, *, r: float, draws: StepDraws
) -> LabelledPairs:
    """Pair each anchor with |P_i| random members of N_i* as negatives (Sec. 4.2 item 1, Eq. 3)."""
    mask = positives.mask(anchors)
    ids_AR, counts_AR = hard_negatives(memory[anchors] @ memory.T, mask, positives.doubtful(anchors), r=r)
    return label(anchors, ids_AR, choose(counts_AR, mask.sum(1), draws), is_positive=False)


def random_meta_pairs(
    meta_ids: Tensor, meta_pids: Tensor, drawn: Tensor, images: Tensor, *, draws: StepDraws
) -> LabelledPairs:
    """Pair labeled images by the paper's random rule (Sec. 4.2 item 2).

    For each drawn z: one other image of its identity (positive), one labeled image of another identity
    (negative), and one image x_j of the training set (negative). Only labels of Z are read: an x_j outside of Z
    has another identity where Z holds all images of its identities, and is taken to have one where it may not.

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
    return join_pairs(
        [
            label(first, others, same, is_positive=True),
            label(first, others, different, is_positive=False),
            label(first, images[:, None], ~is_known_match[:, None], is_positive=False),
        ]
    )
