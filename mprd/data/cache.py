"""Images decoded once: a packed uint8 array on disk, read through memory, keyed by its files and their size.

A pack is `images-<key>.npy`, uint8 `[n, H, W, 3]` that NumPy opens as it is, and `images-<key>.json` with the
checksums of its chunks, written last: a pack without it does not count. The key is of the file format, the wanted
frame, and each file's path, length and time of change; so a changed file makes a new pack, as does a moved folder.
Packs may be deleted at any time.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import logging
import os
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mprd.data.decode import image_size, read_image, reading_pool
from mprd.runtime.device import memory_bytes, send, send_pixels

logger = logging.getLogger("mprd")

Mode = Literal["auto", "ram", "device", "none"]
Purpose = Literal["test", "train"]

FORMAT = 1
CHUNK = 64  # images that are written, and checked, together
CHECKED = 16  # chunks whose checksums are taken when a pack is opened
MARGIN = 1.25  # a crop of the least area, 0.64, still has the training size
LARGEST = 2  # times the training size up to which images of one size are kept as they are
SPARE_BYTES = 1 << 30  # left free on the disk
SAY_AFTER = 5.0  # seconds between two lines of progress


@dataclass(frozen=True, eq=False)
class Pack:
    """Decoded images, and where each file's pixels stand."""

    pixels: np.ndarray
    """uint8 `[n, H, W, 3]`, mapped from disk."""
    rows: dict[Path, int]
    on_device: dict[torch.device, Tensor] = field(default_factory=dict)

    def read(self, path: Path) -> Image.Image:
        """Return a file's pixels as a picture."""
        return Image.fromarray(np.asarray(self.pixels[self.rows[path]]))

    def gather(self, rows: np.ndarray, *, device: torch.device, mode: Mode) -> Tensor:
        """Return the pixels of some rows on a device, uint8 `[B, H, W, 3]`."""
        if device not in self.on_device and belongs_on(device, self.pixels.nbytes, mode):
            self.on_device[device] = torch.from_numpy(self.pixels).to(device)
        if device in self.on_device:
            return self.on_device[device][send(rows, device)]
        return send_pixels(torch.from_numpy(self.pixels)[torch.from_numpy(rows)], device)


def belongs_on(device: torch.device, num_bytes: int, mode: Mode) -> bool:
    """Say whether an array should lie on the device: when asked to, or where it takes a quarter of what is free."""
    if device.type != "cuda" or mode == "ram":
        return False
    return mode == "device" or num_bytes <= torch.cuda.mem_get_info(device)[0] // 4


class Packs:
    """The packs of a run: built where they are missing, opened once."""

    def __init__(self, folder: Path, *, mode: Mode) -> None:
        """Keep packs below a folder, which is made when the first is built."""
        self.folder, self.mode = folder, mode
        self.opened: dict[tuple[Any, ...], Pack | None] = {}

    def open(self, paths: Sequence[Path], *, height: int, width: int, purpose: Purpose) -> Pack | None:
        """Return the images resized as they are tested, or in the frame that training crops are taken from.

        Training images of one size, at most twice the training size, are kept as they are; others get 1.25 times the
        training size. None under `data.cache: none`, and, with a line in the log, where a pack does not fit.
        Raises UserError naming an image that cannot be read.
        """
        if self.mode == "none" or not paths:
            return None
        key = (tuple(dict.fromkeys(paths)), height, width, purpose)
        if key not in self.opened:
            self.opened[key] = self.pack(*key)
        return self.opened[key]

    def pack(self, paths: tuple[Path, ...], height: int, width: int, purpose: Purpose) -> Pack | None:
        """Open a pack, building it first where it is missing or damaged."""
        try:
            file = self.folder / f"images-{pack_key(paths, height, width, purpose)}.npy"
            pixels = open_checked(file, num_images=len(paths))
            if pixels is None:
                frame = (height, width) if purpose == "test" else training_frame(paths, height, width)
                self.check_room(len(paths) * frame[0] * frame[1] * 3)
                with locked(file):
                    # another worker may have built it meanwhile
                    pixels = open_checked(file, num_images=len(paths))
                    pixels = build(paths, file, frame) if pixels is None else pixels
        except OSError as error:
            logger.warning("images are decoded anew in every epoch: %s", error.strerror or error)
            return None
        return Pack(pixels, {path: row for row, path in enumerate(paths)})

    def check_room(self, num_bytes: int) -> None:
        """Raise OSError where a pack would fill the disk, or under `auto` more than half of the memory."""
        self.folder.mkdir(parents=True, exist_ok=True)
        size = f"a pack of {num_bytes / 1e9:.1f} GB"
        if num_bytes + SPARE_BYTES > shutil.disk_usage(self.folder).free:
            raise OSError(f"{size} does not fit on the disk of {self.folder}")
        if self.mode == "auto" and num_bytes > memory_bytes() // 2:
            raise OSError(f"{size} is more than half of the memory (data.cache=ram packs it all the same)")


