"""A cache of decoded images: uint8 arrays on disk ("packs"), memory-mapped, keyed by their source files.

A pack is `images-<key>.npy`, uint8 `[n, H, W, 3]`, and `images-<key>.json` with the checksums of its chunks, which is
written last and marks the pack as complete. The key is a digest of the format version, the size, and each file's path,
length and modification time, so that a changed file or a moved folder yields a new pack. Packs may be deleted at any
time.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from mprd.data.decode import VERSION, image_size, read_image, reading_pool
from mprd.data.same_images import digest_files
from mprd.runtime.machine import memory_bytes
from mprd.storage.cache import make_cache

# where it is used, torch is imported: the process of a study opens data sets without it
if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger("mprd")

Mode = Literal["auto", "none"]
Purpose = Literal["test", "train"]

FORMAT = 1
CHUNK = 64  # images per write and per checksum
NUM_CHECKED = 16  # chunks verified when a pack is opened
MARGIN = 1.25  # over the training size: the smallest crop, 0.64 of the area, still has the training size
MAX_SCALE = 2  # over the training size, up to which images of a single size are not resized
SPARE_BYTES = 1 << 30  # left free on the disk
PROGRESS_SECONDS = 5.0  # between two lines of progress


@dataclass(frozen=True, eq=False)
class Pack:
    """Decoded images, and the row of each file."""

    pixels: np.ndarray
    """uint8 `[n, H, W, 3]`, memory-mapped."""
    rows: dict[Path, int]
    on_device: dict[torch.device, Tensor] = field(default_factory=dict)

    def read(self, path: Path) -> Image.Image:
        """Return a file's pixels as a PIL image."""
        return Image.fromarray(np.asarray(self.pixels[self.rows[path]]))

    def gather(self, rows: np.ndarray, *, device: torch.device) -> Tensor:
        """Return rows of pixels on a device, uint8 `[B, H, W, 3]`."""
        import torch

        from mprd.runtime.device import send, send_pixels

        if device not in self.on_device and should_reside_on(device, self.pixels.nbytes):
            self.on_device[device] = torch.from_numpy(self.pixels).to(device)
        if device in self.on_device:
            return self.on_device[device][send(rows, device)]
        return send_pixels(torch.from_numpy(self.pixels)[torch.from_numpy(rows)], device)


def should_reside_on(device: torch.device, num_bytes: int) -> bool:
    """Return whether to keep an array on an accelerator: if it fits a quarter of the free memory."""
    import torch

    return device.type == "cuda" and num_bytes <= torch.cuda.mem_get_info(device)[0] // 4


class Packs:
    """The packs of a run, built where missing and opened once."""

    def __init__(self, folder: Path, *, mode: Mode) -> None:
        """Keep packs in a folder, which is created with the first pack."""
        self.folder, self.mode = folder, mode
        self.opened: dict[tuple[Any, ...], Pack | None] = {}

    def open(self, paths: Sequence[Path], *, height: int, width: int, purpose: Purpose) -> Pack | None:
        """Return decoded images at the test size, or at a size from which training crops are taken.

        Training images of a single size, at most twice the training size, are not resized; others get 1.25 times the
        training size. Returns None under `data.cache: none`, and where a pack does not fit, which is logged.
        Raises UserError naming an image that cannot be read.
        """
        if self.mode == "none" or not paths:
            return None
        key = (tuple(dict.fromkeys(paths)), height, width, purpose)
        if key not in self.opened:
            self.opened[key] = self.pack(*key)
        return self.opened[key]

    def pack(self, paths: tuple[Path, ...], height: int, width: int, purpose: Purpose) -> Pack | None:
        """Open a pack; build it where it is missing or damaged."""
        try:
            file = self.folder / f"images-{digest_files(paths, FORMAT, VERSION, purpose, height, width)}.npy"
            pixels = open_checked(file, num_images=len(paths))
            if pixels is None:
                frame = (height, width) if purpose == "test" else training_frame(paths, height, width)
                make_cache(self.folder)
                with locked(file):
                    # another process may have built it meanwhile
                    pixels = open_checked(file, num_images=len(paths))
                    if pixels is None:
                        # of a process that was killed
                        file.with_suffix(".part").unlink(missing_ok=True)
                        self.check_room(len(paths) * frame[0] * frame[1] * 3)
                        pixels = build(paths, file, frame)
        except OSError as error:
            logger.warning("no cache, images are decoded in every epoch: %s", error.strerror or error)
            return None
        return Pack(pixels, {path: row for row, path in enumerate(paths)})

    def check_room(self, num_bytes: int) -> None:
        """Raise OSError where a pack would fill the disk, or need more than half of the memory."""
        size = f"a pack of {num_bytes / 1e9:.1f} GB"
        if num_bytes + SPARE_BYTES > shutil.disk_usage(self.folder).free:
            raise OSError(f"{size} does not fit on the disk of {self.folder}")
        if num_bytes > memory_bytes() // 2:
            raise OSError(f"{size} is more than half of the memory")


