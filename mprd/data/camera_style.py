"""Camera style transfer (Sec. 5.2): CamStyle's generated images, or color statistics of the cameras without a GAN."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from mprd.data.decode import find_unreadable, read_image
from mprd.errors import UserError

logger = logging.getLogger("mprd")

COLOR_SAMPLE = 200  # images per camera for its color statistics
COLOR_SIZE = (32, 64)  # width and height at which they are measured


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


def find_style_files(
    folder: Path, paths: Sequence[Path], camids: np.ndarray, *, camera_numbers: tuple[int, ...], names_source: bool
) -> StyleFiles | None:
    """Find the CamStyle images of the training images; log how many are missing, return None when all are."""
    if not folder.is_dir():
        return None
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


@dataclass(frozen=True, eq=False)
class CameraColors:
    """Mean and deviation of each camera's colors, float64 `[num_cameras, 3]` in 0 to 255; NaN without images."""

    mean: np.ndarray
    std: np.ndarray
    tables: dict[tuple[int, int], np.ndarray] = field(default_factory=dict)
    """A cache of `table`, by source and target camera."""

    def transfer(self, image: Image.Image, camid: int, target: int) -> Image.Image:
        """Map the colors of camera c to camera t, per channel: `(x - mean_c) / std_c * std_t + mean_t`."""
        return image if target == camid else image.point(self.table(camid, target).ravel().tolist())

    def table(self, camid: int, target: int) -> np.ndarray:
        """Return the target level of each level of each channel, uint8 `[3, 256]`."""
        if (camid, target) not in self.tables:
            self.tables[camid, target] = self.compute_table(camid, target)
        return self.tables[camid, target]

    def compute_table(self, camid: int, target: int) -> np.ndarray:
        levels = np.arange(256)[:, None]
        if target == camid:
            return levels.repeat(3, 1).T.astype(np.uint8)
        moved = (levels - self.mean[camid]) / self.std[camid] * self.std[target] + self.mean[target]
        return moved.round().clip(0, 255).astype(np.uint8).T


def measure_colors(paths: Sequence[Path], camids: np.ndarray) -> CameraColors:
    """Measure each camera's colors on at most 200 of its images, evenly spread.

    Raises UserError naming an image that cannot be read.
    """
    mean = np.full((int(camids.max(initial=-1)) + 1, 3), np.nan)
    std = mean.copy()
    for camid in np.unique(camids):
        rows = np.flatnonzero(camids == camid)
        rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), COLOR_SAMPLE)).astype(int)]
        pixels = np.stack([np.asarray(read_image(paths[row]).resize(COLOR_SIZE)) for row in rows]).reshape(-1, 3)
        mean[camid] = pixels.mean(0)
        # a camera with a single color has no deviation to divide by
        std[camid] = pixels.std(0).clip(1)
    return CameraColors(mean, std)


def choose_style(
    kind: str, paths: Sequence[Path], camids: np.ndarray | None, *, files: StyleFiles | None
) -> StyleFiles | CameraColors | None:
    """Return the camera styles for `data.camera_style`; color statistics replace absent CamStyle files (logged).

    Raises UserError when `kind` is unknown.
    """
    if kind not in ("camstyle", "colour", "none"):
        raise UserError(f"data.camera_style must be camstyle, colour or none, but got {kind!r}")
    if kind == "none":
        return None
    if camids is None:
        logger.warning("data.camera_style: no cameras in the file names, so no style is transferred")
        return None
    if kind == "camstyle" and files is not None:
        return files
    if kind == "camstyle":
        logger.warning("data.camera_style: no CamStyle files; using per-camera colors (data.camera_style=colour)")
    return measure_colors(paths, camids)
