"""What `augment` does to one image, for a batch at once, on any device.

Every operator repeats Pillow's arithmetic, its rounding to whole levels after each step included, so that both
ways give the same pixels: exactly in flips, jitter, grayscale and erasing, and to one level in the few pixels where a
float32 sum of resizing, rotation or blur falls on the other side of a rounding edge.

Shapes: B batch, h w size of what comes in, H W size of what goes out. Pixels are float32 `[B, 3, ...]` holding whole
levels 0 to 255 until they are normalized.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.config.schema import DataConfig
from mprd.data.transforms import (
    BLUR_PROBABILITY,
    BLUR_SIGMA,
    CROP_RATIO,
    ERASING_RATIO,
    FRAME_RATIO,
    GRAYSCALE_PROBABILITY,
    MEAN_COLOUR,
    NUM_DRAWS,
    PIXEL_MEAN,
    PIXEL_STD,
    VIEW_KEYS,
    View,
    between,
)
from mprd.runtime.device import send
from mprd.runtime.seeding import draw_uniforms

LUMA = (19595.0, 38470.0, 7471.0)
"""Pillow's weights of red, green and blue, in parts of 65536; whole numbers that float32 adds exactly."""
EDGE = 1e-3
"""Pillow cuts off what a float32 sum of a rotation may have just missed."""
NUM_BLURS = 3
"""Box blurs that make up Pillow's Gaussian."""


@dataclass(frozen=True, eq=False)
class BatchParams:
    """The random numbers of a batch, as in AugmentParams; float64 `[B]` or `[B, 4]` arrays."""

    camera: np.ndarray
    crop: np.ndarray
    flip: np.ndarray
    angle: np.ndarray
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    grayscale: np.ndarray
    blur: np.ndarray
    erase: np.ndarray
    """A box without height or width where nothing is erased."""

    def rows(self, rows: slice | np.ndarray) -> BatchParams:
        """Keep some images."""
        return BatchParams(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw_batch(
    seed: int, epoch: int, *, images: np.ndarray, view: View, num_cameras: int, config: DataConfig
) -> BatchParams:
    """Draw the changes of many images `[B]`: to the bit what `draw_params` draws for each."""
    draws = draw_uniforms(seed, epoch, images.tolist(), VIEW_KEYS[view], num_draws=NUM_DRAWS)
    jitter = config.colour_jitter
    is_train, is_perturbed = view == "train", view == "perturbed"
    crops, erased = np.split(draws[:, 14:], 2, axis=1)
    crop = draw_boxes(crops, draws[:, 10:12], area=config.crop_area, ratio=CROP_RATIO, frame=FRAME_RATIO)
    crop[crop[:, 2] == 0] = (0.0, 0.0, 1.0, 1.0)
    frame = config.height / config.width
    erase = draw_boxes(erased, draws[:, 12:14], area=config.erasing_area, ratio=ERASING_RATIO, frame=frame)
    erase[~(is_train & (draws[:, 9] < config.erasing_probability))] = 0
    factors = between(draws[:, 3:6], 1 - jitter, 1 + jitter)
    return BatchParams(
        (draws[:, 0] * num_cameras).astype(np.int64),
        crop,
        draws[:, 1] < 0.5,
        between(draws[:, 2], -config.rotation, config.rotation),
        factors[:, 0],
        factors[:, 1],
        factors[:, 2],
        is_perturbed & (draws[:, 6] < GRAYSCALE_PROBABILITY),
        np.where(is_perturbed & (draws[:, 7] < BLUR_PROBABILITY), between(draws[:, 8], *BLUR_SIGMA), 0.0),
        erase,
    )


def draw_boxes(
    attempts: np.ndarray, place: np.ndarray, *, area: tuple[float, float], ratio: tuple[float, float], frame: float
) -> np.ndarray:
    """Take each image's first box that fits, `[B, 4]`, from attempts `[B, 2 A]` and place `[B, 2]`; 0 where none."""
    share, shape = between(attempts[:, ::2], *area), between(attempts[:, 1::2], *ratio) / frame
    height, width = np.sqrt(share * shape), np.sqrt(share / shape)
    fits = (height <= 1) & (width <= 1)
    rows, first = np.arange(len(fits)), fits.argmax(1)
    height, width = height[rows, first], width[rows, first]
    boxes = np.stack([place[:, 0] * (1 - height), place[:, 1] * (1 - width), height, width], axis=1)
    boxes[~fits.any(1)] = 0
    return boxes


def augment_batch(pixels: Tensor, params: BatchParams, *, height: int, width: int) -> Tensor:
    """Apply what was drawn to images of one size, uint8 `[B, 3, h, w]`; return normalized float32 `[B, 3, H, W]`."""
    device = pixels.device
    maps = crop_and_resize_batch(pixels.float(), params.crop, params.flip, height=height, width=width)
    maps = rotate_batch(maps, params.angle)
    maps = jitter_batch(maps, params)
    if params.grayscale.any():
        maps = torch.where(column(params.grayscale, device).bool(), luma(maps), maps)
    blurred = np.flatnonzero(params.blur)
    if len(blurred):
        rows = send(blurred, device)
        maps[rows] = blur_batch(maps[rows], params.blur[blurred] * height)
    return erase_batch(normalize_batch(maps), params.erase)


def carry_colours(pixels: Tensor, tables: np.ndarray) -> Tensor:
    """Look every level up in its image's table: uint8 `[B, 3, h, w]` through uint8 `[B, 3, 256]`."""
    levels = send(tables, pixels.device)
    return levels.gather(2, pixels.flatten(2).long()).view(pixels.shape)


def column(values: np.ndarray, device: torch.device) -> Tensor:
    """Shape one number an image as `[B, 1, 1, 1]` float32."""
    return send(values, device, dtype=torch.float32).view(-1, 1, 1, 1)


def normalize_batch(pixels: Tensor) -> Tensor:
    """Take off ImageNet's mean and divide by its deviation; the bits of `normalize`."""
    mean, std = (send(part, pixels.device) for part in (PIXEL_MEAN, PIXEL_STD))
    return pixels.float().sub(mean).div_(std)


def crop_and_resize_batch(maps: Tensor, crop: np.ndarray, flip: np.ndarray, *, height: int, width: int) -> Tensor:
    """Resize a part of each image, antialiased, and flip some."""
    top, left, box_height, box_width = crop.T
    bottom, right = np.minimum(1.0, top + box_height), np.minimum(1.0, left + box_width)
    num, channels, h, w = maps.shape
    across = resize_weights(left * w, right * w, source=w, target=width, device=maps.device)
    across = torch.where(send(flip, maps.device)[:, None, None], across.flip(1), across)
    down = resize_weights(top * h, bottom * h, source=h, target=height, device=maps.device)
    # halves go up, as in Pillow; round_ would send them to the even neighbor
    maps = torch.bmm(maps.reshape(num, channels * h, w), across.transpose(1, 2)).add_(0.5).floor_()
    return torch.matmul(down[:, None], maps.view(num, channels, h, width)).add_(0.5).floor_()


def resize_weights(low: np.ndarray, high: np.ndarray, *, source: int, target: int, device: torch.device) -> Tensor:
    """Return Pillow's triangle filter from [low, high) to the target size, float32 `[B, target, source]`."""
    # Pillow takes the corners as float32 and goes on in double
    low, high = low.astype(np.float32), high.astype(np.float32)
    step = (high - low).astype(np.float64) / target
    # few cells of a row are not 0, and all others are left out
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
    """Rotate counter-clockwise about the center, in degrees; the corners laid bare take the mean colour."""
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
    fill = send(MEAN_COLOUR, maps.device, dtype=maps.dtype).view(1, 3, 1, 1)
    return torch.where(is_inside, turned.add_(EDGE).floor_(), fill)


def jitter_batch(maps: Tensor, params: BatchParams) -> Tensor:
    """Change brightness, contrast and saturation, in this order."""
    maps = blend(0.0, maps, column(params.brightness, maps.device))
    num_cells = maps.shape[2] * maps.shape[3]
    mean = (luma(maps).sum((1, 2, 3), dtype=torch.float64) / num_cells + 0.5).floor().float().view(-1, 1, 1, 1)
    maps = blend(mean, maps, column(params.contrast, maps.device))
    return blend(luma(maps), maps, column(params.saturation, maps.device))


def blend(base: Tensor | float, maps: Tensor, factor: Tensor) -> Tensor:
    """Move from a base to the image and beyond, cut to whole levels as Pillow does."""
    return maps.sub(base).mul_(factor).add_(base).clamp_(0, 255).floor_()


def luma(maps: Tensor) -> Tensor:
    """Return the gray level, `[B, 1, H, W]`."""
    red, green, blue = maps.split(1, dim=1)
    gray = red * LUMA[0]
    return gray.add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2]).add_(32768.0).div_(65536.0).floor_()


