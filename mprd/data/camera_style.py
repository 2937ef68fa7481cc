"""Camera style transfer (Sec. 5.2): CamStyle's generated images."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from mprd.data.decode import find_unreadable
from mprd.data.layouts import STYLE_FOLDER

logger = logging.getLogger("mprd")


@dataclass(frozen=True)
class StyleFiles:
    """The folder of CamStyle's images, and the names missing from it."""

    folder: Path
    camera_numbers: tuple[int, ...]
    """The numbers in file names of cameras 0, 1, ..."""
    names_source: bool
    """Whether names are `<stem>_fake_<from>to<to>.jpg`; otherwise `<stem>_fake_<to>.jpg`, as for MSMT17."""
    missing: frozenset[str] = frozenset()
    """Expected names that do not exist."""

    def name(self, path: Path, camid: int, target: int) -> str:
        """Return the name of the file with an image of camera `camid` in the style of camera `target`."""
        source = f"{self.camera_numbers[camid]}to" if self.names_source else ""
        return f"{path.stem}_fake_{source}{self.camera_numbers[target]}.jpg"

    def find(self, path: Path, camid: int, target: int) -> Path:
        """Return the path of that file, or the original for the image's own camera and where the file is missing."""
        if target == camid:
            return path
        name = self.name(path, camid, target)
        return path if name in self.missing else self.folder / name

    def all_names(self, paths: Sequence[Path], camids: np.ndarray) -> list[str]:
        """Return the names expected for images `[n]` of cameras `[n]`."""
        cameras = np.unique(camids).tolist()
        pairs = zip(paths, camids.tolist(), strict=True)
        return [self.name(path, camid, target) for path, camid in pairs for target in cameras if target != camid]


def style_folder(paths: Sequence[Path], root: Path) -> Path | None:
    """Return the folder of CamStyle's images, beside the training images or above them, up to the root."""
    places = [place / STYLE_FOLDER for path in paths[:1] for place in path.parents if place.is_relative_to(root)]
    return next((place for place in places if place.is_dir()), None)


def find_style_files(
    folder: Path, paths: Sequence[Path], camids: np.ndarray, *, camera_numbers: tuple[int, ...], names_source: bool
) -> StyleFiles | None:
    """Find the CamStyle images of the training images; log how many are missing, return None when all are."""
    files = StyleFiles(folder, camera_numbers, names_source)
    wanted = files.all_names(paths, camids)
    try:
        there = set(os.listdir(folder))
    except OSError as error:
        logger.warning("%s: cannot open the folder of CamStyle's images: %s", folder, error.strerror)
        return None
    missing = frozenset(name for name in wanted if name not in there)
    if missing:
        logger.warning("%s: %d of %d CamStyle files are missing, the first is %s; these images keep their own camera",
                       folder, len(missing), len(wanted), min(missing))  # fmt: skip
    return None if len(missing) == len(wanted) else replace(files, missing=missing)


def check_style_files(files: StyleFiles, paths: Sequence[Path], camids: np.ndarray) -> StyleFiles:
    """Decode every CamStyle file and add the unreadable ones to the missing ones."""
    names = [name for name in files.all_names(paths, camids) if name not in files.missing]
    bad = [names[index] for index in find_unreadable([files.folder / name for name in names])]
    if bad:
        logger.warning("%s: left out %d of %d unreadable CamStyle files, the first is %s",
                       files.folder, len(bad), len(names), bad[0])  # fmt: skip
    return replace(files, missing=files.missing | frozenset(bad))
