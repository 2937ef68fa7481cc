"""The augmentation of `transforms.augment` for a batch, on any device.

Every operator repeats Pillow's arithmetic, including its rounding to integer levels after each step. Pixels equal
Pillow's exactly for flips, jitter, grayscale and erasing. For resizing, rotation and blur a few pixels differ by one
level, where float32 sums round differently.

Shapes: B batch, h w input size, H W output size. Pixels are float32 `[B, 3, ...]` with integer levels 0 to 255 until
they are normalized.
"""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.data.transforms import MEAN_COLOR, PIXEL_MEAN, PIXEL_STD, AugmentParams
from mprd.runtime.device import send

LUMA = (19595.0, 38470.0, 7471.0)
"""Pillow's weights of red, green and blue, times 65536; float32 adds such integers exactly."""
EDGE = 1e-3
"""Added before truncation in a rotation, whose float32 sums may fall just below an integer."""
NUM_BLURS = 3
"""Box blurs in Pillow's approximation of a Gaussian."""


def augment_batch(pixels: Tensor, params: AugmentParams, *, height: int, width: int) -> Tensor:
    """Augment images of one size, uint8 `[B, 3, h, w]`; return them normalized, float32 `[B, 3, H, W]`."""
    device = pixels.device
    maps = crop_and_resize_batch(pixels.float(), params.crop, params.flip, height=height, width=width)
    maps = rotate_batch(maps, params.angle)
    maps = jitter_batch(maps, params)
    if params.grayscale.any():
        maps = torch.where(per_image(params.grayscale, device).bool(), luma(maps), maps)
    blurred = np.flatnonzero(params.blur)
    if len(blurred):
        rows = send(blurred, device)
        maps[rows] = blur_batch(maps[rows], params.blur[blurred] * height)
    return erase_batch(normalize_batch(maps), params.erase)


def per_image(values: np.ndarray, device: torch.device) -> Tensor:
    """Return one number per image as float32 `[B, 1, 1, 1]`."""
    return send(values, device, dtype=torch.float32).view(-1, 1, 1, 1)


def normalize_batch(pixels: Tensor) -> Tensor:
    """Normalize by ImageNet's mean and standard deviation; bitwise equal to `normalize`."""
    mean, std = (send(part, pixels.device) for part in (PIXEL_MEAN, PIXEL_STD))
    return pixels.float().sub(mean).div_(std)


def crop_and_resize_batch(maps: Tensor, crop: np.ndarray, flip: np.ndarray, *, height: int, width: int) -> Tensor:
    """Resize a box `[B, 4]` of each image, antialiased, and flip the images where `flip` `[B]` is true."""
    top, left, box_height, box_width = crop.T
    bottom, right = np.minimum(1.0, top + box_height), np.minimum(1.0, left + box_width)
    num, channels, h, w = maps.shape
    across = resize_weights(left * w, right * w, source=w, target=width, device=maps.device)
    across = torch.where(send(flip, maps.device)[:, None, None], across.flip(1), across)
    down = resize_weights(top * h, bottom * h, source=h, target=height, device=maps.device)
    # halves are rounded up, as in Pillow; round_ rounds them to even
    maps = torch.bmm(maps.reshape(num, channels * h, w), across.transpose(1, 2)).add_(0.5).floor_()
    return torch.matmul(down[:, None], maps.view(num, channels, h, width)).add_(0.5).floor_()


def resize_weights(low: np.ndarray, high: np.ndarray, *, source: int, target: int, device: torch.device) -> Tensor:
    """Return Pillow's triangle filter from [low, high) to the target size, float32 `[B, target, source]`."""
    # Pillow stores the corners as float32 and computes in double
    low, high = low.astype(np.float32), high.astype(np.float32)
    step = (high - low).astype(np.float64) / target
    # only the nonzero cells of a row are computed
    num_cells = min(source, 2 * math.ceil(step.max(initial=1.0)) + 1)
    start, scale = send(np.stack([low.astype(np.float64), step]), device)[:, :, None]
    support = scale.clamp(min=1.0)
    center = start + (torch.arange(target, device=device) + 0.5) * scale
    first = (center - support + 0.5).trunc().clamp(min=0)
    last = (center + support + 0.5).trunc().clamp(max=source)
    cells = first.clamp(max=source - num_cells)[..., None] + torch.arange(num_cells, device=device)
    weights = (1 - (cells + 0.5 - center[..., None]).abs() / support[..., None]).clamp(min=0)
    weights *= (cells >= first[..., None]) & (cells < last[..., None])
    weights /= weights.sum(2, keepdim=True)
    return torch.zeros(*center.shape, source, device=device).scatter_(2, cells.long(), weights.float())


