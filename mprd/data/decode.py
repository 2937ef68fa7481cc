"""The one decoder of image files, and the check that they can be decoded.

What a file says about how it is to be shown is honored: orientation, bit depth, palette, transparency (over white),
color profile. Of an animation the first frame is read.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from mprd.errors import UserError
from mprd.runtime.machine import num_cores

VERSION = 2
"""To be incremented when the same file yields other pixels: caches of pixels and features are keyed by it."""
# the errors that Pillow raises for damaged files
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError)
SKIP_HINT = "data.on_bad_image=skip leaves such files out of a training"
"""The remedy for an image of a data set that cannot be read."""
BACKGROUND = (255, 255, 255)
"""What transparent pixels are shown over."""
SIXTEEN_BITS = 65535
ORIENTATION, BITS_PER_SAMPLE = 0x0112, 258
TURNED = (5, 6, 7, 8)
"""Orientations that swap width and height."""
PROFILE_MODES = {"RGB ": ("RGB",), "CMYK": ("CMYK",), "GRAY": ("L",), "Lab ": ("LAB",)}


def read_image(path: Path | str, *, hint: str = SKIP_HINT) -> Image.Image:
    """Decode an image as 8-bit RGB; raise UserError naming the file when it cannot be read.

    Args:
        hint: the remedy, for the error message.
    """
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except DECODE_ERRORS as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else one_line(error)
        raise UserError(f"{path}: cannot read the image: {reason}{f' ({hint})' if hint else ''}") from None


def to_rgb(image: Image.Image) -> Image.Image:
    """Return an image as 8-bit RGB as a viewer would show it, upright; raise ValueError where it does not say how."""
    image.load()
    if image.getexif().get(ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        return eight_bits(image).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        return over_background(image)
    return in_srgb(image)


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray to 8 bits; raise ValueError for numbers without a known range."""
    bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (16,))
    values = np.asarray(image)
    if image.mode == "F" or max(bits) > 16 or values.min() < 0 or values.max() > SIXTEEN_BITS:
        raise ValueError(f"pixels of mode {image.mode} say no range: convert to 8 or 16 bits")
    return Image.fromarray(((values.astype(np.uint32) * 255 + SIXTEEN_BITS // 2) // SIXTEEN_BITS).astype(np.uint8))


def over_background(image: Image.Image) -> Image.Image:
    """Show a transparent image over the background."""
    # an opaque copy carries the profile, which is of the colors alone
    layer = image.convert("RGBA")
    opaque = layer.convert("RGB")
    opaque.info = {key: value for key, value in image.info.items() if key == "icc_profile"}
    shown = Image.new("RGB", image.size, BACKGROUND)
    shown.paste(in_srgb(opaque), mask=layer.getchannel("A"))
    return shown


def in_srgb(image: Image.Image) -> Image.Image:
    """Convert to RGB by the embedded color profile where there is a usable one, else by Pillow's rules."""
    profile = image.info.get("icc_profile")
    if image.mode == "LAB" or profile:
        transform = to_srgb(profile or b"", image.mode)
        if transform is not None:
            converted = ImageCms.applyTransform(image, transform)
            assert converted is not None
            return converted
    return image.convert("RGB")


@lru_cache(maxsize=16)
def to_srgb(profile: bytes, mode: str) -> Any:
    """Return the transform from a profile to sRGB; None where it is sRGB, damaged, or of another kind of image."""
    try:
        known = ImageCms.ImageCmsProfile(io.BytesIO(profile) if profile else ImageCms.createProfile("LAB"))
        space = known.profile
        is_srgb = "srgb" in (space.profile_description or "").lower()
        if is_srgb or mode not in PROFILE_MODES.get(space.xcolor_space, ()):
            return None
        return ImageCms.buildTransform(known, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (OSError, ValueError, TypeError, ImportError, ImageCms.PyCMSError):
        return None


def image_size(path: Path) -> tuple[int, int]:
    """Return width and height, upright, from the header of an image file; raise UserError where it cannot be read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
            # TIFF turns by itself
            is_turned = image.format != "TIFF" and image.getexif().get(ORIENTATION) in TURNED
            return (height, width) if is_turned else (width, height)
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
