"""The pairs of every step of a GCN epoch: from unlabelled images and from labeled ones (Sec. 4.2, Eq. 10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mprd.backbone.features import ordered_batches
from mprd.engine import gcn_pairs
from mprd.engine.gcn_pairs import LabelledPairs, StepDraws
from mprd.losses import pair_bce, pair_weights
from mprd.pairs.rules import MetaSet, PositiveTable
from mprd.runtime.device import send
from mprd.runtime.seeding import RngStream, generator

CELLS_AT_ONCE = {"cpu": 2**20, "cuda": 2**26}
"""Similarities that are held at a time while pairs are drawn."""


@dataclass(frozen=True)
class PairSources:
    """Where the pairs of a GCN epoch are drawn from; all of it as it stood when the epoch began."""

    positives: PositiveTable
    memory: Tensor
    """`[N, D]`."""
    neighbor_ids: Tensor
    """`[N, K]`, padded with -1."""
    perturbed: Tensor
    """`[N]`, the row of an image's perturbed copy behind the memory, -1 without one."""
    meta: MetaSet
    meta_pairs: Literal["random", "candidates"]
    use: Literal["both", "unlabelled", "meta"]
    is_first: bool
    """Whether no P has been labeled yet: negatives are then drawn at random."""
    r: float
    """Hard negatives of Eq. 3."""


@dataclass(frozen=True)
class PoolStep:
    """The pairs of one step, those of unlabelled anchors first."""

    unlabelled: LabelledPairs
    meta: LabelledPairs
    num_anchors: int

    def __len__(self) -> int:
        return len(self.unlabelled) + len(self.meta)

    @property
    def pairs(self) -> Tensor:
        """`[P, 2]`, in the order of the logits."""
        return torch.cat([self.unlabelled.pairs, self.meta.pairs])

    def targets(self, eta: float) -> tuple[Tensor, Tensor]:
        """Return which pairs are positive and what each one's cross-entropy counts for in L_G^u + eta L_G^m, `[P]`."""
        is_positive = torch.cat([self.unlabelled.is_positive, self.meta.is_positive])
        # as if the labeled side had anchors of its own
        anchors = torch.cat([self.unlabelled.anchors, self.meta.anchors + self.num_anchors])
        weights = 2 * pair_weights(is_positive, anchors, num_anchors=2 * self.num_anchors)
        weights[len(self.unlabelled) :] *= eta
        return is_positive, weights

    def losses(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_G^u and L_G^m (Eq. 6) of logits `[P]`; a side without pairs costs 0."""
        sides = zip(logits.tensor_split([len(self.unlabelled)]), (self.unlabelled, self.meta), strict=True)
        unlabelled, meta = (
            pair_bce(part, side.is_positive, side.anchors, num_anchors=self.num_anchors) for part, side in sides
        )
        return unlabelled, meta


def draw_pool(sources: PairSources, *, batch_size: int, passes: int, seed: int, epoch: int) -> list[PoolStep]:
    """Draw the pairs of every step: each step takes n'/2 unlabelled and n'/2 labeled anchors (Sec. 4.2)."""
    draw = generator(seed, RngStream.GCN_ORDER, epoch)
    orders = [torch.randperm(len(sources.memory), generator=draw) for _ in range(passes)]
    chunks = [chunk for order in orders for chunk in ordered_batches(order, max(1, batch_size // 2))]
    draws = [generator(seed, RngStream.GCN_PAIRS, epoch, number) for number in range(len(chunks))]
    many = steps_at_once(sources, num_anchors=max(map(len, chunks), default=1))
    return [
        step
        for start in range(0, len(chunks), many)
        for step in draw_steps(chunks[start : start + many], sources, draws[start : start + many])
    ]


def steps_at_once(sources: PairSources, *, num_anchors: int) -> int:
    """Say for how many steps of so many anchors pairs are drawn in one go."""
    device = sources.memory.device
    # an anchor is held against all images, and its P against a list
    width = len(sources.memory) + sources.positives.ids.shape[1] * sources.neighbor_ids.shape[1]
    return max(1, CELLS_AT_ONCE.get(device.type, CELLS_AT_ONCE["cpu"]) // (num_anchors * width))


def draw_steps(chunks: list[list[int]], sources: PairSources, draws: list[torch.Generator]) -> list[PoolStep]:
    """Draw the pairs of some steps, each for its anchors and for one labeled image for each of them."""
    counts = [*map(len, chunks)]
    anchors = send([anchor for chunk in chunks for anchor in chunk], sources.memory.device)
    steps = StepDraws(draws, counts)
    nothing = gcn_pairs.no_pairs(anchors.device)
    unlabelled = nothing if sources.use == "meta" else draw_unlabelled(anchors, sources, steps)
    has_meta = sources.use != "unlabelled" and len(sources.meta) > 0
    meta = draw_meta(anchors, sources, steps) if has_meta else nothing
    sides = zip(gcn_pairs.split_steps(unlabelled, counts), gcn_pairs.split_steps(meta, counts), counts, strict=True)
    return [PoolStep(first, second, num_anchors=count) for first, second, count in sides]


def draw_unlabelled(anchors: Tensor, sources: PairSources, draws: StepDraws) -> LabelledPairs:
    """Draw positives from P or from perturbed copies, negatives at random or from N* (Sec. 4.2 item 1)."""
    positives = sources.positives
    if sources.is_first:
        negatives = gcn_pairs.random_negatives(anchors, positives, num_images=len(sources.memory), draws=draws)
    else:
        negatives = gcn_pairs.hard_negative_pairs(anchors, positives, sources.memory, r=sources.r, draws=draws)
    return gcn_pairs.join(
        [
            gcn_pairs.perturbed_pairs(anchors, sources.perturbed[anchors]),
            gcn_pairs.pseudo_positives(anchors, positives, sources.neighbor_ids, draws=draws),
            negatives,
        ]
    )


def draw_meta(images: Tensor, sources: PairSources, draws: StepDraws) -> LabelledPairs:
    """Draw a z_j for each image x_i (Alg. 1 line 4), and its pairs (Sec. 4.2 item 2)."""
    meta = sources.meta
    drawn = send(draws.integers(len(meta)), images.device)
    if sources.meta_pairs == "candidates":
        return gcn_pairs.candidate_meta_pairs(meta.ids, meta.pids, drawn, images, sources.neighbor_ids, draws=draws)
    return gcn_pairs.random_meta_pairs(meta.ids, meta.pids, drawn, images, draws=draws)
