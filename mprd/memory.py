"""The feature memory M (Eq. 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class FeatureMemory:
    """One unit feature per training image.

    >>> import torch
    >>> memory = FeatureMemory(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    >>> memory.update(torch.tensor([0]), torch.tensor([[0.0, 1.0]]), gamma=0.5)
    >>> memory.features
    tensor([[0.7071, 0.7071],
            [0.0000, 1.0000]])
    """

    def __init__(self, features: Tensor) -> None:
        """Copy and normalize the initial features `[N, D]`."""
        if features.ndim != 2 or not features.is_floating_point():
            raise ValueError(f"features must be floating point [N, D], but got {features.dtype} {list(features.shape)}")
        self.features = F.normalize(features.detach().clone(), dim=1)

    def __len__(self) -> int:
        return len(self.features)

    @torch.no_grad()
    def update(self, ids: Tensor, features: Tensor, *, gamma: float) -> None:
        """Average new features into the rows `ids` and normalize them (Eq. 1).

        Args:
            ids: `[B]`, each image at most once.
            features: `[B, D]`, unit length.
            gamma: weight of the new feature.
        """
        features = features.to(self.features.dtype)
        self.features[ids] = F.normalize(gamma * features + (1 - gamma) * self.features[ids], dim=1)
