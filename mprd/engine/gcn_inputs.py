"""What all steps of a GCN epoch read: the images, and perturbed copies of those without a positive (Sec. 4.2).

Shapes: N images, X copies, K list width, D feature size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.neighbors.exact import PADDING
from mprd.neighbors.lists import FrozenLists


class GcnInputs(NamedTuple):
    """N images, and X perturbed copies behind them."""

    features: Tensor
    """`[N + X, D]`."""
    neighbor_ids: Tensor
    """`[N + X, K]`, padded with -1."""
    copies: Tensor
    """`[N]`, the row of each image's copy, -1 without one."""

    @classmethod
    def of_images(cls, lists: FrozenLists) -> GcnInputs:
        """Start without copies, from the features that are compared."""
        copies = torch.full((len(lists.features),), PADDING, device=lists.features.device)
        return cls(lists.features, lists.ids, copies)

    def with_copies(self, perturbed: Tensor, originals: Tensor, lists: FrozenLists) -> GcnInputs:
        """Append copies, with features `[X, D]`, of the images `originals` `[X]`; `lists` finds their neighbors."""
        num_images, perturbed = len(self.features), lists.similarity(perturbed)
        near = lists.search_outside(perturbed)
        width = max(self.neighbor_ids.shape[1], near.shape[1])
        ids, near = (F.pad(part, (0, width - part.shape[1]), value=PADDING) for part in (self.neighbor_ids, near))
        copies = self.copies.clone()
        copies[originals] = num_images + torch.arange(len(originals), device=copies.device)
        return GcnInputs(torch.cat([self.features, perturbed]), torch.cat([ids, near]), copies)
