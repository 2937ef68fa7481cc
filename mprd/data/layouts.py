"""Folder layouts and file names of published data sets; no pixels are read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from mprd.errors import UserError
from mprd.text import read_text

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp")
MARKET_NAME = re.compile(r"^(?P<pid>-?\d+)_c(?P<camid>\d+)")
MSMT17_LINE = re.compile(r"(?P<path>(?:.*/)?[^/_]+_[^/_]+_(?P<camid>\d+)_\S*)\s+(?P<pid>-?\d+)")
STYLE_FOLDER = "bounding_box_train_camstyle"


class Crop(NamedTuple):
    """One image of one pedestrian, with the ids as spelled in its name."""

    path: Path
    pid: str | None
    camid: str | None


class Splits(NamedTuple):
    """The crops of a data set, each split sorted by name."""

    train: list[Crop]
    query: list[Crop]
    gallery: list[Crop]


def read_market(root: Path) -> Splits:
    """Read Market-1501's layout, shared by DukeMTMC-reID and many other data sets.

    Raises UserError naming a missing or empty folder, or the first name that does not parse.
    """
    root = find_root(root, is_market, wanted="a folder bounding_box_train")
    folders = (root / "bounding_box_train", root / "query", root / "bounding_box_test")
    return Splits(*(read_folder(folder, MARKET_NAME) for folder in folders))


def read_msmt17(root: Path) -> Splits:
    """Read MSMT17: its official folders and lists (V1 or V2; train = list_train + list_val), or Market's layout."""
    wanted = "list_train.txt (the official layout) or a folder bounding_box_train"
    root = find_root(root, lambda folder: is_official_msmt17(folder) or is_market(folder), wanted=wanted)
    if not is_official_msmt17(root):
        return read_market(root)
    train = require_folder(root, ("train", "mask_train_v2"))
    test = require_folder(root, ("test", "mask_test_v2"))
    return Splits(
        read_lists([root / "list_train.txt", root / "list_val.txt"], train),
        read_lists([root / "list_query.txt"], test),
        read_lists([root / "list_gallery.txt"], test),
    )


def read_tree(root: Path, pattern: str) -> Splits:
    """Read any tree of crops; ids are the optional groups `pid` and `camid` of a regular expression.

    The expression is searched in each image's path relative to its folder. `train` or `bounding_box_train` is the
    training set; `query` together with `gallery` or `bounding_box_test` is for evaluation. Without a training folder
    every image of the tree is a training image.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.name_pattern: not a regular expression: {error}") from None
    root = find_root(root, has_training_folder, wanted="")
    train = root if not has_training_folder(root) else require_folder(root, ("train", "bounding_box_train"))
    query, gallery = root / "query", find_folder(root, ("gallery", "bounding_box_test"))
    if train == root and query.is_dir() and gallery:
        raise UserError(f"{root}: wanted a folder train or bounding_box_train beside query and {gallery.name}")
    if train == root or not query.is_dir() or not gallery:
        return Splits(read_folder(train, compiled), [], [])
    return Splits(*(read_folder(folder, compiled) for folder in (train, query, gallery)))


def find_root(root: Path, is_layout: Callable[[Path], bool], *, wanted: str) -> Path:
    """Return the root, or its one subfolder with the layout where the root has another.

    Args:
        wanted: the layout in words, for the error where neither has it; empty: return the root then.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder (data.root)")
    if is_layout(root):
        return root
    inner = sorted(folder for folder in root.iterdir() if folder.is_dir() and is_layout(folder))
    if len(inner) > 1:
        names = ", ".join(folder.name for folder in inner)
        raise UserError(f"{root}: {len(inner)} data sets inside ({names}); point data.root at one of them")
    if not inner and wanted:
        raise UserError(f"{root}: wanted {wanted}, here or one folder below, but found {describe(root)}")
    return inner[0] if inner else root


def describe(folder: Path) -> str:
    """Return the names of a few entries of a folder, for an error message."""
    names = sorted(entry.name for entry in folder.iterdir())
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "nothing"


