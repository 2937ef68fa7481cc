"""Two looks at a set of images: what was added, is gone, renamed, replaced or written again."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mprd.data.same_images import Compare, ImageRecord, digest_files, find_changes

NAMES = ("a.jpg", "b.jpg", "c.jpg")


def write(root: Path) -> None:
    for number, name in enumerate(NAMES):
        (root / name).write_bytes(b"xyz"[: number + 1] * 5)
        os.utime(root / name, ns=(number, number))


def record(root: Path, compare: Compare = "times") -> ImageRecord:
    paths = sorted(root.iterdir())
    found = ImageRecord.of(paths, root, compare=compare)
    return ImageRecord.from_state_dict(found.state_dict())


def rewrite(root: Path, content: bytes) -> None:
    (root / "b.jpg").write_bytes(content)
    os.utime(root / "b.jpg", ns=(9, 9))


@pytest.mark.parametrize(
    ("change", "by_time", "by_content", "rows"),
    [
        (lambda root: None, "", "", [0, 1, 2]),
        (lambda root: (root / "b.jpg").rename(root / "z.jpg"), *["1 renamed (first b.jpg to z.jpg)"] * 2, [0, 2, 1]),
        (lambda root: (root / "a.jpg").unlink(), *["1 gone (first a.jpg)"] * 2, [1, 2]),
        (lambda root: (root / "aa\udcff.jpg").write_bytes(b""), *["1 added (first aa\udcff.jpg)"] * 2, [0, -1, 1, 2]),
        (lambda root: rewrite(root, b"longer than before"), *["1 with another content (first b.jpg)"] * 2, [0, -1, 2]),
        (
            lambda root: rewrite(root, b"XYXYXYXYXY"),
            "1 written again since, of the same size (first b.jpg)",
            "1 with another content (first b.jpg)",
            [0, -1, 2],
        ),
        (
            lambda root: rewrite(root, b"xyxyxyxyxy"),
            "1 written again since, of the same size (first b.jpg)",
            "",
            [0, 1, 2],
        ),
    ],
)
def test_changes_are_told_and_rows_follow_names(
    change: Callable[[Path], object], by_time: str, by_content: str, rows: list[int], tmp_path: Path
) -> None:
    write(tmp_path)
    records = {compare: record(tmp_path, compare) for compare in ("times", "content")}
    change(tmp_path)
    for compare, text in (("times", by_time), ("content", by_content)):
        found = find_changes(records[compare], record(tmp_path, compare))
        assert (str(found), bool(found)) == (text, bool(text))
    # of the last record, by content
    assert found.rows.tolist() == rows


def test_copies_of_one_file_are_not_told_apart_as_renamed(tmp_path: Path) -> None:
    write(tmp_path)
    for name in ("b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(b"same")
        os.utime(tmp_path / name, ns=(5, 5))
    before = record(tmp_path)
    (tmp_path / "b.jpg").rename(tmp_path / "y.jpg")
    (tmp_path / "c.jpg").rename(tmp_path / "z.jpg")
    found = find_changes(before, record(tmp_path))
    assert (found.renamed, found.gone, found.added) == ({}, ["b.jpg", "c.jpg"], ["y.jpg", "z.jpg"])


def test_drawn_images_may_be_drawn_again(tmp_path: Path) -> None:
    write(tmp_path)
    before = record(tmp_path, "sizes")
    rewrite(tmp_path, b"XYXYXYXYXY")
    assert not find_changes(before, record(tmp_path, "sizes"))


def test_a_digest_is_of_paths_sizes_times_and_facts(tmp_path: Path) -> None:
    write(tmp_path)
    paths = sorted(tmp_path.iterdir())
    first = digest_files(paths, "x")
    assert first == digest_files(map(str, paths), "x")
    others = {digest_files(paths, "y"), digest_files(paths[:2], "x")}
    os.utime(paths[0], ns=(7, 7))
    others.add(digest_files(paths, "x"))
    assert len({first, *others}) == 4
