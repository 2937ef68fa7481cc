"""P, the positives of all images, with the labeled images Z and the limit that they set (Sec. 4.1, 4.2).

Shapes: B batch, N images, W width of the table, at least that of the widest P_i, Z labeled images.
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
    """P: for each image the ids of its positives, itself included; `[N, W]` padded with -1 anywhere in a row.

    `refused` `[N, W']` are likely positives beyond `pairs.limit`: neither positives nor negatives.
    """

    def __init__(self, num_images: int, device: torch.device | str = "cpu") -> None:
        """Start with P_i = {i} (Alg. 1 line 1)."""
        self.ids = torch.arange(num_images, device=device)[:, None].clone()
        self.refused = self.ids[:, :0]

    def __len__(self) -> int:
        return len(self.ids)

    def set_rows(self, rows: Tensor, ids: Tensor, refused: Tensor | None = None) -> None:
        """Replace the P_i of the images `rows` `[B]`, and what was refused, by ids `[B, W']`, padded with -1."""
        self.ids = with_rows(self.ids, rows, ids)
        self.refused = with_rows(self.refused, rows, ids[:, :0] if refused is None else refused)

    def mask(self, rows: Tensor) -> Tensor:
        """Return P_i of the images `rows` `[B]` as a boolean `[B, N]`."""
        return ids_to_mask(self.ids[rows], len(self))

    def doubtful(self, rows: Tensor) -> Tensor | None:
        """Return which images are neither positives nor negatives of `rows` `[B]`, `[B, N]`; None where none can be."""
        return ids_to_mask(self.refused[rows], len(self)) if self.refused.shape[1] else None

    def counts(self) -> Tensor:
        """Return |P_i|, `[N]`."""
        return (self.ids != PADDING).sum(1)


def with_rows(table: Tensor, rows: Tensor, ids: Tensor) -> Tensor:
    """Replace rows `[B]` of a table `[N, W]` by ids `[B, W']`, in place unless they are wider; padded with -1."""
    grow = ids.shape[1] - table.shape[1]
    if grow > 0:
        table = F.pad(table, (0, grow), value=PADDING)
    table[rows] = F.pad(ids, (0, max(0, -grow)), value=PADDING)
    return table


def ids_to_mask(ids: Tensor, num_images: int) -> Tensor:
    """Turn ids `[B, W]`, padded with -1, into a boolean `[B, N]`."""
    mask = torch.zeros(len(ids), num_images + 1, dtype=torch.bool, device=ids.device)
    # padding lands in an extra column, which is cut off
    mask.scatter_(1, torch.where(ids == PADDING, num_images, ids), True)
    return mask[:, :-1]


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
        """Take what images of Z have within Z, which must hold whole identities and not be empty.

        Few identities hardly include the largest. So the limit is as far above their largest count as their smallest is
        below it; where all are alike it is their count.
        """
        camids = meta.ids.new_zeros(num_images) if camids is None else camids
        is_mate = meta.pids[:, None] == meta.pids
        is_near = camids[meta.ids][:, None] == camids[meta.ids]
        both = (is_mate & is_near).sum(1) - 1, (is_mate & ~is_near).sum(1)
        same, other = (int(2 * counts.amax() - counts.amin()) for counts in both)
        return cls(camids, same, other)

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


def split_by_limit(
    rows: Tensor, ids: Tensor, scores: Tensor, limit: PositiveLimit | None
) -> tuple[Tensor, Tensor | None]:
    """Split accepted ids `[B, W]` of the images `rows` `[B]` into the positives of highest score and the rest.

    Both are `[B, W]`, padded with -1; the second is None without a limit.
    """
    if limit is None:
        return ids, None
    kept = limit.keep(rows, ids, scores)
    return kept, ids.masked_fill(kept != PADDING, PADDING)


def choose_limit(config: Config, meta: MetaSet, camids: Tensor | None, num_images: int) -> PositiveLimit | None:
    """Return the limit that Z sets; None where the settings have none."""
    return PositiveLimit.of_labelled(meta, camids, num_images) if config.limits_positives else None
