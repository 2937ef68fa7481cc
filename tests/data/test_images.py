"""Images as tensors, their augmentation under any number of workers, and the loader's errors."""

from __future__ import annotations

import gc
from functools import partial
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mprd.config.schema import DataConfig
from mprd.data.camera_style import StyleFiles, check_style_files
from mprd.data.datasets import ImageSet, load_dataset
from mprd.data.decode import read_image
from mprd.data.images import PlainImages, TrainImages
from mprd.data.loaders import ImageLoader
from mprd.errors import UserError
from mprd.runs.dataset import check_dataset, check_images
from tests.trees import CAMSTYLE, ints, write_image, write_images, write_market, write_noise

CONFIG = DataConfig(height=32, width=16)


def image_set(folder: Path, count: int = 6) -> ImageSet:
    """Write images of noise, two per identity, under two cameras."""
    rows = np.arange(count)
    return ImageSet(write_noise(folder, count), pids=rows // 2 + 1000, camids=rows % 2)


def train_images(source: ImageSet, **settings: Any) -> TrainImages:
    return TrainImages(source, CONFIG, **{"style": None, "seed": 0, **settings})


def truncate(path: Path) -> None:
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1500])


def corrupt(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[60:70] = bytes(10)
    path.write_bytes(content)


def read_all(images: Any, batches: list[list[int]], *, num_workers: int) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for batch, ids in ImageLoader(images, batches, num_workers=num_workers):
        found |= dict(zip(ids.tolist(), batch, strict=True))
    return found


def test_augmentation_does_not_depend_on_workers_batches_or_global_generators(tmp_path: Path) -> None:
    images = train_images(image_set(tmp_path), seed=7)
    alone = {index: images[index][0] for index in range(6)}
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for num_workers, batches in enumerate([[[0, 1, 2], [3, 4, 5]], [[5, 1], [3, 0], [2, 4]]]):
        found = read_all(images, batches, num_workers=num_workers)
        assert all(torch.equal(found[index], alone[index]) for index in range(6))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_augmentation_is_a_function_of_epoch_seed_and_view(tmp_path: Path) -> None:
    source = image_set(tmp_path, 2)
    images = train_images(source, seed=7)
    loader = ImageLoader(images, [[0, 1]], num_workers=1)
    first = images[1][0]
    images.set_epoch(3)
    third = images[1][0]
    # an epoch set after the loader was built reaches its workers
    assert torch.equal(next(iter(loader))[0][1], third)
    images.set_epoch(0)
    assert torch.equal(images[1][0], first)
    other_seed, perturbed = train_images(source, seed=8)[1][0], train_images(source, seed=7, view="perturbed")[1][0]
    assert not any(torch.equal(first, other) for other in (third, other_seed, perturbed))


LABELS = {1000, 1001, 1002}
"""Of `image_set`."""


def holds_labels(thing: Any) -> bool:
    """Return whether any of the labels can be reached from an object, its arguments and closures included."""
    seen: dict[int, Any] = {}
    queue = [thing]
    while queue:
        thing = queue.pop()
        # kept, as another object may get the id of one that is gone
        seen[id(thing)] = thing
        if isinstance(thing, torch.Tensor | np.ndarray | np.generic):
            found = thing.tolist()
            inside = found if isinstance(found, list) else [found]
        elif isinstance(thing, FunctionType):
            # not its module, from which everything can be reached
            inside = [thing.__closure__, thing.__defaults__, thing.__kwdefaults__]
        elif isinstance(thing, type | ModuleType):
            inside = []
        else:
            inside = gc.get_referents(thing)
        if isinstance(thing, int | float) and thing in LABELS:
            return True
        queue += [part for part in inside if id(part) not in seen]
    return False


def test_labels_cannot_be_reached_from_training_images(tmp_path: Path) -> None:
    source = image_set(tmp_path)
    camids = source.camids
    assert camids is not None
    images = train_images(source, style=check_style_files(StyleFiles(tmp_path, (1, 2), True), source.paths, camids))
    assert len(images[0]) == 2
    assert not holds_labels(images)
    pids = source.pids
    assert pids is not None
    leaks: list[Any] = [source, pids, pids.tolist(), {"ids": (pids[5],)}, torch.tensor(pids), pids.astype(np.float32)]
    for leak in [*leaks, partial(max, pids), lambda: pids, source.__eq__]:
        vars(images)["leak"] = leak
        assert holds_labels(images), leak


def test_the_style_is_drawn_among_all_training_cameras(tmp_path: Path) -> None:
    # camera 1 is not among the training images, so it is not a target
    source = ImageSet((write_image(tmp_path / "a_c1.png"), write_image(tmp_path / "a_c3.png")), None, np.array([0, 2]))
    write_image(tmp_path / "a_c1_fake_1to3.jpg", (0, 0, 0))
    images = train_images(source, style=StyleFiles(tmp_path, (1, 2, 3), True))
    assert [images.read(0, camera).getpixel((0, 0)) for camera in (0, 1)] == [(128, 128, 128), (0, 0, 0)]
    num_black = 0
    for epoch in range(40):
        images.set_epoch(epoch)
        # black is below the mean gray in every channel, whatever the jitter
        num_black += bool((images[0][0][0, 16, 8] < -0.5).item())
    # half of 40; four standard deviations are 13
    assert 7 < num_black < 33


def test_plain_images_are_resized_and_normalized(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", (255, 0, 51), size=(7, 5))
    pixels, index = PlainImages([path], CONFIG)[0]
    assert index == 0
    expected = torch.tensor([(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(pixels, expected.view(3, 1, 1).expand(3, 32, 16), rtol=0, atol=1e-5)


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((128, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    pixels, _ = PlainImages([tmp_path / "a.png"], CONFIG)[0]
    # stripes one pixel wide become their mean, 127.5, away from the borders
    np.testing.assert_allclose(pixels[0, :, 3:-3].numpy() * 0.229 + 0.485, 0.5, atol=0.02)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_image_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (8, 16), (255, 255, 255)).convert(mode).save(file)
    image = read_image(file)
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))


@pytest.mark.parametrize(
    "damage", [truncate, corrupt, Path.unlink, lambda path: path.write_bytes(b""), lambda path: path.write_text("text")]
)
def test_an_unreadable_image_is_an_error_of_one_line_also_from_a_worker(tmp_path: Path, damage: Any) -> None:
    source = image_set(tmp_path, 4)
    damage(source.paths[3])
    for num_workers in (0, 1):
        with pytest.raises(UserError, match=r"^\S*3\.png: cannot read the image[^\n]*$"):
            read_all(train_images(source), [[0, 1], [2, 3]], num_workers=num_workers)


def test_files_and_decoded_images_are_prepared_as_plain_images(tmp_path: Path) -> None:
    source = image_set(tmp_path, 2)
    plain = PlainImages(source.paths, CONFIG)
    sources = [source.paths[0], Image.open(source.paths[1]), tmp_path / "gone.png"]
    images = PlainImages(sources, CONFIG, skip_bad=True)
    assert all(torch.equal(images[index][0], plain[index][0]) for index in (0, 1))
    pixels, index = images[2]
    assert (index, pixels.shape, int(pixels.count_nonzero())) == (~2, (3, 32, 16), 0)
    with pytest.raises(UserError, match=r"gone\.png: .*no such file \(remove it\)"):
        PlainImages([tmp_path / "gone.png"], CONFIG, hint="remove it")[0]


def test_unreadable_images_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = image_set(tmp_path)
    assert check_images(source) is source
    truncate(source.paths[1])
    source.paths[4].write_bytes(b"")
    kept = check_images(source)
    assert [path.name for path in kept.paths] == ["0.png", "2.png", "3.png", "5.png"]
    assert ints(kept.pids) == [1000, 1001, 1001, 1002]
    assert ints(kept.camids) == [0, 0, 1, 1]
    assert "left out 2 of 6 images that cannot be read, the first is" in caplog.text
    for path in source.paths:
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.png: cannot read this image"):
        check_images(source)


def test_all_splits_and_styles_of_a_data_set_are_checked(tmp_path: Path) -> None:
    root = write_market(tmp_path)
    style, good, bad = root / "bounding_box_train_camstyle", CAMSTYLE[0], CAMSTYLE[2]
    write_images(style, [good, bad])
    unreadable = (style / bad, root / "bounding_box_train" / "0002_c2s1_000776_01.jpg")
    for path in (*unreadable, root / "bounding_box_test" / "0000_c1s1_000151_01.jpg"):
        path.write_bytes(b"")
    data = check_dataset(load_dataset(DataConfig(dataset="market1501", root=root)))
    assert (len(data.train), len(data.query), len(data.gallery)) == (3, 1, 1)
    assert data.style_paths is not None
    assert bad in data.style_paths.missing
    assert good not in data.style_paths.missing
