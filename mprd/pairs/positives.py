"""P, the positives of all images, with the labeled images Z and the limit that they set (Sec. 4.1, 4.2).

Shapes: B batch, N images, W width of the widest P_i, Z labeled images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.config.schema import Config
from mprd.data.datasets import ReidDataset
from mprd.data.labeled import choose_labeled
from mprd.neighbors.exact import PADDING


@dataclass(frozen=True, eq=False)
class MetaSet:
    """Z: the labeled images (Sec. 4.2). Only evaluation reads identities of any other image."""

    ids: Tensor
    """`[Z]`, image ids; empty for MPRD(0id)."""
    pids: Tensor
    """`[Z]`, their identities."""

    @classmethod
    def empty(cls, device: torch.device | str = "cpu") -> MetaSet:
        """Return no labeled images."""
        nothing = torch.zeros(0, dtype=torch.long, device=device)
        return cls(nothing, nothing)

    def __len__(self) -> int:
        return len(self.ids)

    def table(self) -> Tensor:
        """Return ids and identities as one tensor `[2, Z]`, as a checkpoint keeps them."""
        return torch.stack([self.ids, self.pids])


def choose_meta(config: Config, dataset: ReidDataset, device: torch.device) -> MetaSet:
    """Choose Z (Sec. 4.2): all images of `meta.num_ids` identities drawn with the seed; none if unused."""
    if not config.uses_meta:
        return MetaSet.empty(device)
    chosen = choose_labeled(dataset.train, dataset.root, config.meta, seed=config.train.seed)
    return MetaSet(*(torch.as_tensor(part, device=device) for part in chosen))


class PositiveTable:
    """P: for each image the ids of its positives, itself included; `[N, W]` padded with -1 anywhere in a row."""

    def __init__(self, num_images: int, device: torch.device | str = "cpu") -> None:
        """Start with P_i = {i} (Alg. 1 line 1)."""
        self.ids = torch.arange(num_images, device=device)[:, None].clone()

    def __len__(self) -> int:
        return len(self.ids)

    def set_rows(self, rows: Tensor, ids: Tensor) -> None:
        """Replace the P_i of the images `rows` `[B]` by `ids` `[B, W']`, padded with -1."""
        grow = ids.shape[1] - self.ids.shape[1]
        if grow > 0:
            self.ids = F.pad(self.ids, (0, grow), value=PADDING)
        self.ids[rows] = F.pad(ids, (0, max(0, -grow)), value=PADDING)

    def mask(self, rows: Tensor) -> Tensor:
        """Return P_i of the images `rows` `[B]` as a boolean `[B, N]`."""
        mask = torch.zeros(len(rows), len(self) + 1, dtype=torch.bool, device=self.ids.device)
        # padding lands in an extra column, which is cut off
        ids = self.ids[rows]
        mask.scatter_(1, torch.where(ids == PADDING, len(self), ids), True)
        return mask[:, :-1]

    def counts(self) -> Tensor:
        """Return |P_i|, `[N]`."""
        return (self.ids != PADDING).sum(1)


@dataclass(frozen=True, eq=False)
class PositiveLimit:
    """Most positives of an image, under its own camera and under the others (not in the paper).

    Labeled identities bound the number of positives per camera.
    """

    camids: Tensor
    """`[N]`, the images' cameras; all 0 where they are unknown."""
    same: int
    """Positives under the image's own camera, itself left out."""
    other: int
    """Positives under the other cameras."""

    @classmethod
    def of_labelled(cls, meta: MetaSet, camids: Tensor | None, num_images: int) -> PositiveLimit:
        """Take the most that any image of Z has within Z, which must hold whole identities and not be empty."""
        camids = meta.ids.new_zeros(num_images) if camids is None else camids
        is_mate = meta.pids[:, None] == meta.pids
        is_near = camids[meta.ids][:, None] == camids[meta.ids]
        same, other = (is_mate & is_near).sum(1).amax() - 1, (is_mate & ~is_near).sum(1).amax()
        return cls(camids, int(same), int(other))

    def keep(self, rows: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
        """Keep the positives of highest score.

        Args:
            rows: `[B]`, the images i.
            ids: `[B, W]`, P_i padded with -1; i is always kept.
            scores: `[B, W]`; values at i and at padding are ignored.

        Returns:
            `[B, W]`: -1 where a positive was dropped.
        """
        is_own, is_absent = ids == rows[:, None], ids == PADDING
        order = scores.masked_fill(is_own | is_absent, -torch.inf).argsort(dim=1, descending=True, stable=True)
        is_near = self.camids[ids] == self.camids[rows][:, None]
        is_kept = is_own.clone()
        for group, most in ((is_near, self.same), (~is_near, self.other)):
            counts = (group & ~is_own & ~is_absent).gather(1, order).cumsum(1)
            # places in order, and back
            ranks = torch.empty_like(counts).scatter_(1, order, counts)
            is_kept |= group & ~is_own & (ranks <= most)
        return ids.masked_fill(~is_kept, PADDING)


def choose_limit(config: Config, meta: MetaSet, camids: Tensor | None, num_images: int) -> PositiveLimit | None:
    """Return the limit that Z sets; None where the settings have none."""
    return PositiveLimit.of_labelled(meta, camids, num_images) if config.limits_positives else None
