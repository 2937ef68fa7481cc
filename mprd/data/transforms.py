"""Augmentation of a training image (Sec. 5.2): parameters are drawn first and then applied.

Parameters do not depend on the image's size, so that they can be applied to one image or to a batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from mprd.config.schema import DataConfig
from mprd.runtime.seeding import draw_uniforms

View = Literal["train", "perturbed"]
Box = tuple[float, float, float, float]
"""Top, left, height and width, as shares of the image's height and width."""

# last part of a generator's key, distinct from mprd.runtime.seeding.RngStream
VIEW_KEYS: dict[View, int] = {"train": 100, "perturbed": 101}

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
PIXEL_MEAN, PIXEL_STD = (np.array(v, np.float32).reshape(3, 1, 1) * 255 for v in (IMAGENET_MEAN, IMAGENET_STD))
MEAN_COLOR = [round(255 * mean) for mean in IMAGENET_MEAN]

CROP_RATIO = (2.0, 3.0)  # height / width of the crop (MLCReID)
FRAME_RATIO = 2.0  # height / width of the image for which CROP_RATIO is given: 256 x 128
ERASING_RATIO = (0.3, 1 / 0.3)  # height / width of the erased box, in pixels (MLCReID)
GRAYSCALE_PROBABILITY = 0.2
BLUR_PROBABILITY = 0.5
BLUR_SIGMA = (0.001, 0.01)  # share of the image's height
NUM_ATTEMPTS = 10
NUM_DRAWS = 14 + 4 * NUM_ATTEMPTS


@dataclass(frozen=True)
class Strength:
    """How far a training image is changed."""

    jitter: float
    """Range of brightness, contrast and saturation, as a share."""
    rotation: float
    """Largest rotation in degrees."""
    crop_area: tuple[float, float]
    """Range of the crop's share of the area."""
    erasing: float
    """Probability of random erasing."""
    erased_area: tuple[float, float] = (0.02, 0.2)
    """Range of the erased share of the area (MLCReID)."""


STRENGTHS = {
    "standard": Strength(jitter=0.2, rotation=10, crop_area=(0.64, 1), erasing=0.5),
    "small": Strength(jitter=0.3, rotation=5, crop_area=(0.8, 1), erasing=0.3),
}
"""By `data.augmentation`: MLCReID's (Sec. 5.2: "similar to [24]"), and one chosen for 64 x 32 pixels."""


@dataclass(frozen=True)
class AugmentParams:
    """The random parameters of one image."""

    camera: int
    """Index of the training camera whose style it gets."""
    crop: Box
    flip: bool
    angle: float
    """Degrees, counter-clockwise."""
    brightness: float
    contrast: float
    saturation: float
    grayscale: bool
    blur: float
    """Standard deviation of the Gaussian, as a share of the height; 0 for none."""
    erase: Box | None
    """The box of random erasing, or None."""


def draw_params(
    seed: int, epoch: int, *, image: int, view: View, num_cameras: int, config: DataConfig
) -> AugmentParams:
    """Draw one image's parameters, a function of (seed, epoch, image, view) and the settings alone.

    Every parameter has a fixed position in the stream, so that a setting changes its own parameter alone.
    """
    draws = draw_uniforms(seed, epoch, [image], VIEW_KEYS[view], num_draws=NUM_DRAWS)[0].tolist()
    strength = STRENGTHS[config.augmentation]
    jitter, rotation = strength.jitter, strength.rotation
    crops = in_pairs(draws[14 : 14 + 2 * NUM_ATTEMPTS])
    erased = in_pairs(draws[14 + 2 * NUM_ATTEMPTS :])
    is_train = view == "train"
    erases = is_train and draws[9] < strength.erasing
    # Departs from MLCReID for images other than 2:1: CROP_RATIO is the ratio after resizing to 2:1
    crop = draw_box(crops, draws[10], draws[11], area=strength.crop_area, ratio=CROP_RATIO, frame=FRAME_RATIO)
    frame = config.height / config.width
    erase = draw_box(erased, draws[12], draws[13], area=strength.erased_area, ratio=ERASING_RATIO, frame=frame)
    return AugmentParams(
        camera=int(draws[0] * num_cameras),
        crop=crop or (0.0, 0.0, 1.0, 1.0),
        flip=draws[1] < 0.5,
        angle=scale_to(draws[2], -rotation, rotation),
        brightness=scale_to(draws[3], 1 - jitter, 1 + jitter),
        contrast=scale_to(draws[4], 1 - jitter, 1 + jitter),
        saturation=scale_to(draws[5], 1 - jitter, 1 + jitter),
        grayscale=not is_train and draws[6] < GRAYSCALE_PROBABILITY,
        blur=scale_to(draws[8], *BLUR_SIGMA) if not is_train and draws[7] < BLUR_PROBABILITY else 0.0,
        erase=erase if erases else None,
    )