def blur_batch(maps: Tensor, sigma: np.ndarray) -> Tensor:
    """Blur each image by a Gaussian of its own deviation in pixels, as Pillow does: by three box blurs a direction."""
    kernel = send(box_kernels(sigma), maps.device)
    reach = kernel.shape[1] // 2
    for shape, pad in (((1, 1, -1), (reach, reach, 0, 0)), ((1, -1, 1), (0, 0, reach, reach))):
        weight = kernel.view(len(maps), *shape)
        for _ in range(NUM_BLURS):
            spread = F.pad(maps.transpose(0, 1), pad, mode="replicate")
            maps = F.conv2d(spread, weight, groups=len(maps)).transpose(0, 1).add_(0.5).floor_()
    return maps


def box_kernels(sigma: np.ndarray) -> np.ndarray:
    """Return the box, with its fractional ends, of one of the blurs that make up each Gaussian, `[B, 2 R + 1]`."""
    variance = sigma**2 / NUM_BLURS
    whole = np.floor((np.sqrt(12 * variance + 1) - 1) / 2)
    rest = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance) / (6 * (variance - (whole + 1) ** 2))
    size = 2 * (whole + rest) + 1
    offsets = np.abs(np.arange(-int(whole.max()) - 1, int(whole.max()) + 2))
    inside = offsets <= whole[:, None]
    ends = (offsets == whole[:, None] + 1) * rest[:, None]
    return ((inside + ends) / size[:, None]).astype(np.float32)


def erase_batch(maps: Tensor, boxes: np.ndarray) -> Tensor:
    """Cover a box of each normalized image with the mean, 0, in place."""
    height, width = maps.shape[2:]
    top, left, box_height, box_width = boxes.T
    down, across = (top * height, (top + box_height) * height), (left * width, (left + box_width) * width)
    first, last, begin, end = send(np.round([*down, *across]), maps.device)[..., None]
    rows, columns = torch.arange(height, device=maps.device), torch.arange(width, device=maps.device)
    is_row, is_column = (rows >= first) & (rows < last), (columns >= begin) & (columns < end)
    return maps.masked_fill_((is_row[:, :, None] & is_column[:, None])[:, None], 0.0)
