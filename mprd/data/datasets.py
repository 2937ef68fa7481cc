"""Re-identification data sets: paths, identities and cameras, without pixels."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mprd.config.schema import DataConfig, SyntheticConfig
from mprd.data.cache import Packs
from mprd.data.camera_style import StyleFiles, find_style_files, style_folder
from mprd.data.layouts import (
    MARKET_NAME,
    STYLE_FOLDER,
    Crop,
    SplitFolders,
    Splits,
    choose_folders,
    describe,
    is_official_msmt17,
    read_folders,
    read_msmt17,
)
from mprd.data.listing import read_listing
from mprd.data.recognition import compiled, find_place, locate, named_folders
from mprd.data.scan import LeftOut, log_left_out, scan
from mprd.errors import UserError
from mprd.storage.cache import cache_folder, make_cache
from mprd.storage.copies import fetch_data

logger = logging.getLogger("mprd")

# training images and identities, query and gallery images (Sec. 5.1; junk, pid -1, not counted)
PUBLISHED_COUNTS = {
    "market1501": (12936, 751, 3368, 15913),
    "dukemtmcreid": (16522, 702, 2228, 17661),
    "msmt17": (32621, 1041, 11659, 82161),
}
JUNK_PID = -1


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images, sorted by name."""

    paths: tuple[Path, ...]
    pids: np.ndarray | None
    """Identities, int64 `[n]`; None where file names hold none."""
    camids: np.ndarray | None
    """Cameras from 0, int64 `[n]`; None where file names hold none."""

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, rows: np.ndarray) -> ImageSet:
        """Return the images at the indices `[m]`."""
        pids, camids = (None if ids is None else ids[rows] for ids in (self.pids, self.camids))
        return ImageSet(tuple(self.paths[row] for row in rows.tolist()), pids, camids)


@dataclass(frozen=True, eq=False)
class ReidDataset:
    """A data set for re-identification; without query or gallery there is no evaluation."""

    name: str
    root: Path
    train: ImageSet
    query: ImageSet
    gallery: ImageSet
    num_cameras: int
    """Cameras over all three splits; 0 where file names hold none."""
    style_paths: StyleFiles | None
    """CamStyle's images, where `data.camera_style` is `camstyle` and they exist."""
    packs: Packs | None = None
    """The cache of decoded images; None: files are decoded on each access."""
    camera_numbers: tuple[int, ...] = ()
    """The numbers in file names of cameras 0, 1, ..., of which those of the training images come first."""
    camera_words: tuple[str, ...] = ()
    """The names of these cameras, where they are not numbers; empty where they are."""
    left_out: tuple[LeftOut, ...] = ()
    """The files below the root that are in no split."""

    @property
    def can_evaluate(self) -> bool:
        """Whether there are query and gallery images with identities and cameras."""
        return all(len(s) and s.pids is not None and s.camids is not None for s in (self.query, self.gallery))

    @property
    def camera_names(self) -> tuple[str, ...]:
        """The names of cameras 0, 1, ... in file names."""
        return self.camera_words or tuple(map(str, self.camera_numbers))

    def cameras_of(self, images: ImageSet) -> dict[str, Any]:
        """Return what a checkpoint records of the cameras that it holds statistics of, those of `images`."""
        count = 0 if images.camids is None else int(images.camids.max()) + 1
        return {"camera_numbers": [*self.camera_numbers[:count]], "camera_words": [*self.camera_words[:count]]}

    def __str__(self) -> str:
        """Return the numbers of images, identities and cameras in words."""
        parts = (("train", self.train), ("query", self.query), ("gallery", self.gallery))
        return ", ".join(f"{name} {describe_images(images)}" for name, images in parts)


def describe_images(images: ImageSet) -> str:
    """Return the number of images, and those of identities and cameras where they are known."""
    ids = (("identities", images.pids), ("cameras", images.camids))
    known = [f"{len(np.unique(values)):,} {name}" for name, values in ids if values is not None and len(images)]
    return f"{len(images):,}" + (f" ({', '.join(known)})" if known else "")


