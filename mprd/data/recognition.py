"""Recognition of a data set's layout from folder and file names; no pixels are read."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mprd.config.schema import DataConfig
from mprd.data.layouts import (
    MARKET_NAME,
    find_folder,
    has_training_folder,
    is_market,
    is_official_msmt17,
    list_images,
)
from mprd.errors import UserError

PARTS = ("bounding_box_train", "bounding_box_test", "query", "gallery", "train", "test", "mask_train_v2")
MSMT17_LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
MSMT17_NAME = re.compile(r"^(?:.*/)?\d{4,}_\d{3}_\d{2}_")
DUKE_NAME = re.compile(r"^\d+_c\d+_f\d+")
MARKET_FRAME = re.compile(r"^-?\d+_c\d+s\d+_")
SAMPLE = 200
"""File names inspected to distinguish published data sets."""

# naming conventions of trees of crops; the first that matches all names is used, and `.` holds no ids
TREE_PATTERNS = (
    r"(?P<pid>-?\d+)_c(?P<camid>\d+)",
    r"(?P<pid>\d+)_\d{3}_(?P<camid>\d{2})_",
    r"^(?P<pid>[^/]+)/c(?P<camid>\d+)[^/]*$",
    r"^[cC](?:am|amera)?[-_]?(?P<camid>\d+)/",
    r"^(?P<pid>[^/]+)/[^/]+$",
    r".",
)


@dataclass(frozen=True)
class Layout:
    """The recognized layout of a folder."""

    name: str
    preset: str
    root: Path
    """The value for `--data`."""
    place: str = ""
    """The root in words, relative to the folder given, where they differ."""
    pattern: str | None = None
    """`data.name_pattern` of a tree of crops; None for a published layout."""
    problem: str = ""
    """Why it cannot be read; empty where it can."""
    remark: str = ""

    @property
    def is_tree(self) -> bool:
        """Whether it is read as a tree of crops."""
        return self.pattern is not None

    @property
    def dataset(self) -> str:
        """`data.dataset` that reads it."""
        return "folder" if self.is_tree else self.preset

    @property
    def splits(self) -> dict[str, Path]:
        """The existing image folders by split; MSMT17's `test` holds query and gallery."""
        found: dict[str, tuple[str, ...]]
        if self.name.startswith("MSMT17 V"):
            found = {"train": ("train", "mask_train_v2"), "query and gallery": ("test", "mask_test_v2")}
        else:
            found = {
                "train": ("train", "bounding_box_train") if self.is_tree else ("bounding_box_train",),
                "query": ("query",),
                "gallery": ("gallery", "bounding_box_test") if self.is_tree else ("bounding_box_test",),
            }
        folders = {split: find_folder(self.root, names) for split, names in found.items()}
        there = {split: folder for split, folder in folders.items() if folder is not None}
        return there if "train" in there else {"train": self.root}


def recognize(root: Path) -> Layout:
    """Find the data set in a folder, up to two levels below it, or one level above it.

    Raises UserError where there is no such folder, no image, or more than one data set.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    place = find_place(root, is_published) or find_place(root, has_training_folder) or root
    if is_official_msmt17(place) or is_listless_msmt17(place):
        layout = msmt17_layout(place)
    elif is_market(place):
        layout = market_layout(place)
    else:
        layout = tree_layout(place)
    return layout if place == root else Layout(**{**vars(layout), "place": describe_place(root, place)})


def locate(data: DataConfig) -> DataConfig:
    """Return settings that name the layout, and the folder that has it, in place of `data.dataset: auto`.

    A `data.name_pattern` of the user's makes the folder a tree of crops. Raises UserError where a layout is incomplete.
    """
    if data.dataset != "auto" or data.root is None:
        return data
    if data.name_pattern != TREE_PATTERNS[0]:
        return data.model_copy(update={"dataset": "folder"})
    layout = recognize(data.root)
    if layout.problem:
        raise UserError(layout.problem)
    found = {"dataset": layout.dataset, "root": layout.root, "name_pattern": layout.pattern or data.name_pattern}
    return data.model_copy(update=found)


def find_place(root: Path, is_layout: Callable[[Path], bool]) -> Path | None:
    """Return the folder with a layout: the root, one up to two levels below, or the parent that the root is part of."""
    if is_layout(root):
        return root
    below = list(subfolders(root))
    for folders in (below, [inner for folder in below for inner in subfolders(folder)]):
        found = [folder for folder in folders if is_layout(folder)]
        if len(found) > 1:
            names = ", ".join(str(folder.relative_to(root)) for folder in found[:4])
            raise UserError(f"{root}: {len(found)} data sets inside ({names}); give one of them")
        if found:
            return found[0]
    whole = root.resolve().parent
    return whole if root.resolve().name in PARTS and is_layout(whole) else None


def subfolders(folder: Path) -> Iterator[Path]:
    """Return the subfolders, sorted, without hidden ones."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return (folder / name for name in names)


