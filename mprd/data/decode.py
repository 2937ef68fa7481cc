"""Image files to pixels, and which files can be read."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from mprd.errors import UserError
from mprd.runtime.device import num_cores

# what Pillow raises on files that are broken in one way or another
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)


def read_image(path: Path | str, *, hint: str = "data.on_bad_image=skip leaves such files out") -> Image.Image:
    """Decode a whole image as 8-bit RGB; raise UserError naming the file when it cannot be read.

    Args:
        hint: what the person can do about it.
    """
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except DECODE_ERRORS as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else describe(error)
        raise UserError(f"{path}: cannot read the image: {reason}{f' ({hint})' if hint else ''}") from None


def image_size(path: Path) -> tuple[int, int]:
    """Read an image's width and height from the head of its file; raise UserError where that cannot be read."""
    try:
        with Image.open(path) as image:
            return image.size
    except DECODE_ERRORS:
        # for its message
        return read_image(path).size


def describe(error: Exception) -> str:
    """Say an error in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def is_readable(path: Path) -> bool:
    """Decode an image to see whether it can be read."""
    try:
        read_image(path)
    except UserError:
        return False
    return True


def reading_pool() -> ThreadPoolExecutor:
    """Return threads that read and decode files."""
    return ThreadPoolExecutor(min(8, num_cores()))


def find_unreadable(paths: Sequence[Path]) -> list[int]:
    """Decode every file once, several at a time; return the indices of those that cannot be read."""
    with reading_pool() as pool:
        return [index for index, good in enumerate(pool.map(is_readable, paths)) if not good]
