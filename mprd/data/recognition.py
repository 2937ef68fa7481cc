"""Which layout a folder has, and where in it: names only, no pixels."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from mprd.data.layouts import (
    MARKET_NAME,
    has_training_folder,
    is_market,
    is_official_msmt17,
    list_images,
    next_folder,
)
from mprd.errors import UserError

PARTS = ("bounding_box_train", "bounding_box_test", "query", "gallery", "train", "test", "mask_train_v2")
MSMT17_LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
MSMT17_NAME = re.compile(r"^(?:.*/)?\d{4,}_\d{3}_\d{2}_")
DUKE_NAME = re.compile(r"^\d+_c\d+_f\d+")
MARKET_FRAME = re.compile(r"^-?\d+_c\d+s\d+_")
SAMPLE = 200
"""Names looked at to tell one published data set from another."""

# what a tree of crops may tell in its names, the first that fits all of them; `.` tells nothing
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
    """What a folder turned out to be."""

    name: str
    preset: str
    root: Path
    """What `--data` takes."""
    place: str = ""
    """Where it is, where that is not the folder that was asked about."""
    pattern: str | None = None
    """`data.name_pattern` of a tree of crops; None for a published layout."""
    problem: str = ""
    """Why it cannot be read as what it is; empty where it can."""
    remark: str = ""

    @property
    def is_tree(self) -> bool:
        """Whether it is read as a tree of crops."""
        return self.pattern is not None

    @property
    def splits(self) -> dict[str, Path]:
        """The folders of the images, by split, as far as they are there; MSMT17's lists divide `test`."""
        found: dict[str, tuple[str, ...]]
        if self.name.startswith("MSMT17 V"):
            found = {"train": ("train", "mask_train_v2"), "query and gallery": ("test", "mask_test_v2")}
        else:
            found = {
                "train": ("train", "bounding_box_train") if self.is_tree else ("bounding_box_train",),
                "query": ("query",),
                "gallery": ("gallery", "bounding_box_test") if self.is_tree else ("bounding_box_test",),
            }
        folders = {split: next_folder(self.root, names) for split, names in found.items()}
        there = {split: folder for split, folder in folders.items() if folder is not None}
        return there if "train" in there else {"train": self.root}


def recognize(root: Path) -> Layout:
    """Find the data set at a folder, up to two folders below it, or around it.

    Raises UserError where there is no such folder, no image, or more than one data set.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    place = find_place(root, is_published) or find_place(root, has_training_folder) or root
    if is_official_msmt17(place) or is_listless_msmt17(place):
        layout = official_msmt17(place)
    elif is_market(place):
        layout = market(place)
    else:
        layout = tree(place)
    return layout if place == root else Layout(**{**vars(layout), "place": tell_place(root, place)})


def find_place(root: Path, is_layout: Callable[[Path], bool]) -> Path | None:
    """Return the folder that has a layout: the root, one or two below it, or the one that it is part of."""
    if is_layout(root):
        return root
    below = list(subfolders(root))
    for folders in (below, [inner for folder in below for inner in subfolders(folder)]):
        found = [folder for folder in folders if is_layout(folder)]
        if len(found) > 1:
            names = ", ".join(str(folder.relative_to(root)) for folder in found[:4])
            raise UserError(f"{root}: {len(found)} data sets inside ({names}); ask about one of them")
        if found:
            return found[0]
    whole = root.resolve().parent
    return whole if root.resolve().name in PARTS and is_layout(whole) else None


def subfolders(folder: Path) -> Iterator[Path]:
    """Yield the folders in a folder, hidden ones left out, sorted."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    return (folder / name for name in names)


def tell_place(root: Path, place: Path) -> str:
    """Say where a data set is, seen from the folder that was asked about."""
    if not place.is_relative_to(root):
        return f"{root} is a part of it"
    depth = len(place.relative_to(root).parts)
    return f"{'one folder' if depth == 1 else 'two folders'} below {root}"


def is_published(folder: Path) -> bool:
    """Say whether a folder has the layout of a published data set, MSMT17's also where its lists are missing."""
    return is_market(folder) or is_official_msmt17(folder) or is_listless_msmt17(folder)


def is_listless_msmt17(folder: Path) -> bool:
    """Say whether a folder has MSMT17's images without the list that tells its training images."""
    train = next_folder(folder, ("train", "mask_train_v2"))
    if train is None or is_official_msmt17(folder) or next_folder(folder, ("test", "mask_test_v2")) is None:
        return False
    names = first_images(train)
    return bool(names) and all(MSMT17_NAME.match(name) for name in names)


def official_msmt17(place: Path) -> Layout:
    """Describe MSMT17's official layout, and what is missing of it."""
    version = "V2" if (place / "mask_train_v2").is_dir() else "V1"
    missing = [name for name in MSMT17_LISTS if not (place / name).is_file()]
    problem = ""
    if missing:
        problem = f"{place}: {', '.join(missing)} missing; MSMT17 comes with these lists, put them beside its folders"
    return Layout(f"MSMT17 {version}, official lists", "msmt17", place, problem=problem)


def market(place: Path) -> Layout:
    """Describe Market-1501's layout and tell who uses it; without query and gallery it is read as a tree."""
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
    told = f"no images in {' and '.join(missing)}, so nothing is evaluated; read as a folder of crops"
    return Layout(name, preset, place, pattern=TREE_PATTERNS[0], remark=told)


def tree(place: Path) -> Layout:
    """Describe a tree of crops by the first pattern that fits all of its names."""
    layout = Layout("folder of crops", "market1501", place, pattern=TREE_PATTERNS[0])
    names = [name for folder in layout.splits.values() for name in list_images(folder)]
    if not names:
        raise UserError(f"{place}: no images, and no data set one or two folders below")
    fits = {pattern: sum(re.search(pattern, name) is not None for name in names) for pattern in TREE_PATTERNS}
    pattern = next(pattern for pattern, count in fits.items() if count == len(names))
    if pattern == TREE_PATTERNS[-1] and fits[TREE_PATTERNS[0]] > len(names) / 2:
        # most names follow the convention: the others are mistakes, not a convention of their own
        pattern = TREE_PATTERNS[0]
    return Layout(layout.name, layout.preset, place, pattern=pattern, remark=tell_pattern(pattern))


def tell_pattern(pattern: str) -> str:
    """Say what names tell under a pattern."""
    told = {"(?P<pid>": "identities", "(?P<camid>": "cameras"}
    known = [word for group, word in told.items() if group in pattern]
    if not known:
        return "names tell neither identities nor cameras: trained without labels, not evaluated"
    return f"{' and '.join(known)} by data.name_pattern={pattern}"


def first_images(folder: Path) -> list[str]:
    """Name some images below a folder; none where there is no such folder."""
    return list(islice(list_images(folder), SAMPLE)) if folder.is_dir() else []
