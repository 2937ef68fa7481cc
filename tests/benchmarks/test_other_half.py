"""A data set with its halves exchanged: who trains, who asks, who answers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "other_half.py"
HALVES = ("bounding_box_train", "query", "bounding_box_test")


def exchange(root: Path, out: Path, files: dict[str, list[str]]) -> subprocess.CompletedProcess[str]:
    for folder, names in files.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / f"{name}.jpg").write_text(name)
    return subprocess.run([sys.executable, SCRIPT, root, out], capture_output=True, text=True)


def names(out: Path) -> dict[str, list[str]]:
    return {folder: sorted(file.read_text() for file in (out / folder).iterdir()) for folder in HALVES}


def test_the_first_image_of_a_person_under_a_camera_asks_where_it_leaves_another(tmp_path: Path) -> None:
    train = ["0001_c1s1_1", "0001_c1s1_2", "0001_c2s1_3", "0002_c1s2_4", "0002_c1s3_5", "-1_c1s1_6"]
    files = dict(zip(HALVES, (train, ["0003_c1s1_7"], ["0003_c2s1_8", "0000_c1s1_9"]), strict=True))
    done = exchange(tmp_path / "root", tmp_path / "out", files)
    assert done.returncode == 0, done.stderr
    found = names(tmp_path / "out")
    assert found["bounding_box_train"] == ["0003_c1s1_7", "0003_c2s1_8"]
    assert found["query"] == ["0001_c1s1_1", "0002_c1s2_4"]
    assert found["bounding_box_test"] == ["0001_c1s1_2", "0001_c2s1_3", "0002_c1s3_5"]
    assert "2 in bounding_box_train, 2 in query, 3 in bounding_box_test" in done.stdout


def test_the_first_camera_asks_where_nobody_has_two_images_under_one(tmp_path: Path) -> None:
    train = ["0001_c2s1_1", "0001_c1s1_2", "0002_c1s1_3", "0002_c2s1_4"]
    files = dict(zip(HALVES, (train, ["0003_c1s1_5"], ["0003_c2s1_6"]), strict=True))
    exchange(tmp_path / "root", tmp_path / "out", files)
    found = names(tmp_path / "out")
    assert found["query"] == ["0001_c1s1_2", "0002_c1s1_3"]
    assert found["bounding_box_test"] == ["0001_c2s1_1", "0002_c2s1_4"]


@pytest.mark.parametrize(("missing", "message"), [("query", "has no folder query"), (None, "is there already")])
def test_a_missing_folder_and_one_in_the_way_are_named(missing: str | None, message: str, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    done = exchange(tmp_path / "root", tmp_path / "out", {name: [] for name in HALVES if name != missing})
    assert done.returncode == 2
    assert message in done.stderr
    assert not any((tmp_path / "out").iterdir())


def test_a_name_that_does_not_parse_is_named(tmp_path: Path) -> None:
    files = dict(zip(HALVES, (["0001_c1s1_1", "someone"], ["0003_c1s1_5"], ["0003_c2s1_6"]), strict=True))
    done = exchange(tmp_path / "root", tmp_path / "out", files)
    assert done.returncode == 2
    assert "someone.jpg: the name does not parse" in done.stderr
    assert not (tmp_path / "out").exists()


def test_cameras_are_numbers(tmp_path: Path) -> None:
    files = dict(zip(HALVES, (["0001_c10s1_1", "0001_c2s1_2"], ["0003_c1s1_5"], ["0003_c2s1_6"]), strict=True))
    exchange(tmp_path / "root", tmp_path / "out", files)
    assert names(tmp_path / "out")["query"] == ["0001_c2s1_2"]
