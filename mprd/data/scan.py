"""List the images below a folder: the one scanner of training, doctor, extraction and search; no pixels are read.

Links to folders are followed, each real folder once. What is passed over is counted: hidden files, the litter of
desktops and network drives, mprd's own folders, and what cannot be opened.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from mprd.data.own_files import is_own
from mprd.errors import UserError

logger = logging.getLogger("mprd")

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".gif", ".jfif")
UNREAD_SUFFIXES = (".heic", ".heif", ".avif", ".jxl", ".jp2", ".svg", ".dng", ".mp4", ".avi", ".mov", ".mkv")
"""Pictures and videos that are not read, and that the user may think are."""
LITTER = frozenset(
    {
        *("@eadir", "@tmp", "@recycle", "@recently-snapshot", "#recycle", "#snapshot", "lost+found"),
        *("__macosx", "$recycle.bin", "system volume information", "network trash folder", "temporary items"),
        *("__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"),
    }
)
"""Files and folders of desktops, network drives and file systems, lower case."""


@dataclass(frozen=True)
class LeftOut:
    """Files or folders that are passed over for one reason."""

    reason: str
    """In words, behind the number."""
    count: int
    first: str
    """The first of them, below the scanned folder."""
    is_expected: bool = False
    """Whether published data sets have such files."""

    def __str__(self) -> str:
        return f"{self.count:,} {self.reason} (first {self.first})"


@dataclass(frozen=True)
class Scan:
    """The images below a folder."""

    root: Path
    names: list[str]
    """Relative paths, sorted."""
    left_out: tuple[LeftOut, ...] = ()

    @cached_property
    def folders(self) -> list[str]:
        """The relative paths of all folders with images in them or below, sorted; without the root."""
        found: set[str] = set()
        for folder in {name.rpartition("/")[0] for name in self.names}:
            parts = folder.split("/")
            found |= {"/".join(parts[:depth]) for depth in range(1, len(parts) + 1)}
        return sorted(found - {""})


def scan(root: Path) -> Scan:
    """List the images below a folder; raise UserError where it cannot be opened."""
    check_folder(root)
    walk = Walk(str(root))
    walk.run()
    left_out = (LeftOut(reason, count, first) for reason, (count, first) in sorted(walk.left.items()))
    return Scan(root, sorted(walk.names), tuple(left_out))


def check_folder(root: Path, *, setting: str = "") -> None:
    """Raise UserError unless a folder exists and can be opened."""
    hint = f" ({setting})" if setting else ""
    if not os.path.isdir(root):
        raise UserError(f"{root}: no such folder{hint}")
    try:
        os.scandir(root).close()
    except OSError as error:
        raise UserError(f"{root}: cannot open the folder: {error.strerror}{hint}") from None


class Walk:
    """One pass over a tree: real folders first, so that a link never takes the place of the folder that it shows."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.above = set(real_parents(root))
        self.seen: set[tuple[int, int]] = set()
        self.links: list[str] = []
        self.names: list[str] = []
        self.left: dict[str, tuple[int, str]] = {}

    def run(self) -> None:
        """Walk the real folders, and then those behind links."""
        self.walk("")
        while self.links:
            self.links.sort(key=lambda name: (name.count("/"), name))
            self.follow(self.links.pop(0))

    def walk(self, top: str) -> None:
        """Walk a folder and those below it."""
        waiting = [top]
        while waiting:
            name = waiting.pop()
            place = os.path.join(self.root, name)
            try:
                status = os.stat(place)
                with os.scandir(place) as found:
                    entries = sorted(found, key=lambda entry: entry.name)
            except OSError as error:
                self.leave_out(f"folders that cannot be opened ({error.strerror})", name)
                continue
            if (status.st_dev, status.st_ino) in self.seen:
                self.leave_out("links to folders that are read already", name)
                continue
            if name and is_own(place, [entry.name for entry in entries]):
                self.leave_out_images("images in mprd's own folders", name)
                continue
            self.seen.add((status.st_dev, status.st_ino))
            prefix = f"{name}/" if name else ""
            waiting += reversed([prefix + entry.name for entry in entries if self.take(entry, prefix + entry.name)])

    def take(self, entry: os.DirEntry[str], name: str) -> bool:
        """Keep an image, note a link or a reason to pass over the entry; return whether it is a folder to walk."""
        is_link = entry.is_symlink()
        try:
            is_folder, is_file = entry.is_dir(), entry.is_file()
        except OSError:
            is_folder, is_file = False, False
        if entry.name.startswith(".") or entry.name.lower() in LITTER:
            if is_folder and not is_link:
                self.leave_out_images("images in hidden and system folders", name)
            elif is_image(entry.name) and is_file:
                self.leave_out("hidden images", name)
        elif is_folder:
            if is_link:
                self.links.append(name)
            return not is_link
        elif is_link and not os.path.exists(entry.path):
            self.leave_out("broken links", name)
        elif is_image(entry.name):
            if is_file:
                self.names.append(name)
            else:
                self.leave_out("names of images that are no files", name)
        elif entry.name.lower().endswith(UNREAD_SUFFIXES):
            self.leave_out(f"files of a format that is not read ({os.path.splitext(entry.name)[1].lower()})", name)
        return False

    def follow(self, name: str) -> None:
        """Walk the folder behind a link, unless the tree lies below it."""
        if os.path.realpath(os.path.join(self.root, name)) in self.above:
            self.leave_out("links to a folder above", name)
        else:
            self.walk(name)

    def leave_out(self, reason: str, name: str, count: int = 1) -> None:
        """Count what is passed over."""
        known, first = self.left.get(reason, (0, name))
        self.left[reason] = known + count, min(first, name)

    def leave_out_images(self, reason: str, folder: str) -> None:
        """Count the images below a folder that is passed over."""
        count, first = 0, ""
        for place, _, files in os.walk(os.path.join(self.root, folder)):
            for path in (os.path.join(place, file) for file in sorted(filter(is_image, files))):
                if os.path.isfile(path):
                    count, first = count + 1, first or os.path.relpath(path, self.root)
        if count:
            self.leave_out(reason, first, count)


