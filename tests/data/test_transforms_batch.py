"""Augmentation of a batch equals that of its images one at a time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mprd.config.schema import DataConfig
from mprd.data.transforms import IMAGENET_STD, AugmentParams, View, augment, draw_params, normalize
from mprd.data.transforms_batch import augment_batch, normalize_batch

CONFIG = DataConfig(height=64, width=32)
NUM_IMAGES = 24
WHOLE, NOWHERE = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0)
STILL = AugmentParams(
    *(np.array([value] * NUM_IMAGES) for value in (0, WHOLE, False, 0.0, 1.0, 1.0, 1.0, False, 0.0, NOWHERE))
)


def pictures(height: int, width: int) -> list[Image.Image]:
    """Return patches of color and noise, with hard edges, flat parts and both ends of the scale."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (NUM_IMAGES, 6, 3, 3)).repeat(-(-height // 6), 1).repeat(-(-width // 3), 2)
    noise = random.normal(0, 15, (NUM_IMAGES, height, width, 3)) * (np.arange(width)[:, None] > width // 2)
    levels = (coarse[:, :height, :width] + noise).clip(0, 255).astype(np.uint8)
    return [Image.fromarray(image) for image in levels]


def as_pixels(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).contiguous()


def draw(view: View = "train") -> AugmentParams:
    return draw_params(3, 1, images=np.arange(NUM_IMAGES), view=view, num_cameras=4, config=CONFIG)


def level_errors(images: list[Image.Image], params: AugmentParams) -> torch.Tensor:
    """Return the difference between the batch and single images, in levels of 0 to 255, `[B, 3, H, W]`."""
    expected = torch.stack([augment(image, params.rows(i), height=64, width=32) for i, image in enumerate(images)])
    found = augment_batch(as_pixels(images), params, height=64, width=32)
    return (found - expected).abs() * torch.tensor(IMAGENET_STD).view(3, 1, 1) * 255


@pytest.mark.parametrize("name", ["flip", "brightness", "contrast", "saturation", "grayscale", "erase"])
def test_flips_jitter_grayscale_and_erasing_are_bitwise_equal(name: str) -> None:
    view: View = "perturbed" if name == "grayscale" else "train"
    drawn = getattr(draw(view), name)
    assert len(np.unique(drawn, axis=0)) > 1
    assert level_errors(pictures(128, 64), replace(STILL, **{name: drawn})).max() < 1e-4


@pytest.mark.parametrize(
    ("name", "size"), [("crop", (128, 64)), ("crop", (50, 21)), ("angle", (64, 32)), ("blur", (64, 32))]
)
def test_resizing_rotation_and_blur_differ_by_one_level_in_few_pixels(name: str, size: tuple[int, int]) -> None:
    view: View = "perturbed" if name == "blur" else "train"
    errors = level_errors(pictures(*size), replace(STILL, **{name: getattr(draw(view), name)}))
    assert errors.max() < 1.001
    assert (errors > 0.5).double().mean() < 0.005


@pytest.mark.parametrize("view", ["train", "perturbed"])
def test_all_operators_together_differ_by_a_hundredth_of_a_level_on_average(view: View) -> None:
    errors = level_errors(pictures(128, 64), draw(view))
    assert errors.mean() < 0.01
    assert errors.max() < 6


def test_an_image_does_not_depend_on_the_others_of_its_batch() -> None:
    pixels, params = as_pixels(pictures(128, 64)), draw("perturbed")
    together = augment_batch(pixels, params, height=64, width=32)
    for row in range(0, NUM_IMAGES, 5):
        rows = slice(row, row + 1)
        assert torch.equal(augment_batch(pixels[rows], params.rows(rows), height=64, width=32), together[rows])


def test_normalization_of_a_batch_is_bitwise_that_of_its_images() -> None:
    images = pictures(16, 8)
    assert torch.equal(normalize_batch(as_pixels(images)), torch.stack([normalize(image) for image in images]))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gives_the_cpus_pixels() -> None:
    pixels, params = as_pixels(pictures(128, 64)), draw("perturbed")
    expected = augment_batch(pixels, params, height=64, width=32)
    found = augment_batch(pixels.cuda(), params, height=64, width=32).cpu()
    assert (found - expected).abs().mean() * 255 * 0.22 < 0.01
