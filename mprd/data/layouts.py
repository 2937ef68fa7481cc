"""Which folders are train, query and gallery: one table of split names, and the readers of folders and lists."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from mprd.data.scan import IMAGE_SUFFIXES, LeftOut, Scan, group_by_folder, scan
from mprd.errors import UserError
from mprd.text import read_text

Split = Literal["train", "train_all", "query", "gallery", "test", "val", "extra", "style"]

MARKET_NAME = re.compile(r"^(?P<pid>-?\d+)_c(?P<camid>\d+)")
MSMT17_LINE = re.compile(r"(?P<path>(?:.*/)?[^/_]+_[^/_]+_(?P<camid>\d+)_\S*)\s+(?P<pid>-?\d+)")
MSMT17_LISTS = ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
STYLE_FOLDER = "bounding_box_train_camstyle"

SPLIT_WORDS: dict[str, Split] = {
    **dict.fromkeys(("train", "training", "trainset"), "train"),
    "trainval": "train_all",
    **dict.fromkeys(("query", "queries", "probe", "probes"), "query"),
    **dict.fromkeys(("gallery", "galleries"), "gallery"),
    **dict.fromkeys(("test", "testing", "testset", "eval", "evaluation"), "test"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
}
SPLIT_NAMES: dict[str, Split] = {
    STYLE_FOLDER: "style",
    # Market-1501's hand-drawn boxes and its further queries; the images of these persons are elsewhere too
    **dict.fromkeys(("gt_bbox", "gt_query", "multi_query", "multi-query"), "extra"),
    **dict.fromkeys(("train_all", "train_val", "train+val"), "train_all"),
}
FILLERS = frozenset(
    [
        "bounding",
        "box",
        "boxes",
        "bbox",
        "image",
        "images",
        "img",
        "imgs",
        "crops",
        "mask",
        "set",
        "data",
        "dataset",
        "split",
        "folder",
        "v",
    ]
)
"""Words of a folder's name that do not tell a split: `bounding_box_train`, `image_query`, `mask_test_v2`."""
HELD_BACK = ("query", "gallery", "test", "val")
ADVICE = (
    "say which is which: --set data.train=FOLDER --set data.query=FOLDER --set data.gallery=FOLDER (data.train=. is "
    "all of it), or give --data a CSV file,split,identity,camera"
)


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


@dataclass(frozen=True)
class SplitFolders:
    """The folders of the splits, relative to the root; the empty name is the root itself."""

    train: str | None
    query: str | None = None
    gallery: str | None = None

    def names(self, tree: Scan) -> dict[str, list[str]]:
        """Return the images of each split, and under the empty name those that are in none.

        An image of query or gallery is never one of train.
        """
        parts: dict[str, list[str]] = {"train": [], "query": [], "gallery": [], "": []}
        wanted = [(split, getattr(self, split)) for split in ("query", "gallery", "train")]
        prefixes = [(split, f"{folder}/" if folder else "") for split, folder in wanted if folder is not None]
        for name in tree.names:
            is_style = STYLE_FOLDER in name.lower().split("/")[:-1]
            parts["" if is_style else next((s for s, prefix in prefixes if name.startswith(prefix)), "")].append(name)
        return parts


def split_of(folder: str) -> Split | None:
    """Return the split that a folder's name tells, whatever its case and fillers."""
    if folder.lower() in SPLIT_NAMES:
        return SPLIT_NAMES[folder.lower()]
    words = split_words(folder)
    found = {SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS}
    if len(found) == 2 and "test" in found and len(words) == 2:
        # test_query, test_gallery
        found -= {"test"}
    if "val" in found and len(words) == 2:
        # val_query
        found = {"val"}
    return found.pop() if len(found) == 1 and all(word in SPLIT_WORDS for word in words) else None