def load_dataset(config: DataConfig, *, needs_train: bool = True) -> ReidDataset:
    """Find the images of a data set; the synthetic one is drawn into the cache first.

    Logs the numbers of images, what is left out, and a warning where counts differ from the published ones, or where
    there is one camera only.

    Args:
        needs_train: whether a set of query and gallery alone is refused.

    Raises UserError naming a missing or empty folder, or the first name that does not parse.
    """
    if config.root is not None:
        fetch_data(config.root)
    config = locate(config)
    if (config.root is None) != (config.dataset == "synthetic"):
        wanted = "takes no folder" if config.root else "needs a folder"
        raise UserError(f"data.root: data.dataset={config.dataset} {wanted}, but got {config.root}")
    root = config.root or draw_synthetic(config.synthetic)
    found, left_out = read_splits(config, root, needs_train=needs_train)
    splits = Splits(*map(drop_junk, found))
    if needs_train and not splits.train:
        reason = (
            f"no training images but junk, pid {JUNK_PID}"
            if found.train
            else ("query and gallery alone, nothing to train on; mprd evaluate RUN --data takes it")
        )
        raise UserError(f"{root}: {reason}")
    root = root.parent if config.dataset == "list" else root
    camera_numbers, camera_words = list_cameras(splits)
    train, query, gallery = number_splits(splits, cameras=camera_words or camera_numbers)
    style = None
    if config.camera_style == "camstyle" and train.camids is not None and (folder := style_folder(train.paths, root)):
        named = config.dataset != "msmt17"
        style = find_style_files(folder, train.paths, train.camids, camera_numbers=camera_numbers, names_source=named)
    dataset = ReidDataset(
        config.dataset,
        root,
        train,
        query,
        gallery,
        len(camera_numbers),
        style,
        camera_numbers=camera_numbers,
        camera_words=camera_words,
        left_out=describe_left_out(found, left_out, has_style=style is not None),
    )
    logger.info("%s: %s", root, dataset)
    log_left_out(root, dataset.left_out)
    log_warnings(dataset, needs_train=needs_train)
    return dataset if config.max_images is None else take_some(dataset, config.max_images)


def draw_synthetic(config: SyntheticConfig) -> Path:
    """Draw the synthetic data set unless it exists; return its folder."""
    from mprd.data.synthetic.dataset import FORMAT_VERSION, Drawing, write_dataset

    drawing = Drawing(**config.model_dump())
    key = f"{FORMAT_VERSION} {drawing.to_json()}"
    root = cache_folder() / f"synthetic-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not root.is_dir():
        logger.info("drawing pedestrians into %s", root)
        make_cache(root.parent)
    # an existing folder is verified, not rewritten
    write_dataset(root, drawing)
    return root


def read_splits(config: DataConfig, root: Path, *, needs_train: bool) -> tuple[Splits, tuple[LeftOut, ...]]:
    """Read a data set in the layout of the settings; return what is left out, too.

    Args:
        needs_train: whether the folder of the training images must be there.
    """
    if config.dataset == "list":
        return read_listing(root)
    tree = scan(root)
    if config.dataset == "folder":
        has_train = needs_train or os.path.isdir(root / (config.train or ""))
        named = SplitFolders(config.train if has_train else None, config.query, config.gallery)
        folders = named_folders(tree, named)
        return read_folders(tree, folders, compiled(config.name_pattern))
    place = find_place(tree)
    if config.dataset == "msmt17" and is_official_msmt17(place):
        return read_msmt17(place, needs_train=needs_train)
    folders = choose_folders(tree if place == root else (tree := scan(place)))
    if folders.query is None:
        lists = "list_train.txt (the official layout) or " if config.dataset == "msmt17" else ""
        raise UserError(
            f"{root}: wanted {lists}images in bounding_box_train, query and bounding_box_test"
            f", here or up to two folders below, but found {describe(root)}"
        )
    return read_folders(tree, folders, MARKET_NAME)


def describe_left_out(found: Splits, left_out: tuple[LeftOut, ...], *, has_style: bool) -> tuple[LeftOut, ...]:
    """Return what is in no split: junk, and what the reader passed over but for CamStyle's images in use."""
    crops = [crop for part in found for crop in part]
    junk = [crop.path.name for crop in crops if crop.pid is not None and to_number(crop.pid) == JUNK_PID]
    parts = [LeftOut(f"images of pid {JUNK_PID}", len(junk), junk[0], is_expected=True)] if junk else []
    tested = [crop.path.name for crop in (*found.query, *found.gallery)]
    if tested and all(crop.pid is None for crop in crops):
        parts.append(LeftOut("images of query and gallery without identities", len(tested), tested[0]))
    return (*parts, *(part for part in left_out if not (has_style and STYLE_FOLDER in part.reason.lower())))


def drop_junk(crops: list[Crop]) -> list[Crop]:
    """Remove pid -1, which the Market protocol ignores; pid 0, the distractors, stays."""
    return [crop for crop in crops if crop.pid is None or to_number(crop.pid) != JUNK_PID]


