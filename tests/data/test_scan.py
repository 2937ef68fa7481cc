"""The scanner reads images behind links, and counts what it passes over."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from mprd.data.scan import scan
from mprd.errors import UserError
from mprd.storage import cache
from mprd.storage.cache import cache_folder, make_cache
from tests.trees import write_image, write_images


def unopened(root: Path) -> None:
    """Make a folder that even root cannot list: it is a link to itself."""
    (root / "loop").symlink_to("loop")


@pytest.mark.parametrize(
    ("change", "left_out"),
    [
        (lambda root: (root / "b").symlink_to(root / "a"), {"links to folders that are read already": (1, "b")}),
        (lambda root: (root / "a" / "up").symlink_to(root), {"links to a folder above": (1, "a/up")}),
        (lambda root: (root / "up").symlink_to(root.parent), {"links to a folder above": (1, "up")}),
        (lambda root: (root / "gone").symlink_to(root / "nowhere"), {"broken links": (1, "gone")}),
        (lambda root: (root / "x.jpg").symlink_to("nowhere.jpg"), {"broken links": (1, "x.jpg")}),
        (unopened, {"broken links": (1, "loop")}),
        (lambda root: os.mkfifo(root / "x.png"), {"names of images that are no files": (1, "x.png")}),
        (lambda root: write_image(root / ".x.jpg"), {"hidden images": (1, ".x.jpg")}),
        (lambda root: write_image(root / "a" / "._1.jpg"), {"hidden images": (1, "a/._1.jpg")}),
        (
            lambda root: write_images(root, ["x/@eaDir/1.jpg/S.jpg", "__MACOSX/2.jpg", ".Trash-1000/files/3.jpg"]),
            {"images in hidden and system folders": (3, ".Trash-1000/files/3.jpg")},
        ),
        (lambda root: (root / "Thumbs.db").write_text(""), {}),
        (lambda root: (root / "lost+found").mkdir(), {}),
        (
            lambda root: write_images(root, ["x.HEIC", "y.heic"]),
            {"files of a format that is not read (.heic)": (2, "x.HEIC")},
        ),
    ],
)
def test_what_is_passed_over_is_counted_with_its_first_name(
    change: Callable[[Path], object], left_out: dict[str, tuple[int, str]], tmp_path: Path
) -> None:
    write_images(tmp_path / "tree" / "a", ["1.jpg", "2.TIF", "d.jpg/3.png"])
    change(tmp_path / "tree")
    found = scan(tmp_path / "tree")
    assert found.names == ["a/1.jpg", "a/2.TIF", "a/d.jpg/3.png"]
    assert {part.reason: (part.count, part.first) for part in found.left_out} == left_out


def test_images_behind_links_are_read_each_folder_once(tmp_path: Path) -> None:
    for camera in "123":
        write_images(tmp_path / "disk" / f"cam{camera}", ["1.jpg", "deep/2.jpg"])
    (tmp_path / "disk" / "cam1" / "back").symlink_to(tmp_path / "disk")
    (tmp_path / "tree").mkdir()
    for camera in "123":
        (tmp_path / "tree" / f"cam{camera}").symlink_to(tmp_path / "disk" / f"cam{camera}")
    (tmp_path / "tree" / "9.jpg").symlink_to(tmp_path / "disk" / "cam1" / "1.jpg")
    found = scan(tmp_path / "tree")
    expected = [f"cam{camera}/{name}" for camera in "123" for name in ("1.jpg", "deep/2.jpg")]
    # the disk itself is seen once more, behind the link inside, without what is read already
    assert found.names == ["9.jpg", *expected]
    assert sum(part.count for part in found.left_out) == 3


def test_a_folder_that_cannot_be_opened_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_images(tmp_path, ["a/1.jpg", "b/2.jpg"])
    real = os.scandir

    def refuse(place: str) -> object:
        if str(place).endswith("/b"):
            raise PermissionError(13, "Permission denied")
        return real(place)

    monkeypatch.setattr(os, "scandir", refuse)
    found = scan(tmp_path)
    assert found.names == ["a/1.jpg"]
    assert [str(part) for part in found.left_out] == ["1 folders that cannot be opened (Permission denied) (first b)"]
    with pytest.raises(UserError, match="b: cannot open the folder: Permission denied"):
        scan(tmp_path / "b")
    with pytest.raises(UserError, match="no such folder"):
        scan(tmp_path / "c")


def test_folders_that_mprd_wrote_hold_no_training_images(tmp_path: Path) -> None:
    for folder, files in (("run", ("config.yaml", "run.json")), ("study", ("study.yaml", "study.json"))):
        write_images(tmp_path / folder, ["curves.png"])
        for file in files:
            (tmp_path / folder / file).write_text("")
    make_cache(tmp_path / "cache")
    write_images(tmp_path / "cache" / "drawn", ["1.jpg"])
    write_images(tmp_path / "mine", ["1.jpg"])
    (tmp_path / "mine" / "config.yaml").write_text("")
    found = scan(tmp_path)
    assert found.names == ["mine/1.jpg"]
    assert [(part.reason, part.count) for part in found.left_out] == [("images in mprd's own folders", 3)]
    # named by the user, a drawn set is a set like another
    assert scan(tmp_path / "cache" / "drawn").names == ["1.jpg"]


def test_the_cache_is_the_users_unless_told_or_not_writable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPRD_CACHE", str(tmp_path / "new" / "cache"))
    assert cache_folder() == tmp_path / "new" / "cache"
    monkeypatch.setenv("MPRD_CACHE", "/proc/cache")
    # the superuser may write anywhere
    monkeypatch.setattr(cache, "can_write", lambda folder: not str(folder).startswith("/proc"))
    with pytest.raises(UserError, match="MPRD_CACHE: cannot write to /proc/cache"):
        cache_folder()
    monkeypatch.delenv("MPRD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "mprd"
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc")
    assert cache_folder().name.startswith("mprd-")
