"""Standardize features by camera: subtract each dimension's mean and divide by its deviation (Song et al., ICLR 2025).

Removes the camera bias, by which images of one camera are closer than images of one person. Not in the paper.
Shapes: N images, C cameras, D feature size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.errors import UserError

MIN_IMAGES = 8
"""A camera with fewer images takes the statistics of all: with too few samples, normalizing per camera removes identity
signal."""
MIN_SPREAD = 1e-3
"""Least standard deviation, relative to the size of a unit row's entries, D^-0.5."""


@dataclass(frozen=True, eq=False)
class CameraStatistics:
    """Mean and standard deviation of the features of each camera."""

    means: Tensor
    """`[C, D]`."""
    spreads: Tensor
    """`[C, D]`, standard deviations, above 0."""

    @classmethod
    def measure(cls, features: Tensor, camids: Tensor | None, *, num_cameras: int = 0) -> CameraStatistics:
        """Measure features `[N, D]` under the cameras `[N]`, int64; raise UserError without cameras.

        C is the larger of `num_cameras` and the highest camera id + 1.
        """
        if camids is None:
            raise UserError("neighbors.standardise: needs camera ids, but these images have none")
        num_cameras = max(num_cameras, int(camids.max()) + 1)
        # a matrix product: index_add is not deterministic on an accelerator, and workers must agree to the bit
        is_under = (torch.arange(num_cameras, device=camids.device)[:, None] == camids).to(features.dtype)
        counts = is_under.sum(1, keepdim=True)
        means = is_under @ features / counts.clamp(min=1)
        spreads = (is_under @ (features - means[camids]).square() / counts.clamp(min=1)).sqrt()
        is_small = counts < MIN_IMAGES
        means = torch.where(is_small, features.mean(0), means)
        spreads = torch.where(is_small, features.std(0, correction=0), spreads)
        # a deviation below this is rounding error, which dividing by it would amplify
        return cls(means, spreads.clamp(min=MIN_SPREAD * features.shape[1] ** -0.5))

    def standardize(self, features: Tensor, camids: Tensor) -> Tensor:
        """Standardize features `[n, D]` under the cameras `[n]`, and scale them to unit rows.

        A feature equal to its camera's mean, which would become 0, is returned unchanged.
        """
        rest = (features - self.means[camids]) / self.spreads[camids]
        is_mean = rest.norm(dim=1, keepdim=True) < 10 * MIN_SPREAD
        return F.normalize(torch.where(is_mean, features, rest))


def standardize_by_camera(features: Tensor, camids: Tensor | None) -> Tensor:
    """Standardize features `[N, D]` by their own camera statistics; raise UserError without cameras `[N]`."""
    statistics = CameraStatistics.measure(features, camids)
    assert camids is not None
    return statistics.standardize(features, camids)