def check_matches(matches: Iterable[str]) -> tuple[list[str], list[LeftOut]]:
    """Return the matches of a glob that the scanner would read, sorted, each real file once, and what is left out."""
    kept: dict[str, str] = {}
    left: dict[str, list[str]] = defaultdict(list)
    for name in sorted(filter(is_image, matches), key=lambda name: (name.count("/"), name)):
        real = os.path.realpath(name)
        if any(part.lower() in LITTER for part in name.split("/")):
            left["images in hidden and system folders"].append(name)
        elif not os.path.isfile(name):
            left["names of images that are no files"].append(name)
        elif kept.setdefault(real, name) != name:
            left["links to images that are read already"].append(name)
    return sorted(kept.values()), [LeftOut(reason, len(names), names[0]) for reason, names in left.items()]


def real_parents(root: str) -> Iterable[str]:
    """Yield the real path of a folder and of all above it."""
    place = os.path.realpath(root)
    while True:
        yield place
        if place == os.path.dirname(place):
            return
        place = os.path.dirname(place)


def is_image(name: str) -> bool:
    """Return whether a file's name is that of an image."""
    return name.lower().endswith(IMAGE_SUFFIXES)


def group_by_folder(names: Iterable[str]) -> dict[str, list[str]]:
    """Group names by their first folder; names without one are under the empty name."""
    groups: dict[str, list[str]] = defaultdict(list)
    for name in names:
        groups[name.split("/")[0] if "/" in name else ""].append(name)
    return groups


def log_left_out(root: Path | str, left_out: Sequence[LeftOut]) -> None:
    """Log in one line what is passed over, as a warning where published data sets have nothing of the kind."""
    if left_out:
        level = logging.INFO if all(part.is_expected for part in left_out) else logging.WARNING
        logger.log(level, "%s: left out: %s", root, "; ".join(map(str, left_out)))