def split_words(folder: str) -> list[str]:
    """Return the words of a folder's name, lower case, without fillers."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", folder).lower()
    return [word for word in re.findall(r"[a-z]+", spaced) if word not in FILLERS]


def children(tree: Scan, folder: str) -> list[str]:
    """Return the names of the folders directly in a folder."""
    prefix = f"{folder}/" if folder else ""
    inner = (name.removeprefix(prefix) for name in tree.folders if name.startswith(prefix))
    return [name for name in inner if "/" not in name]


def by_split(tree: Scan, folder: str) -> dict[Split, list[str]]:
    """Return the folders directly in a folder whose names tell a split."""
    found: dict[Split, list[str]] = {}
    for name in children(tree, folder):
        split = split_of(name)
        if split is not None:
            found.setdefault(split, []).append(f"{folder}/{name}" if folder else name)
    return found


def choose_folders(tree: Scan) -> SplitFolders:
    """Return the folders of the splits; a tree without any is for training as a whole.

    Raises UserError with what was seen where a tree looks split, but not in a known way.
    """
    top = by_split(tree, "")
    if not top.keys() - {"extra", "style"}:
        check_is_whole(tree, "")
        return SplitFolders("")
    if any(len(folders) > 1 for split, folders in top.items() if split != "extra"):
        raise looks_split(tree, "")
    first = {split: folders[0] for split, folders in top.items()}
    train = first.get("train_all", first.get("train"))
    query, gallery = first.get("query"), first.get("gallery", first.get("test"))
    if "test" in first and query is None and "gallery" not in first:
        inner = {split: folders[0] for split, folders in by_split(tree, first["test"]).items()}
        query, gallery = inner.get("query"), inner.get("gallery")
    if train is not None:
        check_is_whole(tree, train)
    if query is not None and gallery is not None:
        return SplitFolders(train, query, gallery)
    if train is None:
        raise looks_split(tree, "")
    return SplitFolders(train)


def check_is_whole(tree: Scan, folder: str) -> None:
    """Raise UserError where a folder of training images looks split inside."""
    prefix = f"{folder}/" if folder else ""
    inside = [name.removeprefix(prefix) for name in tree.folders if name.startswith(prefix)]
    splits = ("train", "train_all", *HELD_BACK)
    if any(split_of(name.rpartition("/")[2]) in splits for name in inside):
        raise looks_split(tree, folder)
    # a_train and a_test, where a alone would be a name
    words = {SPLIT_WORDS.get(word) for name in inside if "/" not in name for word in split_words(name)} - {None}
    if len(words) > 1:
        raise looks_split(tree, folder)


def looks_split(tree: Scan, folder: str) -> UserError:
    """Return the error for a tree that looks split in an unknown way, with what was seen."""
    prefix = f"{folder}/" if folder else ""
    named = [name for name in tree.folders if name.startswith(prefix) and tells_split(name.rpartition("/")[2])]
    seen = [f"{name} ({count_below(tree.names, name):,})" for name in named[:6]]
    more = f" and {len(named) - 6} more" if len(named) > 6 else ""
    return UserError(
        f"{tree.root / folder}: looks split into training and test images, but not in a known way; folders (and their "
        f"images): {', '.join(seen)}{more}; {ADVICE}"
    )


def tells_split(name: str) -> bool:
    """Return whether a folder's name has a word of a split."""
    return split_of(name) is not None or any(word in SPLIT_WORDS for word in split_words(name))


def count_below(names: Iterable[str], folder: str) -> int:
    """Count the images below a folder."""
    return sum(name.startswith(f"{folder}/") for name in names)


def is_official_msmt17(folder: Path) -> bool:
    """Return whether a folder has MSMT17's official layout."""
    return os.path.isfile(folder / MSMT17_LISTS[0])


def read_folders(tree: Scan, folders: SplitFolders, pattern: re.Pattern[str]) -> tuple[Splits, tuple[LeftOut, ...]]:
    """Return the images of the splits with the ids in their names, and what is left out.

    Names are relative to the folder of the split. Raises UserError for a name that does not parse, and a folder without
    images.
    """
    parts = folders.names(tree)
    found = []
    for split in ("train", "query", "gallery"):
        folder = getattr(folders, split)
        found.append([] if folder is None else read_names(tree.root / folder, parts[split], tree.root, pattern))
    return Splits(*found), (*describe_rest(parts[""]), *tree.left_out)


def read_names(folder: Path, names: Sequence[str], root: Path, pattern: re.Pattern[str]) -> list[Crop]:
    """Return the images of a folder, given relative to the root, with the ids in their names.

    Raises UserError where there is no such folder or no image, and for names that do not parse.
    """
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder")
    if not names:
        raise UserError(f"{folder}: no images; looked for {', '.join('*' + suffix for suffix in IMAGE_SUFFIXES)}")
    matches = find_ids(folder, names, root, pattern)
    bad = [root / name for name, match in zip(names, matches, strict=True) if match is None]
    if bad:
        raise UserError(
            f"{bad[0]}: the name does not parse ({len(bad)} of {len(names)} do not); "
            f"wanted {pattern.pattern} (for other names: data.dataset=folder and data.name_pattern)"
        )
    ids = [match.groupdict() for match in matches if match is not None]
    return [Crop(root / name, id.get("pid"), id.get("camid")) for name, id in zip(names, ids, strict=True)]


