"""Findings about the files of a data set: names, unreadable and duplicate images, sizes, and implausible ids."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from mprd.data.camera_style import style_folder
from mprd.data.datasets import PUBLISHED_COUNTS, ImageSet, ReidDataset
from mprd.data.decode import read_image, reading_pool
from mprd.data.layouts import STYLE_FOLDER
from mprd.data.recognition import Layout
from mprd.errors import UserError

Level = Literal["problem", "warning", "note"]

MIN_WIDTH, MIN_HEIGHT = 16, 32
"""Pixels below which an image is called tiny: half the demo's input size."""
DISTRACTOR_PID = 0
NUM_SHOWN = 5
"""Files listed with a finding."""


@dataclass(frozen=True)
class Finding:
    """One finding; a `problem` would make the training fail."""

    level: Level
    text: str
    files: tuple[str, ...] = ()
    """The first of the files concerned."""


@dataclass(frozen=True)
class File:
    """The content of an image file."""

    path: Path
    digest: bytes
    size: tuple[int, int] | None
    """Width and height in pixels; None where it cannot be read."""


def read_file(path: Path) -> File:
    """Hash a file and decode it."""
    try:
        digest = hashlib.blake2b(path.read_bytes(), digest_size=16).digest()
        return File(path, digest, read_image(path).size)
    except (OSError, UserError):
        return File(path, b"", None)


def read_files(paths: Sequence[Path], *, track: Callable[[Iterable[File]], Iterable[File]] = iter) -> list[File]:
    """Hash and decode files, in parallel; `track` wraps the results, to show the progress."""
    with reading_pool() as pool:
        return list(track(pool.map(read_file, paths)))


def describe_splits(dataset: ReidDataset) -> dict[str, dict[str, int | None]]:
    """Return the numbers of images, identities and cameras of each split; None where file names hold none."""

    def count_unique(ids: np.ndarray | None) -> int | None:
        return None if ids is None else len(np.unique(ids))

    splits = {"train": dataset.train, "query": dataset.query, "gallery": dataset.gallery}
    return {
        name: {
            "images": len(images),
            "identities": count_unique(images.pids),
            "cameras": count_unique(images.camids),
        }
        for name, images in splits.items()
    }


def describe_sizes(files: Sequence[File]) -> dict[str, Any] | None:
    """Return minimum, median and maximum of width and height in pixels; None where no file can be read."""
    sizes = np.array([file.size for file in files if file.size is not None])
    if not len(sizes):
        return None
    names = ("width", "height")
    parts = {"min": sizes.min(0), "median": np.median(sizes, axis=0).astype(int), "max": sizes.max(0)}
    return {part: dict(zip(names, map(int, values), strict=True)) for part, values in parts.items()}


def find_left_out(dataset: ReidDataset, layout: Layout) -> list[Finding]:
    """Report what training and evaluation pass over."""
    parts = (*([layout.outside] if layout.outside else []), *dataset.left_out)
    return [Finding("note" if part.is_expected else "warning", f"left out: {part}") for part in parts]


def find_in_files(dataset: ReidDataset, files: Sequence[File]) -> list[Finding]:
    """Find unreadable, tiny and duplicate images; `files` are those of train, query and gallery, in that order."""
    bad = [file.path for file in files if file.size is None]
    tiny = [file.path for file in files if file.size and (file.size[0] < MIN_WIDTH or file.size[1] < MIN_HEIGHT)]
    findings = []
    if bad:
        findings.append(found("warning", f"{count(bad)} unreadable; the command leaves them out", bad))
    if tiny:
        findings.append(found("warning", f"{count(tiny)} less than {MIN_WIDTH} x {MIN_HEIGHT} pixels", tiny))
    for name, _, part in split_files(dataset, files):
        if part and all(file.size is None for file in part):
            findings.append(Finding("problem", f"no image of {name} can be read"))
    return findings + find_duplicates(dataset, files)


def split_files(dataset: ReidDataset, files: Sequence[File]) -> Iterator[tuple[str, ImageSet, Sequence[File]]]:
    """Yield name, images and files of each split, given the files of all."""
    start = 0
    for name, images in (("train", dataset.train), ("query", dataset.query), ("gallery", dataset.gallery)):
        yield name, images, files[start : start + len(images)]
        start += len(images)


def find_duplicates(dataset: ReidDataset, files: Sequence[File]) -> list[Finding]:
    """Find files of the same content, which are a warning across training and test or under two identities."""
    groups = defaultdict(list)
    for row, file in enumerate(files):
        if file.size is not None:
            groups[file.digest].append(row)
    duplicates = [rows for rows in groups.values() if len(rows) > 1]
    if not duplicates:
        return []
    num_train = len(dataset.train)
    across = [rows for rows in duplicates if rows[0] < num_train <= rows[-1]]
    pids = joined_pids(dataset)
    mixed = [] if pids is None else [rows for rows in duplicates if len({pids[row] for row in rows}) > 1]
    extra = sum(len(rows) - 1 for rows in duplicates)
    parts = [f"{extra} {'copy' if extra == 1 else 'copies'} of another image"]
    parts += [f"{len(across)} of them across training and test"] if across else []
    parts += [f"{len(mixed)} under two identities"] if mixed else []
    first = (across + mixed + duplicates)[0]
    return [found("warning" if across or mixed else "note", ", ".join(parts), [files[row].path for row in first])]


