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

PRIOR_IMAGES = 30
"""Images that the statistics of all count for in those of a camera: a camera's mean over few images holds their
identities, which subtracting it would remove."""
MIN_SPREAD = 1e-3
"""Least standard deviation, relative to the size of a unit row's entries, D^-0.5."""


@dataclass(frozen=True, eq=False)
class CameraStatistics:
    """Mean and standard deviation of the features of each camera, shrunk towards those of all images.

    A camera of n images takes n / (n + 30) of its own mean and variance, and the rest from all images. The last row
    holds the statistics of all images, for cameras that are not known.
    """

    means: Tensor
    """`[C + 1, D]`."""
    spreads: Tensor
    """`[C + 1, D]`, standard deviations, above 0."""

    @classmethod
    def measure(cls, features: Tensor, camids: Tensor | None) -> CameraStatistics:
        """Measure features `[N, D]` under the cameras `[N]`, int64 from 0; raise UserError without cameras."""
        if camids is None:
            raise UserError("neighbors.standardise: needs camera ids, but these images have none")
        # a matrix product: index_add is not deterministic on an accelerator, and workers must agree to the bit
        is_under = (torch.arange(int(camids.max()) + 1, device=camids.device)[:, None] == camids).to(features.dtype)
        counts = is_under.sum(1, keepdim=True)
        means = is_under @ features / counts.clamp(min=1)
        variances = is_under @ (features - means[camids]).square() / counts.clamp(min=1)
        own, mean, variance = own_share(counts), features.mean(0), features.var(0, correction=0)
        means = torch.cat([torch.lerp(mean, means, own), mean[None]])
        variances = torch.cat([torch.lerp(variance, variances, own), variance[None]])
        # a deviation below this is rounding error, which dividing by it would amplify
        return cls(means, variances.sqrt().clamp(min=MIN_SPREAD * features.shape[1] ** -0.5))

    def standardize(self, features: Tensor, camids: Tensor) -> Tensor:
        """Standardize features `[n, D]` under the cameras `[n]`, -1 where unknown, and scale them to unit rows.

        A feature equal to its camera's mean, which would become 0, is returned unchanged.
        """
        rows = rows_of(camids, len(self.means) - 1)
        rest = (features - self.means[rows]) / self.spreads[rows]
        is_mean = rest.norm(dim=1, keepdim=True) < 10 * MIN_SPREAD
        return F.normalize(torch.where(is_mean, features, rest))


def own_share(counts: Tensor) -> Tensor:
    """Return how much of its own statistics a camera of so many images takes; the rest comes from all images."""
    return counts / (counts + PRIOR_IMAGES)


def rows_of(camids: Tensor, num_cameras: int) -> Tensor:
    """Return the row of each camera's statistics, the last, `num_cameras`, for cameras that are not known."""
    return camids.where((camids >= 0) & (camids < num_cameras), num_cameras)