def describe_place(root: Path, place: Path) -> str:
    """Return the place of a data set relative to the folder given, in words."""
    if not place.is_relative_to(root):
        return f"{root} is a part of it"
    depth = len(place.relative_to(root).parts)
    return f"{'one folder' if depth == 1 else 'two folders'} below {root}"


def is_published(folder: Path) -> bool:
    """Return whether a folder has a published layout; MSMT17's lists may be missing."""
    return is_market(folder) or is_official_msmt17(folder) or is_listless_msmt17(folder)


def is_listless_msmt17(folder: Path) -> bool:
    """Return whether a folder has MSMT17's images without its training list."""
    train = find_folder(folder, ("train", "mask_train_v2"))
    if train is None or is_official_msmt17(folder) or find_folder(folder, ("test", "mask_test_v2")) is None:
        return False
    names = first_images(train)
    return bool(names) and all(MSMT17_NAME.match(name) for name in names)


def msmt17_layout(place: Path) -> Layout:
    """Return MSMT17's official layout; missing lists are a problem."""
    version = "V2" if (place / "mask_train_v2").is_dir() else "V1"
    missing = [name for name in MSMT17_LISTS if not (place / name).is_file()]
    problem = ""
    if missing:
        problem = f"{place}: {', '.join(missing)} missing; MSMT17 comes with these lists, put them beside its folders"
    return Layout(f"MSMT17 {version}, official lists", "msmt17", place, problem=problem)


def market_layout(place: Path) -> Layout:
    """Return Market-1501's layout with the data set that uses it; without query or gallery it is read as a tree."""
    names = first_images(place / "bounding_box_train")
    cameras = [int(match["camid"]) for name in names if (match := MARKET_NAME.search(name))]
    if names and all(DUKE_NAME.match(name) for name in names):
        name, preset = "DukeMTMC-reID", "dukemtmcreid"
    elif "msmt17" in str(place).lower() or max(cameras, default=0) > 8:
        name, preset = "MSMT17, Market layout", "msmt17"
    else:
        name, preset = "Market-1501" if all(MARKET_FRAME.match(n) for n in names) else "Market layout", "market1501"
    missing = [folder for folder in ("query", "bounding_box_test") if not first_images(place / folder)]
    if not missing:
        return Layout(name, preset, place)
    remark = f"no images in {' and '.join(missing)}, so nothing is evaluated; read as a folder of crops"
    return Layout(name, preset, place, pattern=TREE_PATTERNS[0], remark=remark)


def tree_layout(place: Path) -> Layout:
    """Return a tree of crops with the first pattern that matches all names."""
    layout = Layout("folder of crops", "market1501", place, pattern=TREE_PATTERNS[0])
    names = [name for folder in layout.splits.values() for name in list_images(folder)]
    if not names:
        raise UserError(f"{place}: no images, and no data set one or two folders below")
    fits = {pattern: sum(re.search(pattern, name) is not None for name in names) for pattern in TREE_PATTERNS}
    pattern = next(pattern for pattern, count in fits.items() if count == len(names))
    if pattern == TREE_PATTERNS[-1] and fits[TREE_PATTERNS[0]] > len(names) / 2:
        # most names follow the convention, so the others are probably mistakes
        pattern = TREE_PATTERNS[0]
    return Layout(layout.name, layout.preset, place, pattern=pattern, remark=describe_pattern(pattern))


def describe_pattern(pattern: str) -> str:
    """Return the ids that names hold under a pattern, in words."""
    words = {"(?P<pid>": "identities", "(?P<camid>": "cameras"}
    known = [word for group, word in words.items() if group in pattern]
    if not known:
        return "names hold neither identities nor cameras: trained without labels, not evaluated"
    return f"{' and '.join(known)} by data.name_pattern={pattern}"


def first_images(folder: Path) -> list[str]:
    """Return the names of up to SAMPLE images below a folder; none where it does not exist."""
    return list(islice(list_images(folder), SAMPLE)) if folder.is_dir() else []
