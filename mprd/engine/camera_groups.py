"""The images of each camera, for batches of one camera and for its batch-norm statistics (Zhuang et al., ECCV 2020).

Not in the paper. Shapes: N images, K cameras.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SAMPLE_IMAGES = 512
"""Images that batch-norm statistics are estimated on: on photographs half as many cost .7 of mAP, twice as many bring
.2."""


@dataclass(frozen=True, eq=False)
class CameraGroups:
    """A division of all images into those of cameras that have enough of them, and the rest."""

    cameras: list[Tensor | None]
    """The ids of each camera's images, ascending; None where they are too few for statistics of their own."""
    rest: Tensor
    """The ids of all other images, ascending."""
    least: int
    """The number of images that is enough."""
    small: tuple[int, ...] = ()
    """The cameras that have images, but too few."""

    @classmethod
    def of(cls, camids: Tensor | None, num_images: int, *, least: int) -> CameraGroups:
        """Divide the images under the cameras `[N]`; without these all are the rest."""
        if camids is None:
            return cls([], torch.arange(num_images), least)
        ids = [(camids.cpu() == camera).nonzero().squeeze(1) for camera in range(int(camids.max()) + 1)]
        small = tuple(camera for camera, own in enumerate(ids) if 0 < len(own) < least)
        rest = torch.cat([ids[0][:0], *(ids[camera] for camera in small)]).sort().values
        return cls([own if len(own) >= least else None for own in ids], rest, least, small)

    def batched(self) -> list[Tensor]:
        """Return the ids of the images that may share a batch; each image is in one group.

        A rest too small for batches of its own joins the smallest camera.
        """
        own = sorted((ids for ids in self.cameras if ids is not None), key=len)
        if own and len(self.rest) < self.least:
            return [torch.cat([own[0], self.rest]), *own[1:]]
        return [*own, self.rest]

    def samples(self, order: Tensor) -> list[Tensor]:
        """Return the first images of each camera in `order` `[N]`, none where it has too few, and last those of all."""
        ranks = order.argsort()
        firsts = [order[:0] if ids is None else ids[ranks[ids].argsort()][:SAMPLE_IMAGES] for ids in self.cameras]
        return [*firsts, order[:SAMPLE_IMAGES]]
