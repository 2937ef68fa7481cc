"""Decoding of image files, and the check that they can be decoded."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from mprd.errors import UserError
from mprd.runtime.device import num_cores

# the errors that Pillow raises for damaged files
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path: Path | str, *, hint: str = "data.on_bad_image=skip leaves such files out") -> Image.Image:
    """Decode an image as 8-bit RGB; raise UserError naming the file when it cannot be read.

    Args:
        hint: the remedy, for the error message.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except DECODE_ERRORS as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
        raise UserError(f"{path}: cannot read the image: {reason}{f' ({hint})' if hint else ''}") from None


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height from the header of an image file; raise UserError where it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.size
    except DECODE_ERRORS:
        # raises the UserError
        return read_image(path).size


def one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def is_readable(path: Path) -> bool:
    """Return whether an image can be decoded."""
    try:
        read_image(path)
    except UserError:
        return False
    return True


def reading_pool() -> ThreadPoolExecutor:
    """Return a pool of threads for reading and decoding; Pillow releases the GIL."""
    return ThreadPoolExecutor(min(8, num_cores()))


def find_unreadable(paths: Sequence[Path]) -> list[int]:
    """Decode every file, in parallel; return the indices of those that cannot be read."""
    with reading_pool() as pool:
        return [index for index, good in enumerate(pool.map(is_readable, paths)) if not good]
