"""Packs of decoded images: their content, when they are rebuilt, and that they do not change the images."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mprd.backbone.features import image_batches
from mprd.config.schema import DataConfig
from mprd.data import cache
from mprd.data.cache import Mode, Pack, Packs, Purpose
from mprd.data.camera_style import StyleFiles
from mprd.data.datasets import ImageSet
from mprd.data.images import PlainImages, TrainImages
from tests.trees import write_image, write_noise

CPU = torch.device("cpu")
CONFIG = DataConfig(height=32, width=16)
SIZE = {"height": 32, "width": 16}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "CHUNK", 2)


def open_pack(folder: Path, paths: tuple[Path, ...], *, purpose: Purpose = "test", mode: Mode = "auto") -> Pack:
    pack = Packs(folder, mode=mode).open(paths, **SIZE, purpose=purpose)
    assert pack is not None
    return pack


def assert_holds(pack: Pack, paths: tuple[Path, ...]) -> None:
    assert all(pack.read(path).tobytes() == Image.open(path).tobytes() for path in paths)


def packs_of(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("images-*.npy"))


def test_training_images_of_one_size_are_not_resized_unless_large(tmp_path: Path) -> None:
    paths = write_noise(tmp_path / "a", 7, size=(30, 50))
    pack = open_pack(tmp_path / "packs", paths, purpose="train")
    assert pack.pixels.shape == (7, 50, 30, 3)
    assert_holds(pack, paths)
    mixed = write_noise(tmp_path / "b", 1) + write_noise(tmp_path / "c", 1, size=(16, 33))
    large = write_noise(tmp_path / "d", 2, size=(33, 64))
    for paths in (mixed, large):
        assert open_pack(tmp_path / "packs", paths, purpose="train").pixels.shape == (2, 40, 20, 3)


@pytest.mark.parametrize("size", [(16, 32), (40, 25)])
def test_packed_images_are_bitwise_equal_to_decoded_files(tmp_path: Path, size: tuple[int, int]) -> None:
    images = ImageSet(write_noise(tmp_path / "a", 7, size=size), None, None)
    packs = Packs(tmp_path / "packs", mode="auto")
    plain, packed_plain = PlainImages(images.paths, CONFIG), PlainImages(images.paths, CONFIG, packs=packs)
    assert all(torch.equal(plain[i][0], packed_plain[i][0]) for i in range(7))
    assert torch.equal(packed_plain.batch(np.array([3, 1]), CPU), torch.stack([plain[3][0], plain[1][0]]))
    if size == (16, 32):
        train = TrainImages(images, CONFIG, style=None, seed=0)
        packed = TrainImages(images, CONFIG, style=None, seed=0, packs=packs)
        assert all(torch.equal(train[i][0], packed[i][0]) for i in range(7))


def test_a_batch_has_each_image_in_the_style_of_its_drawn_camera(tmp_path: Path) -> None:
    camids = np.array([0, 1, 2, 0, 1, 2, 0])
    images = ImageSet(write_noise(tmp_path / "a", 7), None, camids)
    style = StyleFiles(tmp_path, (1, 2, 3), True)
    for level, name in enumerate(style.all_names(images.paths, camids)):
        write_image(tmp_path / name, (10 * level, 20, 30), size=(16, 32))
    train = TrainImages(images, CONFIG, style=style, seed=0, packs=Packs(tmp_path / "packs", mode="auto"))
    for epoch in (0, 1):
        train.set_epoch(epoch)
        ids = np.array([6, 2, 5, 0])
        expected = torch.stack([train[index][0] for index in ids.tolist()])
        # a level is 0.0175; a few pixels differ by a level or two
        assert (train.batch(ids, CPU) - expected).abs().mean() < 2e-4
    assert not torch.equal(train.batch(ids, CPU), expected)


def test_batches_built_on_the_device_equal_those_of_the_loader(tmp_path: Path) -> None:
    images = ImageSet(write_noise(tmp_path / "a", 7), None, None)
    packs = Packs(tmp_path / "packs", mode="auto")
    batched = CONFIG.model_copy(update={"augment": "batch"})
    batches = [[3, 1, 4], [0], [6, 5]]
    loaded = image_batches(PlainImages(images.paths, CONFIG), batches, num_workers=0, device=CPU)
    made = image_batches(PlainImages(images.paths, batched, packs=packs), batches, num_workers=0, device=CPU)
    for one, other, ids in zip(loaded, made, batches, strict=True):
        assert len(one) == len(ids)
        assert torch.equal(one, other)


def test_camstyle_images_are_packed_with_the_originals(tmp_path: Path) -> None:
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
    paths, folder = write_noise(tmp_path / "a", 7), tmp_path / "packs"

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


@pytest.mark.parametrize("stop", [OSError(errno.ENOSPC, "no space"), KeyboardInterrupt()])
@pytest.mark.parametrize("place", ["decode", "fsync", "replace"])
def test_a_pack_that_is_interrupted_or_fills_the_disk_leaves_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stop: BaseException,
    place: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    paths, folder = write_noise(tmp_path / "a", 7), tmp_path / "packs"
    function, num_calls = getattr(cache if place == "decode" else os, place), iter(range(100))

    def fail(*arguments: Any) -> Any:
        if place != "decode" or next(num_calls) == 5:
            raise stop
        return function(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(cache if place == "decode" else os, place, fail)
        with nullcontext() if isinstance(stop, OSError) else pytest.raises(KeyboardInterrupt):
            assert Packs(folder, mode="auto").open(paths, **SIZE, purpose="test") is None
            assert "images are decoded in every epoch: no space" in caplog.text
    assert sorted(path.suffix for path in folder.iterdir()) == [".TAG", ".lock"]
    assert_holds(open_pack(folder, paths), paths)
    assert sorted(path.suffix for path in folder.iterdir()) == [".TAG", ".json", ".lock", ".npy"]


def test_what_a_killed_process_left_is_replaced_though_it_fills_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, folder = write_noise(tmp_path / "a", 7), tmp_path / "packs"
    monkeypatch.setattr(cache, "digest_files", lambda *_: "key")
    folder.mkdir()
    (folder / "images-key.part").write_bytes(bytes(20_000))

    def disk_usage(folder: Path) -> SimpleNamespace:
        used = sum(path.stat().st_size for path in folder.iterdir())
        return SimpleNamespace(free=cache.SPARE_BYTES + 20_000 - used)

    # 7 images of 32 x 16 x 3 are 10,752 bytes
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert_holds(open_pack(folder, paths), paths)
    assert not (folder / "images-key.part").exists()


@pytest.mark.parametrize("harm", ["flip", "cut", "sums"])
def test_a_damaged_pack_is_rebuilt(tmp_path: Path, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    paths, folder = write_noise(tmp_path / "a", 7), tmp_path / "packs"
    open_pack(folder, paths)
    file = folder / packs_of(folder)[0]
    content = bytearray(file.read_bytes())
    if harm == "flip":
        content[-1] ^= 1
        file.write_bytes(content)
    elif harm == "cut":
        file.write_bytes(content[:-5])
    else:
        file.with_suffix(".json").write_text("{")
    assert_holds(open_pack(folder, paths), paths)
    assert "damaged" in caplog.text


def test_without_a_pack_files_are_decoded(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = write_noise(tmp_path / "a", 7)
    images = ImageSet(paths, None, None)
    expected = PlainImages(images.paths, CONFIG)[2][0]
    (tmp_path / "file").write_text("")
    for packs in (Packs(tmp_path / "file" / "packs", mode="auto"), Packs(tmp_path / "packs", mode="none")):
        found = PlainImages(images.paths, CONFIG, packs=packs)
        assert found.pack is None
        assert torch.equal(found[2][0], expected)
    assert caplog.text.count("images are decoded in every epoch") == 1


def test_a_pack_larger_than_half_the_memory_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    paths = write_noise(tmp_path / "a", 7)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 5, "SC_PAGE_SIZE": 4096}[name])
    caplog.set_level(logging.INFO, logger="mprd")
    # 7 images of 32 x 16 x 3 are 10,752 bytes, half of the memory 10,240
    assert Packs(tmp_path / "packs", mode="auto").open(paths, **SIZE, purpose="test") is None
    assert "more than half of the memory" in caplog.text