def find_ids(folder: Path, names: Sequence[str], root: Path, pattern: re.Pattern[str]) -> list[re.Match[str] | None]:
    """Search the pattern in each name, relative to the folder of its split; None also where a group is empty."""
    start = len(f"{folder.relative_to(root).as_posix()}/") if folder != root else 0
    groups = [name for name in ("pid", "camid") if name in pattern.groupindex]
    found = [pattern.search(name[start:]) for name in names]
    return [None if match is None or any(match[group] is None for group in groups) else match for match in found]


def describe_rest(names: Sequence[str]) -> list[LeftOut]:
    """Count the images that are in no split, by folder."""
    groups = group_by_folder(names)
    if len(groups) > 5:
        return [LeftOut("images in other folders", len(names), names[0])]
    return [
        LeftOut(
            f"images in {folder}" if folder else "images beside the folders",
            len(group),
            group[0],
            is_expected=split_of(folder) in ("extra", "style"),
        )
        for folder, group in groups.items()
    ]


def read_msmt17(root: Path, *, needs_train: bool = True) -> tuple[Splits, tuple[LeftOut, ...]]:
    """Read MSMT17's official folders and lists: V1 or V2; train = list_train + list_val.

    Args:
        needs_train: whether the folder of the training images must be there.
    """
    tree = scan(root)
    test = require_folder(tree, ("test", "mask_test_v2"))
    has_train = needs_train or {"train", "mask_train_v2"} & {name.lower() for name in children(tree, "")}
    splits = Splits(
        read_lists(tree, MSMT17_LISTS[:2], require_folder(tree, ("train", "mask_train_v2"))) if has_train else [],
        read_lists(tree, MSMT17_LISTS[2:3], test),
        read_lists(tree, MSMT17_LISTS[3:], test),
    )
    listed = {crop.path for crops in splits for crop in crops}
    rest = [name for name in tree.names if root / name not in listed]
    return splits, (*describe_rest(rest), *tree.left_out)


def require_folder(tree: Scan, names: Sequence[str]) -> str:
    """Return the first folder of these names, whatever their case; raise UserError when there is none."""
    there = {name.lower(): name for name in children(tree, "")}
    found = next((there[name] for name in names if name in there), None)
    if found is None:
        raise UserError(f"{tree.root}: wanted a folder {' or '.join(names)}, but found {describe(tree.root)}")
    return found


def describe(folder: Path) -> str:
    """Return the names of a few entries of a folder, for an error message."""
    names = sorted(os.listdir(folder))
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "") or "nothing"


def read_lists(tree: Scan, lists: Sequence[str], folder: str) -> list[Crop]:
    """Read MSMT17's lists of `path pid`; the camera is the third field of the name."""
    lines = [line for name in lists for line in read_lines(tree.root / name)]
    label = " + ".join(lists)
    if not lines:
        raise UserError(f"{tree.root}: no images in {label}; looked for lines `path pid`")
    found = [MSMT17_LINE.fullmatch(line) for line in lines]
    bad = [line for line, match in zip(lines, found, strict=True) if match is None]
    if bad:
        raise UserError(
            f"{tree.root / lists[0]}: {bad[0]!r} does not parse ({len(bad)} of {len(lines)} in {label} do not)"
        )
    there = set(tree.names)
    absent = sorted(match["path"] for match in found if match and f"{folder}/{match['path']}" not in there)
    if absent:
        place = tree.root / folder / absent[0]
        raise UserError(f"{place}: named in {label}, but missing ({len(absent)} of {len(lines)} are)")
    crops = [Crop(tree.root / folder / match["path"], match["pid"], match["camid"]) for match in found if match]
    return sorted(crops, key=lambda crop: crop.path.as_posix())


def read_lines(file: Path) -> list[str]:
    """Return the non-blank lines of a list."""
    try:
        lines = [line.strip(" \t") for line in read_text(file).split("\n")]
    except OSError as error:
        raise UserError(f"{file}: cannot read the list: {error.strerror}") from None
    return [line for line in lines if line]