def number_splits(splits: Splits, *, cameras: Sequence[int | str]) -> tuple[ImageSet, ImageSet, ImageSet]:
    """Number pids and camids consistently over the splits; without pids, query and gallery are left empty."""
    crops = [crop for split in splits for crop in split]
    pids = number_pids([crop.pid for crop in crops if crop.pid is not None])
    camids = number_camids([crop.camid for crop in crops if crop.camid is not None], cameras)
    everything = ImageSet(tuple(crop.path for crop in crops), pids, camids)
    ends = np.cumsum([len(split) for split in splits])
    train, query, gallery = (everything.select(rows) for rows in np.split(np.arange(len(crops)), ends[:-1]))
    if pids is None and len(query):
        logger.warning("data.name_pattern has no group pid, so query and gallery are not evaluated")
        query = gallery = everything.select(np.arange(0))
    return train, query, gallery


def number_pids(texts: Sequence[str]) -> np.ndarray | None:
    """Return pids as int64 `[n]`, counted from 0 in sorted order where one is no number; None if there are none."""
    if not texts:
        return None
    numbers = [to_number(text) for text in texts]
    if None in numbers:
        return np.unique(np.array(texts), return_inverse=True)[1].astype(np.int64)
    return np.array(numbers, dtype=np.int64)


def number_camids(texts: Sequence[str], cameras: Sequence[int | str]) -> np.ndarray | None:
    """Return the place of each camera among all, int64 `[n]`; None if there are none."""
    places = {camera: place for place, camera in enumerate(cameras)}
    found = [places[text] if text in places else places[int(text)] for text in texts]
    return np.array(found, dtype=np.int64) if found else None


def to_number(text: str) -> int | None:
    """Return an id as a number, or None where it is not numeric or exceeds int64."""
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) < 19 else None


def list_cameras(splits: Splits) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the numbers of cameras 0, 1, ... in file names, and their names where these are words, counted from 1.

    Those of training images come first: statistics of cameras keep their rows whatever query and gallery hold.
    """
    train, *tested = ({crop.camid for crop in split if crop.camid is not None} for split in splits)
    everywhere = train.union(*tested)
    if any(to_number(text) is None for text in everywhere):
        words = (*sorted(train), *sorted(everywhere - train))
        return tuple(range(1, len(words) + 1)), words
    trained, known = ({int(text) for text in texts} for texts in (train, everywhere))
    return (*sorted(trained), *sorted(known - trained)), ()


def take_some(dataset: ReidDataset, most: int) -> ReidDataset:
    """Keep about so many training images at most, and as many of query and gallery together, evenly spread.

    Whole identities are kept where they are known; of query and gallery those that are in both.
    """
    train, query, gallery = dataset.train, dataset.query, dataset.gallery
    kept = replace(dataset, train=train.select(some_rows(train.pids, len(train), most)))
    if query.pids is None or gallery.pids is None:
        return kept
    pids = np.concatenate([query.pids, gallery.pids])
    pids = pids[np.isin(pids, np.intersect1d(query.pids, gallery.pids))]
    pids = pids[some_rows(pids, len(pids), most)]
    query_rows, gallery_rows = (np.flatnonzero(np.isin(ids, pids)) for ids in (query.pids, gallery.pids))
    return replace(kept, query=query.select(query_rows), gallery=gallery.select(gallery_rows))


def some_rows(pids: np.ndarray | None, num_images: int, most: int) -> np.ndarray:
    """Choose about `most` of the images `[m]`, all of at least two evenly spread identities where these are known."""
    if num_images <= most:
        return np.arange(num_images)
    if pids is None:
        return np.linspace(0, num_images - 1, most).astype(np.int64)
    known = np.unique(pids)
    count = max(2, most * len(known) // num_images)
    return np.flatnonzero(np.isin(pids, known[np.linspace(0, len(known) - 1, count).astype(int)]))


def log_warnings(dataset: ReidDataset, *, needs_train: bool = True) -> None:
    """Log where a data set differs from the published one, and where it cannot be evaluated."""
    train, query, gallery = dataset.train, dataset.query, dataset.gallery
    expected = PUBLISHED_COUNTS.get(dataset.name)
    num_ids = 0 if train.pids is None else len(np.unique(train.pids))
    counts = (len(train), num_ids, len(query), len(gallery))
    if expected and needs_train and counts != expected:
        logger.warning(
            "%s: %d training images of %d identities, %d query, %d gallery; the published %s has %d of %d, %d, %d",
            dataset.root, *counts, dataset.name, *expected,
        )  # fmt: skip
    if not len(query) or not len(gallery):
        logger.warning("%s: %d query and %d gallery images: no evaluation", dataset.root, len(query), len(gallery))
    elif query.camids is None:
        logger.warning("%s: no cameras in the file names, so no evaluation", dataset.root)
    if train.pids is not None and dataset.num_cameras == 1:
        logger.warning("%s: one camera only, so no query has a match under another camera", dataset.root)
