"""Recognition of a data set's layout from folder and file names; no pixels are read."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mprd.config.schema import DataConfig
from mprd.data.layouts import (
    MARKET_NAME,
    MSMT17_LISTS,
    SplitFolders,
    children,
    choose_folders,
    is_official_msmt17,
    split_of,
)
from mprd.data.naming import (
    MARKET,
    MSMT17_NAME,
    NAMINGS,
    check_versions,
    choose_naming,
    describe_pattern,
    published_name,
)
from mprd.data.scan import LeftOut, Scan, check_folder, scan
from mprd.errors import UserError
from mprd.storage.copies import fetch_data

logger = logging.getLogger("mprd")

MARKET_FOLDERS = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}


WHOLE = SplitFolders("")


@dataclass(frozen=True)
class Layout:
    """The recognized layout of a folder."""

    name: str
    dataset: str
    """`data.dataset` that reads it."""
    root: Path
    """The value for `--data`."""
    folders: SplitFolders = WHOLE
    place: str = ""
    """The root in words, relative to the folder given, where they differ."""
    pattern: str | None = None
    """`data.name_pattern` of a tree of crops; None for a published layout."""
    problem: str = ""
    """Why it cannot be read; empty where it can."""
    remark: str = ""
    outside: LeftOut | None = None
    """The images below the folder given that are not below the root."""
    settings: tuple[str, ...] = ()
    """The user's, as for `--set`."""

    @property
    def is_msmt17(self) -> bool:
        """Whether lists define the splits."""
        return self.name.startswith("MSMT17 V")

    def __str__(self) -> str:
        place = f" ({self.place})" if self.place else ""
        return f"{self.name} in {self.root}{place}"


def recognize(root: Path, folders: SplitFolders | None = None, *, pattern: str | None = None) -> Layout:
    """Find the data set in a folder, up to two levels below it, or one level above it.

    Args:
        folders: the splits that the user names, in place of the recognized ones.
        pattern: the user's, in place of the recognized one.

    Raises UserError where there is no such folder, no image, more than one data set, or an unknown way of splitting.
    """
    fetch_data(root)
    if root.is_file():
        return Layout("list", "list", root)
    tree = scan(root)
    if folders is not None:
        return tree_layout(tree, named_folders(tree, folders), pattern)
    place = find_place(tree)
    layout = layout_of(tree if place == root else scan(place), pattern)
    if place == root:
        return layout
    prefix = f"{place.relative_to(root).as_posix()}/" if place.is_relative_to(root) else ""
    rest = [name for name in tree.names if not name.startswith(prefix)]
    num_inside = len(tree.names) - len(rest)
    if len(rest) > num_inside:
        raise UserError(
            f"{root}: {prefix[:-1]} is split into training and test images ({num_inside:,} images), but {len(rest):,} "
            f"images lie outside of it (first {rest[0]}); give --data {place}, or --set data.train=. for all of it"
        )
    outside = LeftOut(f"images outside of {prefix[:-1]}", len(rest), rest[0]) if rest else None
    return replace(layout, place=describe_place(root, place), outside=outside)


def names_folders(data: DataConfig) -> bool:
    """Return whether the settings name folders of the splits."""
    return any(folder is not None for folder in (data.train, data.query, data.gallery))


def find_layout(data: DataConfig) -> Layout:
    """Recognize the layout of `data.root`, by the folders and the pattern of the settings where they have them."""
    assert data.root is not None
    is_fixed = data.dataset == "folder" or data.name_pattern != MARKET
    folders = SplitFolders(data.train, data.query, data.gallery) if names_folders(data) else None
    return recognize(data.root, folders, pattern=data.name_pattern if is_fixed else None)


def locate(data: DataConfig) -> DataConfig:
    """Return settings that name the layout, and the folders that have it, in place of `data.dataset: auto`.

    Raises UserError where a layout is incomplete.
    """
    is_settled = data.dataset == "folder" and names_folders(data)
    if data.root is None or data.dataset not in ("auto", "folder") or is_settled:
        return data
    layout = find_layout(data)
    if layout.problem:
        raise UserError(layout.problem)
    logger.info("%s%s", layout, f"; {layout.remark}" if layout.remark else "")
    if layout.outside:
        logger.warning("%s: left out: %s", data.root, layout.outside)
    found: dict[str, object] = {"dataset": layout.dataset, "root": layout.root}
    if layout.pattern is not None:
        # the folder itself is `.` on the command line
        chosen = {split: name or "." for split, name in vars(layout.folders).items() if name is not None}
        found |= {"name_pattern": layout.pattern, **chosen}
    return data.model_copy(update=found)


def elsewhere(data: DataConfig, root: Path, *, name_pattern: str | None = None) -> DataConfig:
    """Return the settings for another data set, whose layout is recognized; the user's pattern and folders stay.

    Args:
        name_pattern: of this data set, in place of the user's.
    """
    if name_pattern is None:
        name_pattern = MARKET if data.name_pattern in {naming.pattern for naming in NAMINGS} else data.name_pattern
    has_test = all(name and os.path.isdir(root / name) for name in (data.query, data.gallery))
    folders = {"train": None, "query": data.query if has_test else None, "gallery": data.gallery if has_test else None}
    return data.model_copy(update={"dataset": "auto", "root": root, "name_pattern": name_pattern, **folders})


def named_folders(tree: Scan, folders: SplitFolders) -> SplitFolders:
    """Return the user's folders relative to the root; raise UserError for one that is not below it."""
    found: dict[str, str | None] = {}
    for split, name in vars(folders).items():
        if name is None:
            found[split] = None
            continue
        check_folder(tree.root / name, setting=f"data.{split}")
        inner = os.path.relpath(tree.root / name, tree.root)
        if inner.startswith(".."):
            raise UserError(f"data.{split}: wanted a folder below {tree.root}, but got {name}")
        found[split] = "" if inner == "." else inner
    if (found["query"] is None) != (found["gallery"] is None):
        raise UserError("data.query and data.gallery are given together, or neither")
    return SplitFolders(**found)


