"""The pairs of every step of a GCN epoch: from unlabelled images and from labelled ones (Sec. 4.2, Eq. 10)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mprd import gcn_pairs
from mprd.features import ordered_batches
from mprd.gcn_pairs import LabelledPairs
from mprd.losses import pair_bce
from mprd.pairs import MetaSet, PositiveTable
from mprd.seeding import Draw, generator


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
    """Whether no P has been labelled yet: negatives are then drawn at random."""
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

    def losses(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_G^u and L_G^m (Eq. 6) of logits `[P]`; a side without pairs costs 0."""
        sides = zip(logits.tensor_split([len(self.unlabelled)]), (self.unlabelled, self.meta), strict=True)
        unlabelled, meta = (
            pair_bce(part, side.is_positive, side.anchors, num_anchors=self.num_anchors) for part, side in sides
        )
        return unlabelled, meta


def draw_pool(sources: PairSources, *, batch_size: int, passes: int, seed: int, epoch: int) -> list[PoolStep]:
    """Draw the pairs of every step: each step takes n'/2 unlabelled and n'/2 labelled anchors (Sec. 4.2)."""
    draw = generator(seed, Draw.GCN_ORDER, epoch)
    orders = [torch.randperm(len(sources.memory), generator=draw) for _ in range(passes)]
    chunks = [chunk for order in orders for chunk in ordered_batches(order, max(1, batch_size // 2))]
    device = sources.memory.device
    return [
        draw_step(torch.tensor(chunk, device=device), sources, generator(seed, Draw.GCN_PAIRS, epoch, number))
        for number, chunk in enumerate(chunks)
    ]


def draw_step(anchors: Tensor, sources: PairSources, draw: torch.Generator) -> PoolStep:
    """Draw the pairs of one step for anchors `[A]`, and of one labelled image for each of them."""
    nothing = gcn_pairs.no_pairs(anchors.device)
    unlabelled = nothing if sources.use == "meta" else draw_unlabelled(anchors, sources, draw)
    has_meta = sources.use != "unlabelled" and len(sources.meta) > 0
    meta = draw_meta(anchors, sources, draw) if has_meta else nothing
    return PoolStep(unlabelled, meta, num_anchors=len(anchors))


def draw_unlabelled(anchors: Tensor, sources: PairSources, draw: torch.Generator) -> LabelledPairs:
    """Draw positives from P or from perturbed copies, negatives at random or from N* (Sec. 4.2 item 1)."""
    positives = sources.positives
    if sources.is_first:
        negatives = gcn_pairs.random_negatives(anchors, positives, num_images=len(sources.memory), generator=draw)
    else:
        negatives = gcn_pairs.hard_negative_pairs(anchors, positives, sources.memory, r=sources.r, generator=draw)
    return gcn_pairs.join(
        [
            gcn_pairs.perturbed_pairs(anchors, sources.perturbed[anchors]),
            gcn_pairs.pseudo_positives(anchors, positives, sources.neighbor_ids, generator=draw),
            negatives,
        ]
    )


def draw_meta(images: Tensor, sources: PairSources, draw: torch.Generator) -> LabelledPairs:
    """Draw a z_j for each image x_i (Alg. 1 line 4), and its pairs (Sec. 4.2 item 2)."""
    meta = sources.meta
    drawn = torch.randint(len(meta), (len(images),), generator=draw).to(images.device)
    if sources.meta_pairs == "candidates":
        return gcn_pairs.candidate_meta_pairs(meta.ids, meta.pids, drawn, images, sources.neighbor_ids, generator=draw)
    return gcn_pairs.random_meta_pairs(meta.ids, meta.pids, drawn, images, generator=draw)
