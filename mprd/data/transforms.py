"""Augmentation of a training image (Sec. 5.2): parameters are drawn first and then applied.

Parameters do not depend on the image's size, so that they can be applied to one image or to a batch.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

from mprd.config.schema import DataConfig
from mprd.runtime.seeding import draw_uniforms

View = Literal["train", "perturbed"]

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


@dataclass(frozen=True, eq=False)
class AugmentParams:
    """The random parameters of images: arrays `[B]`, or `[B, 4]` for boxes; of one image, numbers and `[4]`.

    A box is its top, left, height and width, as shares of the image's height and width.
    """

    camera: np.ndarray
    """Index of the training camera whose style it gets."""
    crop: np.ndarray
    flip: np.ndarray
    angle: np.ndarray
    """Degrees, counter-clockwise."""
    brightness: np.ndarray
    contrast: np.ndarray
    saturation: np.ndarray
    grayscale: np.ndarray
    blur: np.ndarray
    """Standard deviation of the Gaussian, as a share of the height; 0 for none."""
    erase: np.ndarray
    """The box of random erasing, whose height and width are 0 where nothing is erased."""

    def rows(self, rows: int | slice | np.ndarray) -> AugmentParams:
        """Return the parameters of some images, or of one."""
        return AugmentParams(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw_params(
    seed: int, epoch: int, *, images: np.ndarray, view: View, num_cameras: int, config: DataConfig
) -> AugmentParams:
    """Draw the parameters of images `[B]`, each a function of (seed, epoch, image, view) and the settings alone.

    Every parameter has a fixed position in the stream, so that a setting changes its own parameter alone.
    """
    draws = draw_uniforms(seed, epoch, images.tolist(), VIEW_KEYS[view], num_draws=NUM_DRAWS)
    strength = STRENGTHS[config.augmentation]
    jitter, rotation = strength.jitter, strength.rotation
    is_train, is_perturbed = view == "train", view == "perturbed"
    crops, erased = np.split(draws[:, 14:], 2, axis=1)
    # Departs from MLCReID for images other than 2:1: CROP_RATIO is the ratio after resizing to 2:1
    crop = draw_boxes(crops, draws[:, 10:12], area=strength.crop_area, ratio=CROP_RATIO, frame=FRAME_RATIO)
    crop[crop[:, 2] == 0] = (0.0, 0.0, 1.0, 1.0)
    frame = config.height / config.width
    erase = draw_boxes(erased, draws[:, 12:14], area=strength.erased_area, ratio=ERASING_RATIO, frame=frame)
    erase[~(is_train & (draws[:, 9] < strength.erasing))] = 0
    factors = scale_to(draws[:, 3:6], 1 - jitter, 1 + jitter)
    return AugmentParams(
        camera=(draws[:, 0] * num_cameras).astype(np.int64),
        crop=crop,
        flip=draws[:, 1] < 0.5,
        angle=scale_to(draws[:, 2], -rotation, rotation),
        brightness=factors[:, 0],
        contrast=factors[:, 1],
        saturation=factors[:, 2],
        grayscale=is_perturbed & (draws[:, 6] < GRAYSCALE_PROBABILITY),
        blur=np.where(is_perturbed & (draws[:, 7] < BLUR_PROBABILITY), scale_to(draws[:, 8], *BLUR_SIGMA), 0.0),
        erase=erase,
    )


def scale_to(draws: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map numbers from [0, 1) to [low, high)."""
    return low + (high - low) * draws


def draw_boxes(
    attempts: np.ndarray, place: np.ndarray, *, area: tuple[float, float], ratio: tuple[float, float], frame: float
) -> np.ndarray:
    """Return each image's first box of a random area and height/width ratio that fits, `[B, 4]`; 0 where none does.

    Args:
        attempts: `[B, 2 A]` numbers in [0, 1), per attempt two, for area and ratio.
        place: `[B, 2]`, likewise for the top and left among those possible.
        frame: height / width of the image in the units of `ratio`.
    """
    share, shape = scale_to(attempts[:, ::2], *area), scale_to(attempts[:, 1::2], *ratio) / frame
    height, width = np.sqrt(share * shape), np.sqrt(share / shape)
    fits = (height <= 1) & (width <= 1)
    rows, first = np.arange(len(fits)), fits.argmax(1)
    height, width = height[rows, first], width[rows, first]
    boxes = np.stack([place[:, 0] * (1 - height), place[:, 1] * (1 - width), height, width], axis=1)
    boxes[~fits.any(1)] = 0
    return boxes


def crop_and_resize(image: Image.Image, box: np.ndarray, *, height: int, width: int) -> Image.Image:
    """Resize a box `[4]` of an image, antialiased, without rounding its corners to pixels."""
    top, left, box_height, box_width = box
    right, bottom = min(1.0, left + box_width), min(1.0, top + box_height)
    corners = (left * image.width, top * image.height, right * image.width, bottom * image.height)
    return image.resize((width, height), Image.Resampling.BILINEAR, box=corners)


def augment(image: Image.Image, params: AugmentParams, *, height: int, width: int) -> Tensor:
    """Augment an image by its own parameters; return it normalized, float32 `[3, height, width]`.

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
        image = image.filter(ImageFilter.GaussianBlur(float(params.blur) * height))
    pixels = normalize(image)
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
