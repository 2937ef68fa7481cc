"""CamStyle's files are found by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mprd.config.schema import DataConfig
from mprd.data.camera_style import StyleFiles, check_style_files, find_style_files
from mprd.data.datasets import load_dataset
from tests.trees import CAMSTYLE, write_image, write_images, write_market

FOLDER = "bounding_box_train_camstyle"


def load_style(root: Path, dataset: str = "market1501", camera_style: str = "camstyle") -> StyleFiles | None:
    config = DataConfig.model_validate({"dataset": dataset, "root": root, "camera_style": camera_style})
    return load_dataset(config).style_paths


@pytest.mark.parametrize(("dataset", "name"), [("market1501", "2to1"), ("msmt17", "1")])
def test_files_are_found_by_source_and_target_camera(tmp_path: Path, dataset: str, name: str) -> None:
    root = write_market(tmp_path / "Market")
    fakes = CAMSTYLE if dataset == "market1501" else [fake.replace("1to", "").replace("2to", "") for fake in CAMSTYLE]
    write_images(root / FOLDER, fakes)
    style = load_style(tmp_path, dataset)
    assert style is not None
    assert not style.missing
    original = root / "bounding_box_train" / "0002_c2s1_000776_01.jpg"
    assert style.find(original, 1, 0) == root / FOLDER / f"0002_c2s1_000776_01_fake_{name}.jpg"
    assert style.find(original, 1, 1) == original
    assert load_style(tmp_path, camera_style="none") is None


def test_names_hold_the_camera_numbers_of_the_files(tmp_path: Path) -> None:
    names = ["train/1_c0.jpg", "train/1_c5.jpg", f"{FOLDER}/1_c0_fake_0to5.jpg", f"{FOLDER}/1_c5_fake_5to0.jpg"]
    write_images(tmp_path, names)
    style = load_style(tmp_path, "folder")
    assert style is not None
    assert style.camera_numbers == (0, 5)
    assert not style.missing


def test_missing_files_are_counted_and_replaced_by_the_original(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(write_market(tmp_path) / FOLDER, CAMSTYLE[1:])
    style = load_style(tmp_path)
    assert style is not None
    original = tmp_path / "bounding_box_train" / "0002_c1s1_000451_03.jpg"
    assert style.find(original, 0, 1) == original
    assert f"1 of 4 CamStyle files are missing, the first is {CAMSTYLE[0]}" in caplog.text


def test_a_folder_without_an_expected_file_counts_as_absent(tmp_path: Path) -> None:
    write_images(write_market(tmp_path) / FOLDER, ["other.jpg"])
    assert load_style(tmp_path) is None
    # a single camera expects no file
    paths = [write_image(tmp_path / "1_c1.jpg")]
    assert find_style_files(tmp_path, paths, np.array([0]), camera_numbers=(1,), names_source=True) is None


def test_unreadable_files_count_as_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = [write_image(tmp_path / name) for name in ("1_c1.jpg", "1_c2.jpg")]
    write_image(tmp_path / "1_c1_fake_1to2.jpg")
    (tmp_path / "1_c2_fake_2to1.jpg").write_bytes(b"no image")
    style = check_style_files(StyleFiles(tmp_path, (1, 2), True), paths, np.array([0, 1]))
    assert style.missing == {"1_c2_fake_2to1.jpg"}
    assert "left out 1 of 2 unreadable CamStyle files" in caplog.text
