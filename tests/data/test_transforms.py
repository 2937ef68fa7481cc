"""Augmentation of one image: each operator by hand, and the ranges and frequencies of the parameters."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mprd.config.schema import DataConfig
from mprd.data.transforms import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    STRENGTHS,
    AugmentParams,
    Strength,
    View,
    augment,
    draw_boxes,
    draw_params,
    normalize,
)

CONFIG = DataConfig(height=64, width=32)
WHOLE, NOWHERE = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.0, 0.0)
STILL = AugmentParams(*map(np.array, (0, WHOLE, False, 0.0, 1.0, 1.0, 1.0, False, 0.0, NOWHERE)))


def still(**changes: Any) -> AugmentParams:
    """Return the parameters of one image that is changed by these alone."""
    return replace(STILL, **{name: np.array(value) for name, value in changes.items()})


def draw(
    count: int, *, seed: int = 0, epoch: int = 0, view: View = "train", config: DataConfig = CONFIG
) -> AugmentParams:
    return draw_params(seed, epoch, images=np.arange(count), view=view, num_cameras=6, config=config)


def picture(rows: list[list[int]]) -> Image.Image:
    """Return a gray image."""
    return Image.fromarray(np.array(rows, dtype=np.uint8)).convert("RGB")


def gray(pixels: torch.Tensor) -> np.ndarray:
    """Undo the normalization of the first channel."""
    return (pixels[0].double().numpy() * IMAGENET_STD[0] + IMAGENET_MEAN[0]) * 255


def test_normalization_uses_the_imagenet_mean_and_deviation() -> None:
    pixels = normalize(Image.new("RGB", (2, 3), (255, 0, 51)))
    assert pixels.shape == (3, 3, 2)
    assert pixels.dtype == torch.float32
    expected = [(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225]
    torch.testing.assert_close(pixels[:, 0, 0], torch.tensor(expected), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "rows", "expected"),
    [
        ({}, [[0, 50], [100, 250]], [[0, 50], [100, 250]]),
        ({"flip": True}, [[0, 50], [100, 250]], [[50, 0], [250, 100]]),
        (
            {"crop": (0.25, 0.5, 0.5, 0.5)},
            [[0, 0, 0, 0], [0, 0, 10, 20], [0, 0, 30, 40], [0, 0, 0, 0]],
            [[10, 20], [30, 40]],
        ),
    ],
)
def test_flip_and_crop(changes: dict[str, Any], rows: list[list[int]], expected: list[list[int]]) -> None:
    pixels = augment(picture(rows), still(**changes), height=2, width=2)
    np.testing.assert_allclose(gray(pixels), expected, atol=1e-3)


def test_a_rotation_is_counter_clockwise_and_exposes_the_mean_color() -> None:
    rows = [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    turned = augment(picture(rows), still(angle=90.0), height=3, width=3)
    np.testing.assert_allclose(gray(turned), [[30, 60, 90], [20, 50, 80], [10, 40, 70]], atol=1.01)
    tilted = augment(Image.new("RGB", (20, 20), (255, 255, 255)), still(angle=45.0), height=20, width=20)
    # the mean is rounded to 8 bits: at most half a step of 1/255, over a deviation of 0.224
    assert tilted[:, 0, 0].abs().max() < 0.5 / 255 / 0.224 + 1e-6


def test_brightness_scales_contrast_spreads_around_the_mean_and_saturation_blends_with_gray() -> None:
    flat = picture([[100, 200]])
    brighter = augment(flat, still(brightness=1.2), height=1, width=2)
    np.testing.assert_allclose(gray(brighter), [[120, 240]], atol=1)
    # the mean is 150
    duller = augment(flat, still(contrast=0.8), height=1, width=2)
    np.testing.assert_allclose(gray(duller), [[110, 190]], atol=1)
    red = augment(Image.new("RGB", (1, 1), (200, 0, 0)), still(saturation=0.5), height=1, width=1)
    # luma is 0.299 * 200 = 60; halfway from 200 is 130
    np.testing.assert_allclose(gray(red), [[130]], atol=1)


def test_grayscale_gives_three_equal_channels_of_luma() -> None:
    pixels = augment(Image.new("RGB", (1, 1), (200, 0, 0)), still(grayscale=True), height=1, width=1)
    mean, std = torch.tensor(IMAGENET_MEAN).view(3, 1, 1), torch.tensor(IMAGENET_STD).view(3, 1, 1)
    torch.testing.assert_close((pixels * std + mean) * 255, torch.full((3, 1, 1), 60.0), rtol=0, atol=1)


def test_blur_spreads_a_dot_and_keeps_its_sum() -> None:
    rows = np.zeros((64, 32), dtype=np.uint8)
    rows[32, 16] = 255
    pixels = gray(augment(picture(rows.tolist()), still(blur=0.01), height=64, width=32))
    assert pixels[32, 16] < 200
    assert pixels[31, 16] > 10
    assert pixels.sum() == pytest.approx(255, abs=20)


def test_the_erased_box_gets_the_mean_color() -> None:
    white = Image.new("RGB", (8, 8), (255, 255, 255))
    pixels = augment(white, still(erase=(0.25, 0.5, 0.5, 0.25)), height=8, width=8)
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:6, 4:6] = True
    assert torch.equal((pixels == 0).all(0), expected)


def test_parameters_are_in_the_configured_ranges() -> None:
    params = draw(400)
    top, left, height, width = params.crop.T
    assert_within(height * width, 0.64, 1)
    # 2 to 3 for an image twice as high as wide
    assert_within(2 * height / width, 2, 3)
    assert_within(params.crop, 0, 1)
    assert_within(top + height, 0, 1)
    assert_within(left + width, 0, 1)
    assert_within(params.angle, -10, 10)
    for factors in (params.brightness, params.contrast, params.saturation):
        assert_within(factors, 0.8, 1.2)
    erased = params.erase[params.erase[:, 2] > 0]
    assert_within(erased[:, 2] * erased[:, 3], 0.02, 0.2)
    assert_within(erased[:, 0] + erased[:, 2], 0, 1)
    assert not params.grayscale.any()
    assert not params.blur.any()


def assert_within(found: np.ndarray, low: float, high: float) -> None:
    assert low - 1e-9 <= found.min()
    assert found.max() <= high + 1e-9


def test_cameras_flips_and_erasing_have_the_configured_frequencies() -> None:
    params = draw(1200)
    # 200 each; four standard deviations are 52
    counts = np.bincount(params.camera)
    assert len(counts) == 6
    assert (abs(counts - 200) < 52).all()
    # 600; four standard deviations are 69
    assert abs(params.flip.sum() - 600) < 69
    assert abs((params.erase[:, 2] > 0).sum() - 600) < 69


def test_the_perturbed_copy_has_grayscale_and_blur_and_no_erasing() -> None:
    params = draw(400, view="perturbed")
    assert not params.erase.any()
    # 80 and 200; four standard deviations are 32 and 40
    assert abs(params.grayscale.sum() - 80) < 32
    blurred = params.blur[params.blur > 0]
    assert abs(len(blurred) - 200) < 40
    assert_within(blurred, 0.001, 0.01)


def test_parameters_depend_on_seed_epoch_image_and_view() -> None:
    first, again = draw(2), draw_params(0, 0, images=np.array([1, 0]), view="train", num_cameras=6, config=CONFIG)
    for field in fields(AugmentParams):
        assert np.array_equal(getattr(again, field.name)[::-1], getattr(first, field.name))
    others = [draw(1, seed=1), draw(1, epoch=1), draw(1, view="perturbed")]
    assert len(np.unique(np.concatenate([first.crop, *(params.crop for params in others)]), axis=0)) == 5


def test_a_part_of_the_strength_changes_its_own_parameter_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    still = Strength(jitter=0, rotation=0, crop_area=STRENGTHS["standard"].crop_area, erasing=0)
    monkeypatch.setitem(STRENGTHS, "small", still)
    with_all, without = draw(20), draw(20, config=DataConfig(height=64, width=32, augmentation="small"))
    for name, value in (("angle", 0), ("brightness", 1), ("contrast", 1), ("saturation", 1), ("erase", 0)):
        assert (getattr(without, name) == value).all()
    for name in ("crop", "flip", "camera"):
        assert np.array_equal(getattr(without, name), getattr(with_all, name))


def test_a_box_is_the_first_attempt_that_fits() -> None:
    attempts = np.array([[1.0, 1.0, 0.0, 0.5, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    place = np.array([[0.5, 0.25], [0.5, 0.25]])
    # area 1 at ratio 1.5 is too high; then area 0.64 at ratio 1.25: sqrt(0.8) high, sqrt(0.512) wide
    boxes = draw_boxes(attempts, place, area=(0.64, 1), ratio=(2, 3), frame=2)
    height, width = 0.8**0.5, 0.512**0.5
    np.testing.assert_allclose(boxes[0], (0.5 * (1 - height), 0.25 * (1 - width), height, width), atol=1e-12)
    assert not boxes[1].any()


def test_a_crop_that_never_fits_is_the_whole_image_and_such_an_erased_box_is_empty(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = Strength(jitter=0.2, rotation=10, crop_area=(1, 1), erasing=1, erased_area=(1, 1))
    monkeypatch.setitem(STRENGTHS, "standard", whole)
    params = draw(40, config=DataConfig(height=16, width=256))
    assert (params.crop == WHOLE).all()
    assert (params.erase == 0).all()
