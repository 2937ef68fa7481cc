"""Packs of decoded images: what they hold, when they are made anew, and that they change nothing."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mprd.backbone.features import image_batches
from mprd.config.schema import DataConfig
from mprd.data import cache
from mprd.data.cache import Packs
from mprd.data.camera_style import CameraColors, StyleFiles
from mprd.data.datasets import ImageSet
from mprd.data.images import PlainImages, TrainImages
from mprd.errors import UserError

CPU = torch.device("cpu")
CONFIG = DataConfig(height=32, width=16)
SIZE = {"height": 32, "width": 16}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 2)


def write_noise(folder: Path, count: int = 7, *, size: tuple[int, int] = (16, 32)) -> tuple[Path, ...]:
    random = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    paths = tuple(folder / f"{index}.png" for index in range(count))
    for path in paths:
        Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    return paths


def packs_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("images-*.npy"))


def test_images_of_one_size_are_kept_as_they_are(tmp_path: Path) -> None:
    paths = write_noise(tmp_path / "a", size=(30, 50))
    pack = Packs(tmp_path / "packs", mode="auto").open(paths, **SIZE, purpose="train")
    assert pack is not None
    assert pack.pixels.shape == (7, 50, 30, 3)
    assert all(pack.read(path).tobytes() == Image.open(path).tobytes() for path in paths)


def test_images_of_several_sizes_or_large_ones_get_a_quarter_more_than_the_training_size(tmp_path: Path) -> None:
    mixed = write_noise(tmp_path / "a", 1) + write_noise(tmp_path / "b", 1, size=(16, 33))
    large = write_noise(tmp_path / "c", 2, size=(33, 64))
    for paths in (mixed, large):
        pack = Packs(tmp_path / "packs", mode="auto").open(paths, **SIZE, purpose="train")
        assert pack is not None
        assert pack.pixels.shape == (2, 40, 20, 3)


@pytest.mark.parametrize("size", [(16, 32), (40, 25)])
def test_a_pack_gives_test_images_and_crops_to_the_bit(tmp_path: Path, size: tuple[int, int]) -> None:
    images = ImageSet(write_noise(tmp_path / "a", size=size), None, np.array([0, 1] * 3 + [0]))
    colours = CameraColors(np.array([[100.0] * 3, [90.0] * 3]), np.array([[50.0] * 3, [60.0] * 3]))
    packs = Packs(tmp_path / "packs", mode="auto")
    plain, packed_plain = PlainImages(images, CONFIG), PlainImages(images, CONFIG, packs=packs)
    assert all(torch.equal(plain[i][0], packed_plain[i][0]) for i in range(7))
    assert torch.equal(packed_plain.batch(np.array([3, 1]), CPU), torch.stack([plain[3][0], plain[1][0]]))
    if size == (16, 32):
        train = TrainImages(images, CONFIG, style=colours, seed=0)
        packed = TrainImages(images, CONFIG, style=colours, seed=0, packs=packs)
        assert all(torch.equal(train[i][0], packed[i][0]) for i in range(7))


def test_a_batch_on_the_device_shows_each_image_under_its_drawn_camera(tmp_path: Path) -> None:
    images = ImageSet(write_noise(tmp_path / "a"), None, np.array([0, 1, 2, 0, 1, 2, 0]))
    mean, std = np.array([[100.0] * 3, [90.0] * 3, [150.0] * 3]), np.array([[50.0] * 3, [60.0] * 3, [9.0] * 3])
    colours = CameraColors(mean, std)
    train = TrainImages(images, CONFIG, style=colours, seed=0, packs=Packs(tmp_path / "packs", mode="auto"))
    for epoch in (0, 1):
        train.set_epoch(epoch)
        ids = np.array([6, 2, 5, 0])
        expected = torch.stack([train[index][0] for index in ids.tolist()])
        # a level is 0.0175; the few that differ do so by a level or two
        assert (train.batch(ids, CPU) - expected).abs().mean() < 2e-4
    assert not torch.equal(train.batch(ids, CPU), expected)


def test_batches_on_the_device_are_those_of_the_loader(tmp_path: Path) -> None:
    images = ImageSet(write_noise(tmp_path / "a"), None, None)
    packs = Packs(tmp_path / "packs", mode="auto")
    batched = CONFIG.model_copy(update={"augment": "batch"})
    batches = [[3, 1, 4], [0], [6, 5]]
    loaded = image_batches(PlainImages(images, CONFIG), batches, num_workers=0, device=CPU)
    made = image_batches(PlainImages(images, batched, packs=packs), batches, num_workers=0, device=CPU)
    for one, other, ids in zip(loaded, made, batches, strict=True):
        assert len(one) == len(ids)
        assert torch.equal(one, other)


def test_camstyle_pictures_are_packed_with_the_originals(tmp_path: Path) -> None:
    for name, level in (("a_c1.png", 10), ("b_c2.png", 20), ("a_c1_fake_1to2.jpg", 200)):
        Image.new("RGB", (16, 32), (level,) * 3).save(tmp_path / name)
    images = ImageSet((tmp_path / "a_c1.png", tmp_path / "b_c2.png"), None, np.array([0, 1]))
    style = StyleFiles(tmp_path, (1, 2), True, frozenset({"b_c2_fake_2to1.jpg"}))
    train = TrainImages(images, CONFIG, style=style, seed=0, packs=Packs(tmp_path / "packs", mode="auto"))
    assert train.pack is not None
    assert len(train.pack.rows) == 3
    assert [train.read(0, camera).getpixel((0, 0))[0] for camera in (0, 1)] == [10, 200]
    assert [train.read(1, camera).getpixel((0, 0))[0] for camera in (0, 1)] == [20, 20]


def test_a_pack_is_built_once_and_again_when_a_file_or_the_size_changes(tmp_path: Path) -> None:
    paths, folder = write_noise(tmp_path / "a"), tmp_path / "packs"

    def open_anew(height: int = 32) -> list[str]:
        assert Packs(folder, mode="auto").open(paths, height=height, width=16, purpose="test") is not None
        return packs_of(folder)

    first = open_anew()
    changed = os.stat(folder / first[0]).st_mtime_ns
    assert open_anew() == first
    assert os.stat(folder / first[0]).st_mtime_ns == changed
    assert len(open_anew(height=31)) == 2
    os.utime(paths[2], ns=(1, 1))
    assert len(open_anew()) == 3


def test_a_pack_that_was_cut_off_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths, folder = write_noise(tmp_path / "a"), tmp_path / "packs"
    content = paths[5].read_bytes()
    paths[5].write_bytes(b"")
    os.utime(paths[5], ns=(1, 1))
    monkeypatch.setattr(cache, "pack_key", lambda *_: "key")
    with pytest.raises(UserError, match=r"5\.png: cannot read the image"):
        Packs(folder, mode="auto").open(paths, **SIZE, purpose="test")
    assert packs_of(folder) == []
    paths[5].write_bytes(content)
    decoded: list[str] = []
    decode = cache.decode
    monkeypatch.setattr(cache, "decode", lambda path, frame: decoded.append(path.name) or decode(path, frame))
    pack = Packs(folder, mode="auto").open(paths, **SIZE, purpose="test")
    # two chunks of two were done
    assert sorted(decoded) == ["4.png", "5.png", "6.png"]
    assert pack is not None
    assert all(pack.read(path).tobytes() == Image.open(path).tobytes() for path in paths)
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".lock", ".npy"]


@pytest.mark.parametrize("harm", ["flip", "cut", "sums"])
def test_a_damaged_pack_is_made_anew(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    paths, folder = write_noise(tmp_path / "a"), tmp_path / "packs"
    assert Packs(folder, mode="auto").open(paths, **SIZE, purpose="test") is not None
    file = folder / packs_of(folder)[0]
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[:-5])
    else:
        file.with_suffix(".json").write_text("{")
    pack = Packs(folder, mode="auto").open(paths, **SIZE, purpose="test")
    assert pack is not None
    assert all(pack.read(path).tobytes() == Image.open(path).tobytes() for path in paths)
    assert "damaged" in caplog.text


def test_where_a_pack_cannot_be_the_files_are_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_noise(tmp_path / "a")
    images = ImageSet(paths, None, None)
    expected = PlainImages(images, CONFIG)[2][0]
    (tmp_path / "file").write_text("")
    for packs in (Packs(tmp_path / "file" / "packs", mode="auto"), Packs(tmp_path / "packs", mode="none")):
        found = PlainImages(images, CONFIG, packs=packs)
        assert found.pack is None
        assert torch.equal(found[2][0], expected)
    assert caplog.text.count("images are decoded in every epoch") == 1


def test_a_pack_larger_than_half_the_memory_is_not_made_unless_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = write_noise(tmp_path / "a")
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 5, "SC_PAGE_SIZE": 4096}[name])
    caplog.set_level(logging.INFO, logger="mprd")
    # 7 images of 32 x 16 x 3 are 10,752 bytes, half of the memory 10,240
    assert Packs(tmp_path / "packs", mode="auto").open(paths, **SIZE, purpose="test") is None
    assert "more than half of the memory" in caplog.text
    assert Packs(tmp_path / "packs", mode="ram").open(paths, **SIZE, purpose="test") is not None