def scale_to(draw: Any, low: float, high: float) -> Any:
    """Map a number or an array from [0, 1) to [low, high)."""
    return low + (high - low) * draw


def in_pairs(draws: list[float]) -> Iterator[tuple[float, float]]:
    """Yield numbers two at a time."""
    return zip(draws[::2], draws[1::2], strict=True)


def draw_box(
    attempts: Iterator[tuple[float, float]],
    top: float,
    left: float,
    *,
    area: tuple[float, float],
    ratio: tuple[float, float],
    frame: float,
) -> Box | None:
    """Return the first box of a random area and height/width ratio that fits into the image; None if none does.

    Args:
        attempts: per attempt two numbers in [0, 1), for area and ratio.
        top: likewise for the position among those possible; also `left`.
        frame: height / width of the image in the units of `ratio`.
    """
    for area_draw, ratio_draw in attempts:
        share, shape = scale_to(area_draw, *area), scale_to(ratio_draw, *ratio) / frame
        height, width = math.sqrt(share * shape), math.sqrt(share / shape)
        if height <= 1 and width <= 1:
            return top * (1 - height), left * (1 - width), height, width
    return None


def crop_and_resize(image: Image.Image, box: Box, *, height: int, width: int) -> Image.Image:
    """Resize a box of an image, antialiased, without rounding its corners to pixels."""
    top, left, box_height, box_width = box
    right, bottom = min(1.0, left + box_width), min(1.0, top + box_height)
    corners = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=corners)


def augment(image: Image.Image, params: AugmentParams, *, height: int, width: int) -> Tensor:
    """Augment an image; return it normalized, float32 `[3, height, width]`.

    Corners exposed by the rotation and the erased box get ImageNet's mean color, 0 after normalization.
    """
    image = crop_and_resize(image, params.crop, height=height, width=width)
    if params.flip:
        image = functional.horizontal_flip(image)
    if params.angle:
        image = functional.rotate(image, params.angle, InterpolationMode.BILINEAR, fill=MEAN_COLOR)
    image = functional.adjust_brightness(image, params.brightness)
    image = functional.adjust_contrast(image, params.contrast)
    image = functional.adjust_saturation(image, params.saturation)
    if params.grayscale:
        image = functional.rgb_to_grayscale(image, num_output_channels=3)
    if params.blur:
        image = image.filter(ImageFilter.GaussianBlur(params.blur * height))
    pixels = normalize(image)
    if params.erase:
        top, left, box_height, box_width = params.erase
        rows = slice(round(top * height), round((top + box_height) * height))
        columns = slice(round(left * width), round((left + box_width) * width))
        pixels[:, rows, columns] = 0
    return pixels


def normalize(image: Image.Image) -> Tensor:
    """Return an RGB image as float32 `[3, H, W]`, normalized by ImageNet's mean and standard deviation."""
    # NumPy is faster here than torchvision's operators
    pixels = np.array(image).transpose(2, 0, 1).astype(np.float32, order="C")
    pixels -= PIXEL_MEAN
    pixels /= PIXEL_STD
    return torch.from_numpy(pixels)