def joined_pids(dataset: ReidDataset) -> list[int] | None:
    """Return the identities of train, query and gallery; None where file names hold none."""
    sets = (dataset.train, dataset.query, dataset.gallery)
    if any(len(images) and images.pids is None for images in sets):
        return None
    return [pid for images in sets if images.pids is not None for pid in images.pids.tolist()]


def find_in_ids(dataset: ReidDataset, layout: Layout) -> list[Finding]:
    """Find identities in training and test, queries without a match, a single camera, and unpublished counts."""
    findings = []
    train, query, gallery = dataset.train, dataset.query, dataset.gallery
    test_pids = [images.pids for images in (query, gallery) if images.pids is not None and len(images)]
    # MSMT17's lists number training and test identities separately from 0
    if train.pids is not None and test_pids and not layout.is_msmt17:
        # elsewhere 0 is a person, such as the first of those that are words
        distractors = [DISTRACTOR_PID] if dataset.name in PUBLISHED_COUNTS else []
        both = np.setdiff1d(np.intersect1d(train.pids, np.concatenate(test_pids)), distractors)
        if len(both):
            rows = np.flatnonzero(np.isin(train.pids, both))[:NUM_SHOWN]
            text = f"{len(both)} of {len(np.unique(train.pids))} training identities are in query or gallery too"
            findings.append(Finding("warning", text, tuple(str(train.paths[row]) for row in rows)))
    findings += find_matchless(query, gallery)
    if dataset.num_cameras == 1:
        findings.append(Finding("note", "one camera only: the method's gain is in matching across cameras"))
    expected = PUBLISHED_COUNTS.get(dataset.name)
    num_ids = 0 if train.pids is None else len(np.unique(train.pids))
    if expected and (len(train), num_ids, len(query), len(gallery)) != expected:
        text = "published {0}: {1} training images of {2} identities, {3} query, {4} gallery; these counts differ"
        findings.append(Finding("note", text.format(dataset.name, *(f"{n:,}" for n in expected))))
    return findings


def find_matchless(query: ImageSet, gallery: ImageSet) -> list[Finding]:
    """Find queries without a gallery image of the same identity under another camera."""
    if not len(query) or not len(gallery) or any(ids is None for ids in (query.pids, query.camids, gallery.camids)):
        return []
    assert query.pids is not None
    assert query.camids is not None
    assert gallery.pids is not None
    assert gallery.camids is not None
    cameras = defaultdict(set)
    for pid, camid in zip(gallery.pids.tolist(), gallery.camids.tolist(), strict=True):
        cameras[pid].add(camid)
    seen = zip(query.paths, query.pids.tolist(), query.camids.tolist(), strict=True)
    bad = [path for path, pid, camid in seen if not cameras[pid] - {camid}]
    if len(bad) == len(query):
        text = (
            "no query has a match in the gallery under another camera, so the evaluation would stop the run; "
            "correct the names, or move query and gallery away to train without them"
        )
        return [found("problem", text, bad)]
    text = f"{len(bad)} of {len(query)} queries have no match under another camera and do not count"
    return [found("note", text, bad)] if bad else []


def find_camera_styles(dataset: ReidDataset) -> Finding:
    """Report whether CamStyle's images of the training images exist."""
    train = dataset.train
    if train.camids is None:
        return Finding("note", "CamStyle: not used, names hold no cameras")
    style = dataset.style_paths
    if style is None:
        folder = style_folder(train.paths, dataset.root)
        if folder is None:
            return Finding("note", f"CamStyle: no folder {STYLE_FOLDER}, so no style is transferred")
        text = f"CamStyle: {folder} has no image of an expected name, so no style is transferred"
        return Finding("warning", text)
    wanted = style.all_names(train.paths, train.camids)
    if style.missing:
        text = f"CamStyle: incomplete, {len(style.missing):,} of {len(wanted):,} images are missing"
        return Finding("warning", text, tuple(str(style.folder / name) for name in sorted(style.missing)[:NUM_SHOWN]))
    return Finding("note", f"CamStyle: complete, {len(wanted):,} images")


def list_style_files(dataset: ReidDataset) -> list[Path]:
    """Return the CamStyle images that training would read."""
    style, train = dataset.style_paths, dataset.train
    if style is None or train.camids is None:
        return []
    return [style.folder / name for name in style.all_names(train.paths, train.camids) if name not in style.missing]


def count(paths: Sequence[Path]) -> str:
    """Return a number of images in words."""
    return f"{len(paths):,} image{'s' if len(paths) != 1 else ''}"


def found(level: Level, text: str, paths: Sequence[Path]) -> Finding:
    """Return a finding with the first of its files."""
    return Finding(level, text, tuple(str(path) for path in paths[:NUM_SHOWN]))
