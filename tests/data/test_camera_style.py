from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mprd.config.schema import DataConfig
from mprd.data.camera_style import (
    CameraColors,
    StyleFiles,
    check_style_files,
    choose_style,
    find_style_files,
    measure_colors,
)
from mprd.data.datasets import load_dataset
from mprd.errors import UserError
from tests.trees import write_image, write_images, write_market

MARKET_FAKES = [
    "0002_c1s1_000451_03_fake_1to2.jpg",
    "0002_c2s1_000776_01_fake_2to1.jpg",
    "0007_c1s3_000102_01_fake_1to2.jpg",
    "0007_c2s3_000202_02_fake_2to1.jpg",
]


def load_style(root: Path, dataset: str = "market1501", camera_style: str = "camstyle") -> StyleFiles | None:
    config = DataConfig.model_validate({"dataset": dataset, "root": root, "camera_style": camera_style})
    return load_dataset(config, cache_dir=root).style_paths


def test_camstyle_files_are_found_by_source_and_target_camera(tmp_path: Path) -> None:
    folder = write_market(tmp_path) / "bounding_box_train_camstyle"
    write_images(folder, MARKET_FAKES)
    style = load_style(tmp_path)
    assert style is not None
    assert not style.missing
    original = tmp_path / "bounding_box_train" / "0002_c2s1_000776_01.jpg"
    assert style.find(original, 1, 0) == folder / "0002_c2s1_000776_01_fake_2to1.jpg"
    assert style.find(original, 1, 1) == original


def test_camstyle_files_are_found_one_folder_below_the_root(tmp_path: Path) -> None:
    write_images(write_market(tmp_path / "Market") / "bounding_box_train_camstyle", MARKET_FAKES)
    assert load_style(tmp_path) is not None


def test_camstyle_names_of_msmt17_tell_the_target_alone(tmp_path: Path) -> None:
    root = write_market(tmp_path)
    fakes = [name.replace("1to", "").replace("2to", "") for name in MARKET_FAKES]
    write_images(root / "bounding_box_train_camstyle", fakes)
    style = load_style(root, "msmt17")
    assert style is not None
    assert not style.missing
    assert style.find(Path("0002_c2s1_000776_01.jpg"), 1, 0).name == "0002_c2s1_000776_01_fake_1.jpg"


def test_camstyle_names_keep_the_camera_numbers_of_the_files(tmp_path: Path) -> None:
    write_images(tmp_path, ["train/1_c0.jpg", "train/1_c5.jpg", "bounding_box_train_camstyle/1_c0_fake_0to5.jpg"])
    write_image(tmp_path / "bounding_box_train_camstyle" / "1_c5_fake_5to0.jpg")
    style = load_style(tmp_path, "folder")
    assert style is not None
    assert style.camera_numbers == (0, 5)
    assert not style.missing


def test_missing_camstyle_files_are_counted_and_fall_back_to_the_original(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(write_market(tmp_path) / "bounding_box_train_camstyle", MARKET_FAKES[1:])
    style = load_style(tmp_path)
    assert style is not None
    original = tmp_path / "bounding_box_train" / "0002_c1s1_000451_03.jpg"
    assert style.find(original, 0, 1) == original
    assert f"1 of 4 CamStyle files are missing, the first is {MARKET_FAKES[0]}" in caplog.text


def test_a_camstyle_folder_without_a_single_fitting_file_counts_as_absent(tmp_path: Path) -> None:
    write_images(write_market(tmp_path) / "bounding_box_train_camstyle", ["other.jpg"])
    assert load_style(tmp_path) is None


def test_camstyle_files_are_not_looked_for_unless_wanted(tmp_path: Path) -> None:
    write_images(write_market(tmp_path) / "bounding_box_train_camstyle", MARKET_FAKES)
    assert load_style(tmp_path, camera_style="none") is None


def test_one_camera_has_no_camstyle_files_to_miss(tmp_path: Path) -> None:
    paths = [write_image(tmp_path / "1_c1.jpg")]
    assert find_style_files(tmp_path, paths, np.array([0]), camera_numbers=(1,), names_source=True) is None


def test_unreadable_camstyle_files_count_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write_image(tmp_path / name) for name in ("1_c1.jpg", "1_c2.jpg")]
    write_image(tmp_path / "1_c1_fake_1to2.jpg")
    (tmp_path / "1_c2_fake_2to1.jpg").write_bytes(b"no image")
    style = check_style_files(StyleFiles(tmp_path, (1, 2), True), paths, np.array([0, 1]))
    assert style.missing == {"1_c2_fake_2to1.jpg"}
    assert "left out 1 of 2 unreadable CamStyle files" in caplog.text


def test_colours_are_measured_over_all_pixels_of_a_camera(tmp_path: Path) -> None:
    paths = [
        write_image(tmp_path / "a.png", (50, 10, 0)),
        write_image(tmp_path / "b.png", (150, 10, 0)),
        write_image(tmp_path / "c.png", (1, 2, 3)),
    ]
    colours = measure_colors(paths, np.array([0, 0, 2]))
    np.testing.assert_allclose(colours.mean[[0, 2]], [[100, 10, 0], [1, 2, 3]], atol=1e-9)
    # one colour has no deviation to divide by and takes 1
    np.testing.assert_allclose(colours.std[[0, 2]], [[50, 1, 1], [1, 1, 1]], atol=1e-9)
    assert np.isnan(colours.mean[1]).all()


def test_no_images_have_no_colours() -> None:
    assert measure_colors([], np.empty(0, dtype=np.int64)).mean.shape == (0, 3)


def test_colours_are_carried_over_by_mean_and_deviation_and_clipped() -> None:
    colours = CameraColors(np.array([[100.0, 100, 100], [50, 200, 100]]), np.array([[10.0, 10, 10], [20, 20, 5]]))
    image = Image.new("RGB", (1, 1), (110, 130, 92))
    # (110 - 100) / 10 * 20 + 50; (130 - 100) / 10 * 20 + 200 > 255; (92 - 100) / 10 * 5 + 100
    assert colours.transfer(image, 0, 1).getpixel((0, 0)) == (70, 255, 96)
    assert colours.transfer(image, 0, 0).getpixel((0, 0)) == (110, 130, 92)


@pytest.fixture
def two_cameras(tmp_path: Path) -> tuple[list[Path], np.ndarray]:
    return [write_image(tmp_path / "a.png"), write_image(tmp_path / "b.png")], np.array([0, 1])


def test_absent_camstyle_files_have_the_colours_stand_in(
    two_cameras: tuple[list[Path], np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    assert isinstance(choose_style("camstyle", *two_cameras, files=None), CameraColors)
    assert "using per-camera colors" in caplog.text


def test_each_camera_style_gives_what_it_says(
    two_cameras: tuple[list[Path], np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    files = StyleFiles(Path("styles"), (1, 2), True)
    assert choose_style("camstyle", *two_cameras, files=files) is files
    assert isinstance(choose_style("colour", *two_cameras, files=files), CameraColors)
    assert choose_style("none", *two_cameras, files=files) is None
    assert caplog.text == ""


def test_without_cameras_there_is_no_style(
    two_cameras: tuple[list[Path], np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    assert choose_style("colour", two_cameras[0], None, files=None) is None
    assert "no cameras in the file names" in caplog.text


def test_an_unknown_camera_style_is_refused(two_cameras: tuple[list[Path], np.ndarray]) -> None:
    with pytest.raises(UserError, match="but got 'gan'"):
        choose_style("gan", *two_cameras, files=None)
