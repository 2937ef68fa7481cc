"""A data set with its halves exchanged: the new training images, queries and gallery."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "other_half.py"
HALVES = ("bounding_box_train", "query", "bounding_box_test")
TEST = {"query": ["0003_c1s1_7"], "bounding_box_test": ["0003_c2s1_8", "0000_c1s1_9"]}


def exchange(root: Path, out: Path, files: dict[str, list[str]]) -> subprocess.CompletedProcess[str]:
    for folder, names in files.items():
        (root / folder).mkdir(parents=True)
        for name in names:
            (root / folder / f"{name}.jpg").write_text(name)
    return subprocess.run([sys.executable, SCRIPT, root, out], capture_output=True, text=True)


@pytest.mark.parametrize(
    ("train", "query", "gallery"),
    [
        # the first of two images of an identity under one camera; junk is left out
        (
            ["0001_c1s1_1", "0001_c1s1_2", "0001_c2s1_3", "0002_c1s2_4", "0002_c1s3_5", "-1_c1s1_6"],
            ["0001_c1s1_1", "0002_c1s2_4"],
            ["0001_c1s1_2", "0001_c2s1_3", "0002_c1s3_5"],
        ),
        # the first camera if no identity has two images under one
        (
            ["0001_c2s1_1", "0001_c1s1_2", "0002_c1s1_3", "0002_c2s1_4"],
            ["0001_c1s1_2", "0002_c1s1_3"],
            ["0001_c2s1_1", "0002_c2s1_4"],
        ),
        # cameras are compared as numbers
        (["0001_c10s1_1", "0001_c2s1_2"], ["0001_c2s1_2"], ["0001_c10s1_1"]),
    ],
)
def test_the_halves_are_exchanged(train: list[str], query: list[str], gallery: list[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = exchange(tmp_path / "root", out, {"bounding_box_train": train, **TEST})
    assert done.returncode == 0, done.stderr
    found = [sorted(file.read_text() for file in (out / folder).iterdir()) for folder in HALVES]
    assert found == [["0003_c1s1_7", "0003_c2s1_8"], query, gallery]
    assert f"2 in bounding_box_train, {len(query)} in query, {len(gallery)} in bounding_box_test" in done.stdout


@pytest.mark.parametrize(
    ("train", "folders", "out", "message"),
    [
        ([], ["bounding_box_test"], "new", "has no folder query"),
        ([], ["query", "bounding_box_test"], "old", "already exists"),
        (["0001_c1s1_1", "someone"], ["query", "bounding_box_test"], "new", "someone.jpg: the name does not parse"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(
    train: list[str], folders: list[str], out: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "old").mkdir()
    files = {"bounding_box_train": train, **{folder: TEST[folder] for folder in folders}}
    done = exchange(tmp_path / "root", tmp_path / out, files)
    assert done.returncode == 2
    assert message in done.stderr
    assert not (tmp_path / "new").exists()
    assert not any((tmp_path / "old").iterdir())