def pack_key(paths: Sequence[Path], height: int, width: int, purpose: Purpose) -> str:
    """Return a digest of what a pack is made of; raise OSError where a file is missing."""
    digest = hashlib.sha256(f"{FORMAT} {purpose} {height} {width}".encode())
    for path in paths:
        stat = os.stat(path)
        digest.update(f"\n{os.path.abspath(path)} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:16]


def training_frame(paths: Sequence[Path], height: int, width: int) -> tuple[int, int]:
    """Choose the height and width that training images are kept at."""
    with decoders() as run:
        sizes = set(run(image_size, paths))
    own_width, own_height = sizes.pop()
    if not sizes and own_height <= LARGEST * height and own_width <= LARGEST * width:
        return own_height, own_width
    return round(MARGIN * height), round(MARGIN * width)


def build(paths: Sequence[Path], file: Path, frame: tuple[int, int]) -> np.ndarray:
    """Decode every image into a new pack, from where an earlier attempt was cut off, and open it."""
    shape = (len(paths), *frame, 3)
    part, log = file.with_suffix(".part"), file.with_suffix(".part.log")
    sums = resumable_sums(part, log, shape)
    told = started = time.monotonic()
    with open(part, "r+b" if sums else "wb") as pixels, open(log, "a" if sums else "w") as done, decoders() as run:
        if not sums:
            np.lib.format.write_array_header_1_0(pixels, describe(shape))
            done.write(f"{json.dumps(shape)}\n")
        pixels.seek(header_size(shape) + len(sums) * CHUNK * frame[0] * frame[1] * 3)
        for start in range(len(sums) * CHUNK, len(paths), CHUNK):
            chunk = np.stack(run(lambda path: decode(path, frame), paths[start : start + CHUNK]))
            pixels.write(chunk.data)
            # what the log says is done has to be there
            pixels.flush()
            sums.append(zlib.crc32(chunk.data))
            done.write(f"{sums[-1]}\n")
            done.flush()
            if time.monotonic() - told > SAY_AFTER:
                told = time.monotonic()
                logger.info("packing images: %d of %d", start + len(chunk), len(paths))
        os.fsync(pixels.fileno())
    os.replace(part, file)
    side = file.with_suffix(".json.part")
    side.write_text(json.dumps({"format": FORMAT, "shape": shape, "sums": sums}))
    os.replace(side, file.with_suffix(".json"))
    log.unlink()
    size = np.prod(shape) / 1e6
    logger.info("packed %d images, %.0f MB, in %.1f s", len(paths), size, time.monotonic() - started)
    return np.load(file, mmap_mode="c")


def decode(path: Path, frame: tuple[int, int]) -> np.ndarray:
    """Decode an image at a height and width, as it is resized for testing."""
    image = read_image(path)
    return np.asarray(image.resize(frame[::-1], Image.Resampling.BICUBIC))


def describe(shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the header of a NumPy file."""
    return {"descr": "|u1", "fortran_order": False, "shape": shape}


def header_size(shape: tuple[int, ...]) -> int:
    """Count the bytes in front of the pixels."""
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, describe(shape))
    return header.tell()


def resumable_sums(part: Path, log: Path, shape: tuple[int, ...]) -> list[int]:
    """Return the checksums of the chunks that an earlier attempt finished; none where there was none, or another."""
    try:
        lines = log.read_text().split("\n")[:-1]
        if not lines or tuple(json.loads(lines[0])) != shape:
            return []
        sums = [int(line) for line in lines[1:]]
        whole = (part.stat().st_size - header_size(shape)) // (CHUNK * shape[1] * shape[2] * 3)
    except (OSError, ValueError):
        return []
    return sums[: max(0, whole)]


def open_checked(file: Path, *, num_images: int) -> np.ndarray | None:
    """Map a finished pack; None where there is none, or, with a warning, where it is damaged."""
    side = file.with_suffix(".json")
    if not (file.is_file() and side.is_file()):
        return None
    try:
        # copy on write: torch takes no read-only array, and nothing is written
        pixels = np.load(file, mmap_mode="c")
        about = json.loads(side.read_text())
        is_whole = pixels.dtype == np.uint8 and list(pixels.shape) == about["shape"] and len(pixels) == num_images
        chunks = np.unique(np.linspace(0, len(about["sums"]) - 1, CHECKED).astype(int)).tolist()
        if is_whole and all(checksum(pixels, chunk) == about["sums"][chunk] for chunk in chunks):
            return pixels
    except (OSError, ValueError, KeyError):
        pass
    logger.warning("%s: damaged, so it is packed anew", file)
    return None


def checksum(pixels: np.ndarray, chunk: int) -> int:
    """Return the checksum of a chunk of images."""
    return zlib.crc32(np.ascontiguousarray(pixels[chunk * CHUNK : (chunk + 1) * CHUNK]).data)


@contextmanager
def decoders() -> Iterator[Callable[..., list[Any]]]:
    """Run a function over files, several at a time, in order."""
    with reading_pool() as pool:
        yield lambda function, paths: list(pool.map(function, paths))


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Let one process at a time build a pack."""
    with open(file.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