def has_training_folder(folder: Path) -> bool:
    """Return whether a folder of crops has a training folder."""
    return find_folder(folder, ("train", "bounding_box_train")) is not None


def is_market(folder: Path) -> bool:
    """Return whether a folder has Market-1501's layout."""
    return (folder / "bounding_box_train").is_dir()


def is_official_msmt17(folder: Path) -> bool:
    """Return whether a folder has MSMT17's official layout."""
    return (folder / "list_train.txt").is_file()


def find_folder(root: Path, names: Sequence[str]) -> Path | None:
    """Return the first folder of these names that exists, or None."""
    return next((root / name for name in names if (root / name).is_dir()), None)


def require_folder(root: Path, names: Sequence[str]) -> Path:
    """Return the first folder of these names that exists; raise UserError when there is none."""
    folder = find_folder(root, names)
    if folder is None:
        raise UserError(f"{root}: wanted a folder {' or '.join(names)}, but found {describe(root)}")
    return folder


def list_images(folder: Path) -> list[str]:
    """Return the images below a folder as sorted relative paths, without hidden files and CamStyle's images."""
    names: list[str] = []
    for place, subfolders, files in os.walk(folder):
        subfolders[:] = [name for name in subfolders if not name.startswith(".") and name != STYLE_FOLDER]
        prefix = Path(place).relative_to(folder).as_posix()
        images = (name for name in files if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith("."))
        names += images if prefix == "." else (f"{prefix}/{name}" for name in images)
    return sorted(names)


def read_folder(folder: Path, pattern: re.Pattern[str]) -> list[Crop]:
    """Return the images below a folder with the ids in their names."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    names = list_images(folder)
    if not names:
        raise UserError(f"{folder}: no images; looked for {', '.join('*' + suffix for suffix in IMAGE_SUFFIXES)}")
    groups = [name for name in ("pid", "camid") if name in pattern.groupindex]
    found = {name: pattern.search(name) for name in names}
    bad = [name for name, match in found.items() if match is None or any(match[group] is None for group in groups)]
    if bad:
        raise UserError(
            f"{folder / bad[0]}: the name does not parse ({len(bad)} of {len(names)} do not); "
            f"wanted {pattern.pattern} (for other names: data.dataset=folder and data.name_pattern)"
        )
    ids = [match.groupdict() for match in found.values() if match is not None]
    return [Crop(folder / name, id.get("pid"), id.get("camid")) for name, id in zip(names, ids, strict=True)]


def read_lists(lists: Sequence[Path], folder: Path) -> list[Crop]:
    """Read MSMT17's lists of `path pid`; the camera is the third field of the name."""
    lines = [line for file in lists for line in read_lines(file)]
    label = " + ".join(file.name for file in lists)
    if not lines:
        raise UserError(f"{lists[0].parent}: no images in {label}; looked for lines `path pid`")
    found = [MSMT17_LINE.fullmatch(line) for line in lines]
    bad = [line for line, match in zip(lines, found, strict=True) if match is None]
    if bad:
        raise UserError(f"{lists[0]}: {bad[0]!r} does not parse ({len(bad)} of {len(lines)} in {label} do not)")
    there = set(list_images(folder))
    absent = sorted(match["path"] for match in found if match and match["path"] not in there)
    if absent:
        raise UserError(f"{folder / absent[0]}: named in {label}, but missing ({len(absent)} of {len(lines)} are)")
    crops = [Crop(folder / match["path"], match["pid"], match["camid"]) for match in found if match]
    return sorted(crops, key=lambda crop: crop.path.as_posix())


def read_lines(file: Path) -> list[str]:
    """Return the non-blank lines of a list."""
    try:
        lines = [line.strip(" \t") for line in read_text(file).split("\n")]
    except OSError as error:
        raise UserError(f"{file}: cannot read the list: {error.strerror}") from None
    return [line for line in lines if line]