def rotate_batch(maps: Tensor, angle: np.ndarray) -> Tensor:
    """Rotate counter-clockwise about the center, in degrees; exposed corners get the mean color."""
    if not angle.any():
        return maps
    height, width = maps.shape[2:]
    cos, sin = send(np.stack([f(np.radians(-angle)) for f in (np.cos, np.sin)]), maps.device)[..., None, None]
    y = torch.arange(height, device=maps.device, dtype=torch.float64)[:, None] + 0.5 - height / 2
    x = torch.arange(width, device=maps.device, dtype=torch.float64) + 0.5 - width / 2
    from_x, from_y = cos * x + sin * y, cos * y - sin * x
    grid = torch.stack([from_x / (width / 2), from_y / (height / 2)], dim=3)
    is_inside = ((grid >= -1) & (grid < 1)).all(3)[:, None]
    turned = F.grid_sample(maps, grid.float(), mode="bilinear", padding_mode="border", align_corners=False)
    fill = send(MEAN_COLOR, maps.device, dtype=maps.dtype).view(1, 3, 1, 1)
    return torch.where(is_inside, turned.add_(EDGE).floor_(), fill)


def jitter_batch(maps: Tensor, params: AugmentParams) -> Tensor:
    """Change brightness, contrast and saturation, in this order."""
    maps = blend(0.0, maps, per_image(params.brightness, maps.device))
    num_cells = maps.shape[2] * maps.shape[3]
    mean = (luma(maps).sum((1, 2, 3), dtype=torch.float64) / num_cells + 0.5).floor().float().view(-1, 1, 1, 1)
    maps = blend(mean, maps, per_image(params.contrast, maps.device))
    return blend(luma(maps), maps, per_image(params.saturation, maps.device))


def blend(base: Tensor | float, maps: Tensor, factor: Tensor) -> Tensor:
    """Interpolate or extrapolate from a base to the image, truncated to integer levels as in Pillow."""
    return maps.sub(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def luma(maps: Tensor) -> Tensor:
    """Return the gray levels, `[B, 1, H, W]`."""
    red, green, blue = maps.split(1, dim=1)
    gray = red * LUMA[0]
    return gray.add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).add_(32768.0).div_(65536.0).floor_()


def blur_batch(maps: Tensor, sigma: np.ndarray) -> Tensor:
    """Blur each image by its own sigma in pixels, as Pillow does: three box blurs per direction for a Gaussian."""
    kernel = send(box_kernels(sigma), maps.device)
    reach = kernel.shape[1] // 2
    for shape, pad in (((1, 1, -1), (reach, reach, 0, 0)), ((1, -1, 1), (0, 0, reach, reach))):
        weight = kernel.view(len(maps), *shape)
        for _ in range(NUM_BLURS):
            spread = F.pad(maps.transpose(0, 1), pad, mode="replicate")
            maps = F.conv2d(spread, weight, groups=len(maps)).transpose(0, 1).add_(0.5).floor_()
    return maps


def box_kernels(sigma: np.ndarray) -> np.ndarray:
    """Return the box of one of the blurs for each sigma, with fractional ends, `[B, 2 R + 1]`."""
    variance = sigma**2 / NUM_BLURS
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    size = 2 * (whole + rest) + 1
    offsets = np.abs(np.arange(-int(whole.max()) - 1, int(whole.max()) + 2))
    inside = offsets <= whole[:, None]
    ends = (offsets == whole[:, None] + 1) * rest[:, None]
    return ((inside + ends) / size[:, None]).astype(np.float32)


def erase_batch(maps: Tensor, boxes: np.ndarray) -> Tensor:
    """Set a box of each normalized image to 0, the mean color, in place."""
    height, width = maps.shape[2:]
    top, left, box_height, box_width = boxes.T
    down, across = (top * height, (top + box_height) * height), (left * width, (left + box_width) * width)
    first, last, begin, end = send(np.round([*down, *across]), maps.device)[..., None]
    rows, columns = torch.arange(height, device=maps.device), torch.arange(width, device=maps.device)
    is_row, is_column = (rows >= first) & (rows < last), (columns >= begin) & (columns < end)
    return maps.masked_fill_((is_row[:, :, None] & is_column[:, None])[:, None], 0.0)
