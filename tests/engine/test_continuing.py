"""A resumed run notices that its images have changed; told to go on, its rows follow the names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.data.datasets import load_dataset
from mprd.engine.continuing import move_rows
from mprd.engine.trainer import Trainer, fit
from mprd.errors import UserError
from tests.conftest import TINY, write_crop

FIRST = "0001_c1s1_000001_01.jpg"


@pytest.fixture
def root(tiny_root: Path, tmp_path: Path) -> Path:
    """Copy the tiny data set, to be changed."""
    return Path(shutil.copytree(tiny_root, tmp_path / "data"))


def config_of(root: Path, *overrides: str) -> Config:
    sets = (*TINY, "train.epochs=1", "meta.num_ids=0", "pairs.labeller=knn", *overrides)
    return load_config("demo", overrides=sets, values={"data": {"root": root}})


def trainer_of(config: Config) -> Trainer:
    return Trainer(config, load_dataset(config.data), device=torch.device("cpu"))


def test_rows_follow_their_names() -> None:
    saved = {
        "memory": torch.tensor([[0.0], [1.0], [2.0]]),
        "positives": torch.tensor([[0, 1, -1], [1, 2, 0], [2, -1, -1]]),
        "refused": torch.tensor([[2], [2], [0]]),
        "meta": None, "epoch": 4, "phase": "cnn", "step": 7, "list_features": torch.zeros(3, 1), "clusters": {},
    }  # fmt: skip
    # the first is gone, the last comes first, between them is a new one
    moved = move_rows(saved, torch.tensor([2, -1, 1]))
    assert moved["memory"].tolist() == [[2], [0], [1]]
    assert [{*row} - {-1} for row in moved["positives"].tolist()] == [{0}, {1}, {2, 0}]
    assert moved["refused"].tolist() == [[-1], [-1], [0]]
    assert (moved["epoch"], moved["phase"], moved["step"], moved["list_features"]) == (4, "gcn", 0, None)


def test_a_resumed_run_stops_where_its_images_have_changed_or_goes_on_by_their_names(root: Path) -> None:
    trainer = trainer_of(config_of(root))
    trainer.fill_memory()
    fit(trainer)
    saved, old = trainer.state_dict(), trainer.state.memory.features.clone()
    trainer_of(config_of(root)).load_state_dict(saved, path=Path("last.pt"))
    folder = root / "bounding_box_train"
    names = [path.name for path in trainer.dataset.train.paths]
    # the first becomes the last, one is gone, one is new
    (folder / FIRST).rename(folder / "0099_c1s1_000001_01.jpg")
    (folder / names[5]).unlink()
    write_crop(folder / "0050_c1s1_000001_01.jpg", 50, 1, 1)
    message = f"1 added .*0050.*, 1 gone .*{names[5]}.*, 1 renamed .*{FIRST} to .*0099.*data.on_changed=continue"
    with pytest.raises(UserError, match=message):
        trainer_of(config_of(root)).load_state_dict(saved, path=Path("last.pt"))
    again = trainer_of(config_of(root, "data.on_changed=continue", "train.epochs=2"))
    again.load_state_dict(saved, path=Path("last.pt"))
    features = again.state.memory.features
    assert torch.equal(features[-1], old[0])
    assert torch.equal(features[:4], old[1:5])
    new = [path.name for path in again.dataset.train.paths].index("0050_c1s1_000001_01.jpg")
    assert features[new].norm() == pytest.approx(1)
    fit(again)
    assert again.state.epoch == 2


def test_statistics_follow_their_cameras_through_a_resumption(root: Path) -> None:
    """Those of a camera that is gone would serve the next one."""
    sets = ("backbone.camera_bn=true", "data.on_changed=continue", "train.epochs=2")
    trainer = trainer_of(config_of(root, *sets))
    trainer.fill_memory()
    saved = trainer.state_dict()
    assert saved["camera_numbers"] == [1, 2]
    # a camera of the gallery alone changes no number of a training camera
    write_crop(root / "bounding_box_test" / "0100_c0s1_000009_01.jpg", 100, 0, 9)
    same = trainer_of(config_of(root, *sets))
    same.load_state_dict(saved, path=Path("last.pt"))
    assert same.state_dict()["camera_numbers"] == [1, 2]
    assert same.dataset.camera_numbers == (1, 2, 0)
    for file in (root / "bounding_box_train").glob("*_c1s1_*"):
        file.unlink()
    again = trainer_of(config_of(root, *sets))
    again.load_state_dict(saved, path=Path("last.pt"))
    assert again.state_dict()["camera_numbers"] == [2]
    found, before = (part.state.backbone.neck.camera_moments for part in (again, trainer))
    assert len(found) == 2
    # of the images of camera 2 alone, which were half of all
    torch.testing.assert_close(found[0], found[1])
    assert (found[0] - before[0]).abs().max() > 1e-3
    fit(again)
