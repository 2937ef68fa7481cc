"""Mean and standard deviation of the pixels that a network was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from mprd.data.transforms import IMAGENET_MEAN, IMAGENET_STD

Pixels = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and standard deviation of red, green and blue, in [0, 1]."""

PIXELS: dict[str, Pixels] = {
    "imagenet": (IMAGENET_MEAN, IMAGENET_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "clip": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "lup": ((0.3525, 0.3106, 0.3140), (0.2660, 0.2522, 0.2505)),
    "lup_nl": ((0.3452, 0.3070, 0.3114), (0.2633, 0.2500, 0.2480)),
}
"""By `backbone.pixels`: `half` is that of most person-pretrained ViTs, `lup` and `lup_nl` those of LUPerson (-NL)."""


def pixel_affine(pixels: Pixels) -> Tensor | None:
    """Return scale and shift, `[2, 3]`, from images normalized by ImageNet's values to others; None if they are equal.

    The images of `mprd.data` are always normalized by ImageNet's.
    """
    mean, std, imagenet_mean, imagenet_std = (
        torch.tensor(part, dtype=torch.float64) for part in (*pixels, *PIXELS["imagenet"])
    )
    affine = torch.stack([imagenet_std / std, (imagenet_mean - mean) / std]).float()
    return None if pixels == PIXELS["imagenet"] else affine
