"""Camera bias taken out of features: each dimension's mean and spread under a camera (Song et al., ICLR 2025).

Images of one camera lie closer together than those of one person do. Not in the paper.
Shapes: N images, C cameras, D feature size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.errors import UserError

LEAST_IMAGES = 8
"""A camera with fewer is measured by all images: a mean over so few would take the persons out with the camera."""
LEAST_SPREAD = 1e-3


@dataclass(frozen=True, eq=False)
class CameraStatistics:
    """What is common to the features of each camera."""

    means: Tensor
    """`[C, D]`."""
    spreads: Tensor
    """`[C, D]`, standard deviations, never 0."""

    @classmethod
    def measure(cls, features: Tensor, camids: Tensor | None, *, num_cameras: int = 0) -> CameraStatistics:
        """Measure features `[N, D]` by their cameras, int64 `[N]`; raise UserError where no cameras are known.

        C is `num_cameras`, or one more than the highest camera where that is more.
        """
        if camids is None:
            raise UserError("neighbors.standardise: needs camera ids, but these images have none")
        num_cameras = max(num_cameras, int(camids.max()) + 1)
        # a product, as sums by index come in no fixed order on an accelerator, and workers must agree to the bit
        is_under = (torch.arange(num_cameras, device=camids.device)[:, None] == camids).to(features.dtype)
        counts = is_under.sum(1, keepdim=True)
        means = is_under @ features / counts.clamp(min=1)
        spreads = (is_under @ (features - means[camids]).square() / counts.clamp(min=1)).sqrt()
        is_small = counts < LEAST_IMAGES
        means = torch.where(is_small, features.mean(0), means)
        spreads = torch.where(is_small, features.std(0, correction=0), spreads)
        # entries of unit rows are of about D^-0.5; what hardly differs is rounding, not to be blown up
        return cls(means, spreads.clamp(min=LEAST_SPREAD * features.shape[1] ** -0.5))

    def standardise(self, features: Tensor, camids: Tensor) -> Tensor:
        """Return unit rows of the features `[n, D]` of images under the cameras `[n]`, mean 0 and spread 1 in each.

        A feature that is its camera's mean, of which nothing would be left, stays as it is.
        """
        rest = (features - self.means[camids]) / self.spreads[camids]
        is_mean = rest.norm(dim=1, keepdim=True) < 10 * LEAST_SPREAD
        return F.normalize(torch.where(is_mean, features, rest))


def take_out_cameras(features: Tensor, camids: Tensor | None) -> Tensor:
    """Return features `[N, D]` standardised by the cameras `[N]` of these very images."""
    statistics = CameraStatistics.measure(features, camids)
    assert camids is not None
    return statistics.standardise(features, camids)