def layout_of(tree: Scan, pattern: str | None) -> Layout:
    """Return the layout of a folder that holds one data set."""
    if pattern is None and (is_official_msmt17(tree.root) or is_listless_msmt17(tree)):
        return msmt17_layout(tree)
    folders = choose_folders(tree)
    names = split_names(tree, folders)
    if pattern is None and is_market(folders) and sum(bool(MARKET_NAME.match(n)) for n in names) > len(names) / 2:
        name, dataset = published_name(names, str(tree.root))
        return Layout(name, dataset, tree.root, folders)
    return tree_layout(tree, folders, pattern)


def is_market(folders: SplitFolders) -> bool:
    """Return whether the folders are those of Market-1501; the training images may be missing."""
    if folders.query is None or folders.gallery is None:
        return False
    return all(name is None or name.lower() == MARKET_FOLDERS[split] for split, name in vars(folders).items())


def split_names(tree: Scan, folders: SplitFolders) -> list[str]:
    """Return the images of all splits, each relative to the folder of its split."""
    parts = folders.names(tree)
    starts = {split: len(f"{folder}/") if folder else 0 for split, folder in vars(folders).items()}
    return [name[starts[split] :] for split in starts for name in parts[split]]


def tree_layout(tree: Scan, folders: SplitFolders, pattern: str | None) -> Layout:
    """Return a tree of crops, with the first convention of names that matches all of them."""
    names = split_names(tree, folders)
    if not names:
        left = f" (left out: {'; '.join(map(str, tree.left_out))})" if tree.left_out else ""
        raise UserError(f"{tree.root}: no images, and no data set one or two folders below{left}")
    if folders == WHOLE:
        check_versions(tree)
    naming = choose_naming(names)
    kind = naming.dataset if naming.dataset and pattern is None else "folder of crops"
    shown = {split: name or "." for split, name in vars(folders).items() if name is not None}
    places = "" if shown == {"train": "."} else ", ".join(f"{split}: {name}" for split, name in shown.items()) + "; "
    pattern = naming.pattern if pattern is None else pattern
    if folders.train and folders.query is None:
        places = f"no images in query and gallery, so nothing is evaluated; {places}"
    return Layout(kind, "folder", tree.root, folders, pattern=pattern, remark=places + describe_pattern(pattern))


def msmt17_layout(tree: Scan) -> Layout:
    """Return MSMT17's official layout; missing lists are a problem."""
    version = "V2" if any(name.lower() == "mask_train_v2" for name in children(tree, "")) else "V1"
    missing = [name for name in MSMT17_LISTS if not os.path.isfile(tree.root / name)]
    problem = ""
    if missing:
        problem = (
            f"{tree.root}: {', '.join(missing)} missing; MSMT17 comes with these lists, put them beside its folders"
        )
    return Layout(f"MSMT17 {version}, official lists", "msmt17", tree.root, problem=problem)


def is_listless_msmt17(tree: Scan) -> bool:
    """Return whether a folder has MSMT17's images without its training list."""
    tops = {name.lower(): name for name in children(tree, "")}
    train = tops.get("train", tops.get("mask_train_v2"))
    if train is None or not {"test", "mask_test_v2"} & tops.keys():
        return False
    names = [name for name in tree.names if name.startswith(f"{train}/")]
    return bool(names) and all(MSMT17_NAME.match(name) for name in names)


def find_place(tree: Scan) -> Path:
    """Return the folder with a split: the root, one up to two levels below, or the parent that the root is part of."""
    if holds_split(tree.root, children(tree, "")):
        return tree.root
    for depth in (0, 1):
        folders = [name for name in tree.folders if name.count("/") == depth]
        found = [name for name in folders if holds_split(tree.root / name, children(tree, name))]
        if len(found) > 1:
            raise UserError(f"{tree.root}: {len(found)} data sets inside ({', '.join(found[:4])}); give one of them")
        if found:
            return tree.root / found[0]
    whole = tree.root.resolve().parent
    return whole if split_of(tree.root.resolve().name) and is_published(whole) else tree.root


def holds_split(folder: Path, names: Sequence[str]) -> bool:
    """Return whether a folder with these folders inside has a training folder, or query and gallery."""
    splits = {split_of(name) for name in names}
    has_test = "query" in splits and bool({"gallery", "test"} & splits)
    return bool({"train", "train_all"} & splits) or has_test or is_official_msmt17(folder)


def is_published(folder: Path) -> bool:
    """Return whether a folder has Market-1501's or MSMT17's layout: a part of it names the whole."""
    try:
        names = {name.lower() for name in os.listdir(folder)}
    except OSError:
        return False
    return is_official_msmt17(folder) or "bounding_box_train" in names


def describe_place(root: Path, place: Path) -> str:
    """Return the place of a data set relative to the folder given, in words."""
    if not place.is_relative_to(root):
        return f"{root} is a part of it"
    depth = len(place.relative_to(root).parts)
    return f"{'one folder' if depth == 1 else 'two folders'} below {root}"


def compiled(pattern: str, *, setting: str = "data.name_pattern") -> re.Pattern[str]:
    """Compile a pattern of names; raise UserError where it is no regular expression, or has another group."""
    try:
        found = re.compile(pattern)
    except re.error as error:
        raise UserError(f"{setting}: not a regular expression: {error}") from None
    others = found.groupindex.keys() - {"pid", "camid"}
    if others:
        raise UserError(f"{setting}: unknown group {min(others)}; the groups are pid and camid")
    return found
