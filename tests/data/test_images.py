from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from mprd.config.schema import DataConfig
from mprd.data.camera_style import CameraColors, StyleFiles
from mprd.data.datasets import ImageSet, ReidDataset, load_dataset
from mprd.data.decode import read_image
from mprd.data.images import PlainImages, TrainImages, check_dataset, check_images, make_loader
from mprd.errors import UserError
from mprd.runtime.device import num_cores
from tests.trees import ints, write_image, write_images, write_market

CONFIG = DataConfig(height=32, width=16)


def image_set(folder: Path, count: int = 6) -> ImageSet:
    """Write images of noise under two cameras, two to an identity."""
    random = np.random.default_rng(0)
    folder.mkdir(exist_ok=True)
    paths = tuple(folder / f"{index}.png" for index in range(count))
    for path in paths:
        Image.fromarray(random.integers(0, 256, (32, 16, 3), dtype=np.uint8)).save(path)
    rows = np.arange(count)
    return ImageSet(paths, pids=rows // 2 + 1000, camids=rows % 2)


def break_image(path: Path) -> Path:
    """Cut an image's file in the middle."""
    Image.effect_noise((64, 64), 50).convert("RGB").save(path, format="JPEG")
    path.write_bytes(path.read_bytes()[:1500])
    return path


def read_all(images: Any, batches: list[list[int]], *, num_workers: int) -> dict[int, torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    for batch, ids in make_loader(images, batches, num_workers=num_workers):
        found |= dict(zip(ids.tolist(), batch, strict=True))
    return found


def test_a_loader_yields_exactly_the_batches_it_is_given(tmp_path: Path) -> None:
    images = PlainImages(image_set(tmp_path), CONFIG)
    batches = [[5, 0, 3], [1], [0, 0]]
    for num_workers in (0, 1, 2):
        loader = make_loader(images, batches, num_workers=num_workers)
        found = [(tuple(batch.shape), ids.tolist()) for batch, ids in loader]
        assert len(loader) == 3
        assert found == [((3, 3, 32, 16), [5, 0, 3]), ((1, 3, 32, 16), [1]), ((2, 3, 32, 16), [0, 0])]


def test_a_batch_is_float32_and_its_ids_are_int64(tmp_path: Path) -> None:
    source = image_set(tmp_path)
    for images in (TrainImages(source, CONFIG, style=None, seed=0), PlainImages(source, CONFIG)):
        batch, ids = next(iter(make_loader(images, [np.array([2, 1])], num_workers=0)))  # type: ignore[list-item]
        assert (batch.dtype, ids.dtype) == (torch.float32, torch.int64)


def test_no_batches_yield_nothing(tmp_path: Path) -> None:
    assert list(make_loader(PlainImages(image_set(tmp_path, 1), CONFIG), [], num_workers=2)) == []


def test_no_more_processes_load_than_there_are_cores(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    images = PlainImages(image_set(tmp_path, 1), CONFIG)
    batches = [[0]] * (num_cores() + 4)
    assert make_loader(images, batches, num_workers=num_cores() + 3).loader.num_workers == num_cores()
    assert make_loader(images, batches[:1], num_workers=num_cores() + 3).loader.num_workers == 1
    # torch would tell of more
    assert not recwarn.list


def test_augmentation_does_not_depend_on_workers_or_batches(tmp_path: Path) -> None:
    images = TrainImages(image_set(tmp_path), CONFIG, style=None, seed=7)
    alone = {index: images[index][0] for index in range(6)}
    orders = [[[0, 1, 2], [3, 4, 5]], [[5, 1], [3, 0], [2, 4]], [[4], [5, 3, 2, 1, 0]]]
    for num_workers, batches in enumerate(orders):
        found = read_all(images, batches, num_workers=num_workers)
        assert all(torch.equal(found[index], alone[index]) for index in range(6))


def test_augmentation_changes_with_the_epoch_the_seed_and_the_view_and_comes_back(tmp_path: Path) -> None:
    source = image_set(tmp_path, 1)
    images = TrainImages(source, CONFIG, style=None, seed=7)
    first = images[0][0]
    images.set_epoch(3)
    third = images[0][0]
    images.set_epoch(0)
    assert torch.equal(images[0][0], first)
    other_seed = TrainImages(source, CONFIG, style=None, seed=8)[0][0]
    perturbed = TrainImages(source, CONFIG, style=None, seed=7, view="perturbed")[0][0]
    assert not any(torch.equal(first, other) for other in (third, other_seed, perturbed))


def test_an_epoch_set_after_the_loader_was_made_reaches_its_workers(tmp_path: Path) -> None:
    images = TrainImages(image_set(tmp_path, 2), CONFIG, style=None, seed=0)
    loader = make_loader(images, [[0, 1]], num_workers=1)
    images.set_epoch(5)
    batch, _ = next(iter(loader))
    assert torch.equal(batch[1], images[1][0])


def test_an_unknown_view_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="but got 'test'"):
        TrainImages(image_set(tmp_path, 1), CONFIG, style=None, seed=0, view="test")  # type: ignore[arg-type]


def test_loading_leaves_the_global_generators_alone(tmp_path: Path) -> None:
    images = TrainImages(image_set(tmp_path), CONFIG, style=None, seed=0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    for num_workers in (0, 1):
        read_all(images, [[0, 1], [2, 3]], num_workers=num_workers)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)


def test_labels_cannot_be_reached_from_training_images(tmp_path: Path) -> None:
    source = image_set(tmp_path)
    colours = CameraColors(np.ones((2, 3)), np.ones((2, 3)))
    images = TrainImages(source, CONFIG, style=colours, seed=0)
    seen: set[int] = set()
    queue: list[Any] = [vars(images)]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or isinstance(thing, type) or callable(thing):
            continue
        seen.add(id(thing))
        assert thing is not source
        assert thing is not source.pids
        if isinstance(thing, np.ndarray):
            assert not np.intersect1d(thing, [1000, 1001, 1002]).size
        queue += gc.get_referents(thing)
    assert len(images[0]) == 2


def test_the_style_camera_is_drawn_among_all_training_cameras(tmp_path: Path) -> None:
    # camera 1 is not among the training images, so nothing is shown under it
    source = ImageSet((write_image(tmp_path / "a_c1.png"), write_image(tmp_path / "a_c3.png")), None, np.array([0, 2]))
    style = StyleFiles(tmp_path, (1, 2, 3), True)
    write_image(tmp_path / "a_c1_fake_1to3.jpg", (0, 0, 0))
    images = TrainImages(source, CONFIG, style=style, seed=0)
    shown = [images.read(0, camera).getpixel((0, 0)) for camera in (0, 1)]
    assert shown == [(128, 128, 128), (0, 0, 0)]
    epochs = []
    for epoch in range(40):
        images.set_epoch(epoch)
        # black pixels lie below the mean gray in every channel whatever the jitter
        epochs.append(bool((images[0][0][0, 16, 8] < -0.5).item()))
    # half of 40; four standard deviations are 13
    assert 7 < sum(epochs) < 33


def test_colours_are_carried_from_the_own_camera_to_the_drawn_one(tmp_path: Path) -> None:
    source = ImageSet((write_image(tmp_path / "a.png", (110, 110, 110)),) * 2, None, np.array([0, 1]))
    colours = CameraColors(np.array([[100.0] * 3, [50.0] * 3]), np.array([[10.0] * 3, [20.0] * 3]))
    images = TrainImages(source, CONFIG, style=colours, seed=0)
    assert [images.read(0, camera).getpixel((0, 0)) for camera in (0, 1)] == [(110,) * 3, (70,) * 3]


def test_without_a_style_the_original_is_shown(tmp_path: Path) -> None:
    images = TrainImages(image_set(tmp_path, 1), CONFIG, style=None, seed=0)
    assert images.read(0, 0).tobytes() == read_image(images.paths[0]).tobytes()


def test_plain_images_are_resized_and_normalized(tmp_path: Path) -> None:
    path = write_image(tmp_path / "a.png", (255, 0, 51), size=(7, 5))
    pixels, index = PlainImages(ImageSet((path,), None, None), CONFIG)[0]
    assert index == 0
    assert pixels.shape == (3, 32, 16)
    expected = torch.tensor([(1 - 0.485) / 0.229, (0 - 0.456) / 0.224, (0.2 - 0.406) / 0.225])
    torch.testing.assert_close(pixels, expected.view(3, 1, 1).expand(3, 32, 16), rtol=0, atol=1e-5)


def test_shrinking_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((128, 64), dtype=np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    pixels, _ = PlainImages(ImageSet((tmp_path / "a.png",), None, None), CONFIG)[0]
    # stripes one pixel wide become their mean, 127.5, away from the borders
    np.testing.assert_allclose(pixels[0, :, 3:-3].numpy() * 0.229 + 0.485, 0.5, atol=0.02)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1", "LA"])
def test_every_kind_of_picture_becomes_rgb(tmp_path: Path, mode: str) -> None:
    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    Image.new("RGB", (8, 16), (255, 255, 255)).convert(mode).save(file)
    image = read_image(file)
    assert (image.mode, image.getpixel((0, 0))) == ("RGB", (255, 255, 255))


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "missing"])
def test_a_bad_image_is_one_line_that_names_it_also_from_a_worker(tmp_path: Path, kind: str, num_workers: int) -> None:
    source = image_set(tmp_path)
    bad = source.paths[3]
    if kind == "truncated":
        break_image(bad)
    elif kind == "missing":
        bad.unlink()
    else:
        bad.write_bytes(b"" if kind == "empty" else b"not an image")
    images = TrainImages(source, CONFIG, style=None, seed=0)
    with pytest.raises(UserError) as caught:
        read_all(images, [[0, 1], [2, 3], [4, 5]], num_workers=num_workers)
    message = str(caught.value)
    assert message.startswith(f"{bad}: cannot read the image")
    assert "\n" not in message


def test_a_broken_png_is_an_error_of_the_person(tmp_path: Path) -> None:
    path = image_set(tmp_path, 1).paths[0]
    content = bytearray(path.read_bytes())
    content[60:70] = bytes(10)
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot read the image"):
        read_image(path)


def test_bad_images_are_left_out_up_front_with_their_count(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = image_set(tmp_path)
    break_image(source.paths[1])
    source.paths[4].write_bytes(b"")
    kept = check_images(source)
    assert [path.name for path in kept.paths] == ["0.png", "2.png", "3.png", "5.png"]
    assert ints(kept.pids) == [1000, 1001, 1001, 1002]
    assert ints(kept.camids) == [0, 0, 1, 1]
    assert "left out 2 of 6 images that cannot be read" in caplog.text
    assert "1.png" in caplog.text


def test_good_images_are_all_kept(tmp_path: Path) -> None:
    source = image_set(tmp_path)
    assert check_images(source) is source
    empty = ImageSet((), None, None)
    assert check_images(empty) is empty


def test_a_set_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    source = image_set(tmp_path, 1)
    source.paths[0].write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.png: cannot read this image"):
        check_images(source)


def test_a_data_set_is_checked_in_all_its_splits_and_styles(tmp_path: Path) -> None:
    root = write_market(tmp_path)
    good, bad = "0002_c1s1_000451_03_fake_1to2.jpg", "0007_c1s3_000102_01_fake_1to2.jpg"
    write_images(root / "bounding_box_train_camstyle", [good, bad])
    (root / "bounding_box_train_camstyle" / bad).write_bytes(b"")
    (root / "bounding_box_train" / "0002_c2s1_000776_01.jpg").write_bytes(b"")
    (root / "bounding_box_test" / "0000_c1s1_000151_01.jpg").write_bytes(b"")
    data: ReidDataset = check_dataset(load_dataset(DataConfig(dataset="market1501", root=root), cache_dir=tmp_path))
    assert (len(data.train), len(data.query), len(data.gallery)) == (3, 1, 1)
    assert data.style_paths is not None
    assert bad in data.style_paths.missing
    assert good not in data.style_paths.missing
