"""One picture in every form that Pillow can write is the same picture, in training, extraction and search."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from mprd.data.cache import training_frame
from mprd.data.decode import image_size, read_image
from mprd.errors import UserError
from mprd.model import load_model

SIZE = (12, 32)
T = Image.Transpose
TURNS = (None, T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_90, T.TRANSVERSE, T.ROTATE_270)
"""What an image is turned by so that the orientations 1 to 8 turn it back."""
OPTIONS = {"jpg": {"quality": 98, "subsampling": 0}, "webp": {"lossless": True}, "jp2": {"irreversible": False}}


def picture() -> Image.Image:
    """Return blocks of color; the right third is white, so that transparency over white can show it."""
    blocks = np.random.default_rng(0).integers(40, 215, (4, 2, 3))
    pixels = np.full((SIZE[1], SIZE[0], 3), 255, np.uint8)
    pixels[:, :8] = np.kron(blocks, np.ones((8, 4, 1)))
    return Image.fromarray(pixels)


def sixteen_bits(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(np.uint16) * 257


def transparent(image: Image.Image) -> Image.Image:
    """Make the white part transparent, and black below."""
    mask = Image.new("L", image.size, 0)
    mask.paste(255, (0, 0, 8, SIZE[1]))
    black = Image.new(image.mode, image.size)
    black.paste(image, mask=mask)
    black.putalpha(mask)
    return black


def png_of_16_bits(path: Path, pixels: np.ndarray) -> None:
    """Write a PNG with 16 bits per color, which Pillow does not."""
    height, width, _ = pixels.shape

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


def profile_of(space: str) -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()


def with_profile(image: Image.Image) -> Image.Image:
    """Return the image in Lab, with its profile."""
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    turned = ImageCms.profileToProfile(image, srgb, lab, outputMode="LAB")
    assert turned is not None
    turned.info["icc_profile"] = profile_of("LAB")
    return turned


def oriented(image: Image.Image, orientation: int, path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    turn = TURNS[orientation - 1]
    (image if turn is None else image.transpose(turn)).save(path, exif=exif, **OPTIONS.get(path.suffix[1:], {}))


Write = Callable[[Image.Image, Path], object]
PLAIN = ("png", "bmp", "tif", "webp", "ppm", "gif", "jpg", "tga", "pcx", "sgi", "im", "jp2")
FORMS: list[tuple[str, Write]] = [
    *((f"x.{suffix}", lambda image, path: image.save(path, **OPTIONS.get(path.suffix[1:], {}))) for suffix in PLAIN),
    *(
        (f"turned{turn}.{suffix}", lambda image, path, turn=turn: oriented(image, turn, path))
        for turn in range(1, 9)
        for suffix in ("jpg", "png", "tif", "webp")
    ),
    *((f"alpha.{suffix}", lambda i, p: transparent(i).save(p, **OPTIONS.get(p.suffix[1:], {})))
      for suffix in ("png", "tif", "webp")),
    ("palette.png", lambda image, path: image.quantize(64).save(path)),
    ("hole.png", lambda i, p: i.quantize(64).save(p, transparency=i.quantize(64).getpixel((11, 0)))),
    ("hole.gif", lambda i, p: i.quantize(64).save(p, transparency=i.quantize(64).getpixel((11, 0)))),
    ("key.png", lambda image, path: image.save(path, transparency=(255, 255, 255))),
    ("cmyk.tif", lambda image, path: image.convert("CMYK").save(path)),
    ("cmyk.jpg", lambda image, path: image.convert("CMYK").save(path, quality=98, subsampling=0)),
    ("luma.tif", lambda image, path: image.convert("YCbCr").save(path)),
    ("lab.tif", lambda image, path: with_profile(image).save(path)),
    ("damaged-profile.png", lambda image, path: image.save(path, icc_profile=b"junk" * 50)),
    ("animation.png", lambda i, p: i.save(p, save_all=True, append_images=[Image.new("RGB", SIZE)])),
    ("animation.gif", lambda i, p: i.save(p, save_all=True, append_images=[Image.new("RGB", SIZE)])),
    ("deep.png", lambda image, path: png_of_16_bits(path, sixteen_bits(image))),
]  # fmt: skip
GRAY_FORMS: list[tuple[str, Write]] = [
    *((f"gray.{suffix}", lambda image, path: image.save(path)) for suffix in ("png", "bmp", "tif", "pgm", "gif")),
    *((f"gray16.{suffix}", lambda i, p: Image.fromarray(sixteen_bits(i)).save(p)) for suffix in ("png", "tif", "pgm")),
    ("gray-alpha.png", lambda image, path: transparent(image).save(path)),
    # an RGB profile says nothing of gray
    ("gray-profile.png", lambda i, p: i.save(p, icc_profile=profile_of("sRGB"))),
]  # fmt: skip


def test_one_picture_in_every_form_has_the_same_pixels_and_features(tiny_run: Path, tmp_path: Path) -> None:
    paths, wanted = [], []
    for forms, image in ((FORMS, picture()), (GRAY_FORMS, picture().convert("L"))):
        for name, write in forms:
            write(image, tmp_path / name)
            paths.append(tmp_path / name)
            wanted.append(np.asarray(image.convert("RGB")).astype(int))
    found = [np.asarray(read_image(path)).astype(int) for path in paths]
    assert {path.name: image_size(path) for path in paths} == {path.name: SIZE for path in paths}
    assert training_frame(paths, 32, 16) == SIZE[::-1]
    # lossy forms, and the rounding of color spaces
    loose = {path.name for path in paths if path.suffix == ".jpg"} | {"luma.tif", "lab.tif"}
    errors = {path.name: abs(one - other).max() for path, one, other in zip(paths, found, wanted, strict=True)}
    assert [name for name, error in errors.items() if error > (8 if name in loose else 0)] == []
    model = load_model(tiny_run, device="cpu")
    features = model.extract(paths)
    split = len(FORMS)
    assert (features[:split] @ features[0]).min() > 0.999
    assert (features[split:] @ features[split]).min() > 0.999
    # an image that a program opened itself is read alike
    opened = [Image.open(tmp_path / name) for name in ("turned6.jpg", "gray16.png", "alpha.png")]
    again = model.extract(opened)
    assert np.array_equal(again, model.extract([tmp_path / Path(image.filename).name for image in opened]))


@pytest.mark.parametrize("pixels", [np.full((4, 4), 0.5, np.float32), np.full((4, 4), 70000, np.int32)])
def test_numbers_without_a_range_are_refused(pixels: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(pixels).save(tmp_path / "x.tif")
    with pytest.raises(
        UserError, match=r"x\.tif: cannot read the image: pixels of mode . say no range: convert to 8 or"
    ):
        read_image(tmp_path / "x.tif")


def test_a_profile_is_honored(tmp_path: Path) -> None:
    """A gamma of 1 makes the same numbers much lighter."""
    file = tmp_path / "x.png"
    Image.new("RGB", (4, 4), (60, 60, 60)).save(file, icc_profile=linear(profile_of("sRGB")))
    assert read_image(file).getpixel((0, 0)) == pytest.approx((133,) * 3, abs=3)


def linear(profile: bytes) -> bytes:
    """Return an sRGB profile with another name and a gamma of 1: its curves are parametric, 's' in a `para` tag."""
    data = bytearray(profile)
    for tag in range(struct.unpack(">I", data[128:132])[0]):
        name, offset, size = struct.unpack(">4sII", data[132 + 12 * tag : 144 + 12 * tag])
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            # a curve of zero entries is the identity
            data[offset : offset + 12] = b"curv" + bytes(8)
        if name == b"desc":
            data[offset : offset + size] = data[offset : offset + size].replace(b"s\0R\0G\0B", b"l\0i\0n\0e")
    return bytes(data)
