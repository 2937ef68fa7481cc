"""Small data sets that tests write for themselves."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

GREY = (128, 128, 128)


def write_image(path: Path, colour: tuple[int, int, int] = GREY, *, size: tuple[int, int] = (8, 16)) -> Path:
    """Write one image of a single colour, without loss whatever its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, format="PNG")
    return path


def write_images(folder: Path, names: Iterable[str]) -> None:
    """Write a gray image under each name."""
    for name in names:
        write_image(folder / name)


def ints(ids: np.ndarray | None) -> list[int] | None:
    """Return ids as a list, having seen that they are int64; None where there are none."""
    assert ids is None or ids.dtype == np.int64
    return None if ids is None else ids.tolist()


def write_market(root: Path) -> Path:
    """Write two training identities under two cameras, one query, and a gallery with a distractor and junk."""
    train = ["0002_c1s1_000451_03.jpg", "0002_c2s1_000776_01.jpg", "0007_c1s3_000102_01.jpg", "0007_c2s3_000202_02.jpg"]
    write_images(root / "bounding_box_train", train)
    write_images(root / "query", ["0001_c1s1_001051_00.jpg"])
    gallery = ["0001_c2s1_000301_00.jpg", "0000_c1s1_000151_01.jpg", "-1_c1s1_000401_03.jpg"]
    write_images(root / "bounding_box_test", gallery)
    return root
