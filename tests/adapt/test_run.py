"""A network under other cameras has the statistics of their images, and commands take its folder as a run."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from mprd import load_model
from mprd.adapt.cli import app
from mprd.adapt.run import adapt_run
from mprd.config.loading import load_config
from mprd.evaluate.run import evaluate_run
from mprd.extract.run import extract_run
from mprd.feature_file import open_features
from mprd.runs.folder import RunFolder
from mprd.train.cli import app as train
from tests.test_cameras_at_use import files

NAMES = r"(?P<camid>north|south)/(?P<pid>\d+)_"


@pytest.fixture
def dark_root(tiny_root: Path, tmp_path: Path) -> Path:
    """Copy the images to cameras with names, `north` and `south`, at a third of the brightness."""
    from PIL import Image

    for split, new in (("bounding_box_train", "train"), ("query", "query"), ("bounding_box_test", "gallery")):
        for file in files(tiny_root, split):
            camera = "north" if "_c1" in file.name else "south"
            copy = tmp_path / "dark" / new / camera / file.name.replace("_c1s1", "").replace("_c2s1", "")
            copy.parent.mkdir(parents=True, exist_ok=True)
            Image.open(file).point(lambda value: value // 3).save(copy, quality=95)
    return tmp_path / "dark"


def test_its_own_cameras_give_the_statistics_that_training_left(
    camera_run: Path, tiny_root: Path, tmp_path: Path
) -> None:
    adapt_run(RunFolder(camera_run), tiny_root, RunFolder(tmp_path / "same"))
    old, new = (load_model(path, device="cpu") for path in (camera_run, tmp_path / "same"))
    assert new.camera_numbers == old.camera_numbers
    saved, found = old.backbone.state_dict(), new.backbone.state_dict()
    assert sum("camera_moments" in name for name in found) > 5
    for name, tensor in saved.items():
        if "num_batches_tracked" not in name:
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-4)


def test_other_cameras_have_the_statistics_of_their_images(camera_run: Path, dark_root: Path, tmp_path: Path) -> None:
    told = adapt_run(RunFolder(camera_run), dark_root, RunFolder(tmp_path / "new"), name_pattern=NAMES)
    assert told.endswith("by_camera for the cameras north, south")
    old, new = (load_model(path, device="cpu") for path in (camera_run, tmp_path / "new"))
    assert new.camera_words == ("north", "south")
    # the first batch norm sees the convolved pixels
    norm = next(part for part in new.backbone.modules() if hasattr(part, "camera_moments"))
    maps: list[torch.Tensor] = []
    norm.register_forward_pre_hook(lambda _norm, inputs: maps.append(inputs[0].double()))
    shots = [sorted((dark_root / "train" / camera).iterdir()) for camera in ("north", "south")]
    for paths in (*shots, [*shots[0], *shots[1]]):
        new.extract(paths)
    moments = torch.stack([torch.stack([m.mean((0, 2, 3)), m.var((0, 2, 3))]) for m in maps])
    share = len(shots[0]) / (len(shots[0]) + 10)
    # each batch norm's statistics are the mean over batches of 8, here of images of one kind
    wanted = share * moments[:2, 0] + (1 - share) * moments[2, 0]
    torch.testing.assert_close(norm.camera_moments[:2, 0].double(), wanted, atol=1e-3, rtol=1e-2)
    assert (norm.camera_moments[2, 0].double() - moments[2, 0]).abs().max() < 1e-3
    # weights and whitening are those of the run
    assert torch.equal(new.need_whitening().matrix, old.need_whitening().matrix)


def test_commands_take_the_new_run(camera_run: Path, dark_root: Path, tmp_path: Path) -> None:
    new = tmp_path / "new"
    adapt_run(RunFolder(camera_run), dark_root, RunFolder(new), name_pattern=NAMES)
    row = evaluate_run(RunFolder(new), data=None, best=False, whitens=True)
    assert 0 < row["mAP_whitened"] <= 1
    extract_run(new, str(dark_root / "query"), tmp_path / "f.parquet", device="cpu")
    (rows,) = open_features(tmp_path / "f.parquet").batches()
    assert rows.camids == [1] * 4 + [2] * 4
    model = load_model(new, device="cpu")
    np.testing.assert_allclose(rows.features, model.extract(rows.paths, cameras=rows.camids), atol=1e-6)


def test_the_gallery_serves_where_there_are_no_training_images(
    camera_run: Path, dark_root: Path, tmp_path: Path
) -> None:
    shutil.rmtree(dark_root / "train")
    # without pictures of the south a camera takes the statistics of all
    for file in sorted((dark_root / "gallery" / "south").iterdir())[1:]:
        file.unlink()
    adapt_run(RunFolder(camera_run), dark_root, RunFolder(tmp_path / "new"), name_pattern=NAMES)
    moments = load_model(tmp_path / "new", device="cpu").backbone.state_dict()
    found = next(tensor for name, tensor in moments.items() if name.endswith("camera_moments"))
    torch.testing.assert_close(found[1], found[2])
    assert (found[0] - found[2]).abs().max() > 1e-4


def test_what_cannot_be_adapted_is_refused(
    camera_run: Path,
    trained_run: Path,
    tiny_root: Path,
    nameless_root: Path,
    tmp_path: Path,
    refuse: Callable[..., str],
) -> None:
    new = ("--out", tmp_path / "new")
    config = load_config("demo", overrides=("backbone.camera_bn=false",), values={"data": {"root": tiny_root}})
    RunFolder(tmp_path / "plain").create(config)
    assert "plain: has no statistics of cameras, which backbone.camera_bn=true" in refuse(
        app, tmp_path / "plain", tiny_root, *new
    )
    assert "crops: no cameras in the names of its images; --name-pattern says" in refuse(
        app, camera_run, nameless_root, *new
    )
    (tmp_path / "one").mkdir()
    shutil.copy(files(tiny_root)[0], tmp_path / "one")
    line = refuse(app, camera_run, tmp_path / "one", *new)
    assert line.endswith("one: statistics need at least 2 images, but there are 1")
    (tmp_path / "one" / files(tiny_root)[1].name).write_bytes(b"no image")
    assert refuse(app, camera_run, tmp_path / "one", *new).endswith("(move such files away)")
    assert not (tmp_path / "new").exists()
    assert refuse(app, camera_run, tiny_root, "--out", trained_run).endswith("holds a run already; change --out")
    adapt_run(RunFolder(camera_run), tiny_root, RunFolder(tmp_path / "new"))
    line = refuse(train, "--resume", tmp_path / "new", "--launcher", "local")
    assert line.endswith("last.pt: the checkpoint has no memory, so it is not one of a training run of mprd")