def training_frame(paths: Sequence[Path], height: int, width: int) -> tuple[int, int]:
    """Return the height and width of packed training images."""
    with reading_pool() as pool:
        sizes = set(pool.map(image_size, paths))
    own_width, own_height = sizes.pop()
    if not sizes and own_height <= MAX_SCALE * height and own_width <= MAX_SCALE * width:
        return own_height, own_width
    return round(MARGIN * height), round(MARGIN * width)


def build(paths: Sequence[Path], file: Path, frame: tuple[int, int]) -> np.ndarray:
    """Decode every image into a new pack and open it; an attempt that fails leaves nothing."""
    shape, sums = (len(paths), *frame, 3), list[int]()
    part, side = file.with_suffix(".part"), file.with_suffix(".json.part")
    logged = started = time.monotonic()
    try:
        # written and not mapped: on a full disk a map ends the process
        with open(part, "wb") as pixels, reading_pool() as pool:
            header = {"descr": "|u1", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(pixels, header)
            for start in range(0, len(paths), CHUNK):
                chunk = np.stack([*pool.map(lambda path: decode(path, frame), paths[start : start + CHUNK])])
                pixels.write(chunk.data)
                sums.append(zlib.crc32(chunk.data))
                if time.monotonic() - logged > PROGRESS_SECONDS:
                    logged = time.monotonic()
                    logger.info("packing images: %d of %d", start + len(chunk), len(paths))
            pixels.flush()
            os.fsync(pixels.fileno())
        side.write_text(json.dumps({"format": FORMAT, "shape": shape, "sums": sums}))
        os.replace(part, file)
        os.replace(side, file.with_suffix(".json"))
    finally:
        part.unlink(missing_ok=True)
        side.unlink(missing_ok=True)
    size = np.prod(shape) / 1e6
    logger.info("packed %d images, %.0f MB, in %.1f s", len(paths), size, time.monotonic() - started)
    return np.load(file, mmap_mode="c")


def decode(path: Path, frame: tuple[int, int]) -> np.ndarray:
    """Decode an image, resized as for testing, `[H, W, 3]`."""
    image = read_image(path)
    return np.asarray(image.resize(frame[::-1], Image.Resampling.BICUBIC))


def open_checked(file: Path, *, num_images: int) -> np.ndarray | None:
    """Map a complete pack; None where there is none, or, with a warning, where it is damaged."""
    side = file.with_suffix(".json")
    if not (file.is_file() and side.is_file()):
        return None
    try:
        # copy-on-write, because torch warns about read-only arrays; nothing is written
        pixels = np.load(file, mmap_mode="c")
        about = json.loads(side.read_text())
        is_whole = pixels.dtype == np.uint8 and list(pixels.shape) == about["shape"] and len(pixels) == num_images
        chunks = np.unique(np.linspace(0, len(about["sums"]) - 1, NUM_CHECKED).astype(int)).tolist()
        if is_whole and all(checksum(pixels, chunk) == about["sums"][chunk] for chunk in chunks):
            return pixels
    except (OSError, ValueError, KeyError):
        pass
    logger.warning("%s: damaged, packing it again", file)
    return None


def checksum(pixels: np.ndarray, chunk: int) -> int:
    """Return the checksum of a chunk of images."""
    return zlib.crc32(np.ascontiguousarray(pixels[chunk * CHUNK : (chunk + 1) * CHUNK]).data)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Lock a pack for building, across processes."""
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
