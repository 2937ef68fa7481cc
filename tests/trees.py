"""Small data sets that tests write."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

GRAY = (128, 128, 128)
MSMT17 = (
    "0000_000_01_0303morning_0008_0.jpg",
    "0000_010_14_0303noon_0011_0_ex.jpg",
    "0001_001_12_0303morning_0018_1.jpg",
)
"""Training images of `write_msmt17`, sorted; the second is in list_val."""
CAMSTYLE = (
    "0002_c1s1_000451_03_fake_1to2.jpg",
    "0002_c2s1_000776_01_fake_2to1.jpg",
    "0007_c1s3_000102_01_fake_1to2.jpg",
    "0007_c2s3_000202_02_fake_2to1.jpg",
)
"""CamStyle's images for `write_market`."""


def write_image(path: Path, color: tuple[int, int, int] = GRAY, *, size: tuple[int, int] = (8, 16)) -> Path:
    """Write one image of a single color, lossless whatever its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, format="PNG")
    return path


def write_images(folder: Path, names: Iterable[str]) -> None:
    """Write a gray image under each name."""
    for name in names:
        write_image(folder / name)


def write_noise(folder: Path, count: int, *, size: tuple[int, int] = (16, 32)) -> tuple[Path, ...]:
    """Write images of noise, `0.png` and on."""
    random = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    paths = tuple(folder / f"{index}.png" for index in range(count))
    for path in paths:
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return paths


def ints(ids: np.ndarray | None) -> list[int] | None:
    """Return int64 ids as a list."""
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


def write_msmt17(root: Path, *, train: str = "train") -> Path:
    """Write MSMT17's official layout: the folders `train` and `test`, or those of V2, and the four lists."""
    test = train.replace("train", "test")
    lists = {
        "list_train.txt": (train, [f"0001/{MSMT17[2]} 1", f"0000/{MSMT17[0]} 0"]),
        "list_val.txt": (train, [f"0000/{MSMT17[1]} 0"]),
        "list_query.txt": (test, ["0000/0000_000_03_0113afternoon_0099_0.jpg 0"]),
        "list_gallery.txt": (test, ["0000/0000_001_01_0113noon_0199_0.jpg 0", "0002/0002_001_12_0113noon_0_0.jpg 2"]),
    }
    for file, (folder, lines) in lists.items():
        write_images(root / folder, [line.split()[0] for line in lines])
        (root / file).write_text("\n".join(lines) + "\n")
    return root
