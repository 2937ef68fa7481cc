"""A trained network from its run folder gives the features that evaluation ranks by."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mprd import load_model
from mprd.data.datasets import load_dataset
from mprd.errors import UserError
from mprd.evaluate.evaluation import extract_sets
from mprd.model import Model
from mprd.runtime import checkpoint


@pytest.fixture(scope="module")
def loaded(tiny_run: Path) -> Model:
    return load_model(tiny_run, device="cpu")


@pytest.fixture(scope="module")
def paths(tiny_root: Path) -> list[Path]:
    return sorted((tiny_root / "bounding_box_train").iterdir())


def test_features_are_those_of_evaluation_to_the_bit(loaded: Model, tmp_path: Path) -> None:
    config = loaded.config.model_copy(update={"eval": loaded.config.eval.model_copy(update={"batch_size": 5})})
    dataset = load_dataset(config.data)
    (after, _), _ = extract_sets(loaded.backbone, dataset, config, device=torch.device("cpu"))
    assert np.array_equal(loaded.extract(dataset.query.paths, batch_size=5), after.numpy())


def test_features_depend_on_neither_batch_size_nor_decoders_nor_the_kind_of_input(
    loaded: Model, paths: list[Path]
) -> None:
    features = loaded.extract(paths)
    assert features.shape == (24, 256)
    assert np.abs(np.linalg.norm(features, axis=1) - 1).max() < 1e-6
    assert np.abs(loaded.extract(paths, batch_size=1) - features).max() < 1e-5
    assert np.array_equal(loaded.extract(paths, num_workers=2), features)
    assert np.array_equal(loaded.extract([Image.open(path) for path in paths]), features)
    assert loaded.extract([]).shape == (0, 256)


@pytest.mark.parametrize("cameras", [[1, 2], [1, 2, 1, 2]])
def test_cameras_are_of_each_image(cameras: list[int], loaded: Model, paths: list[Path]) -> None:
    with pytest.raises(UserError, match=f"one of each of the 3 images, but are {len(cameras)}"):
        loaded.extract(paths[:3], cameras=cameras)


def test_a_camera_s_name_is_no_number(loaded: Model, paths: list[Path]) -> None:
    with pytest.raises(UserError, match="cameras must be numbers or None, but got 'door'"):
        loaded.extract(paths[:1], cameras=["door"])  # type: ignore[list-item]


def test_an_unreadable_file_is_named(loaded: Model, paths: list[Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jpg: cannot read the image: no such file$"):
        loaded.extract([paths[0], tmp_path / "absent.jpg"])


def test_best_loads_the_best_checkpoint(tiny_run: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(tiny_run, tmp_path / "run"))
    state = checkpoint.load(run / "checkpoints" / "best.pt")
    state["backbone"]["neck.weight"] *= 2
    checkpoint.save(state, run / "checkpoints" / "best.pt")
    last, best = load_model(run, device="cpu"), load_model(run, device="cpu", best=True)
    assert torch.equal(2 * last.backbone.neck.weight, best.backbone.neck.weight)
    assert last.name == best.name == "run"
    assert last.fingerprint != best.fingerprint
    assert last.fingerprint == load_model(tiny_run, device="cpu").fingerprint


def test_a_wrong_folder_or_device_is_refused(tiny_run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not a run folder"):
        load_model(tmp_path)
    with pytest.raises(UserError, match="device must be auto, cpu, cuda or cuda:N, but got 'gpu'"):
        load_model(tiny_run, device="gpu")


def test_importing_mprd_imports_no_torch() -> None:
    code = "import sys, mprd; assert not {'torch', 'numpy', 'pydantic'} & set(sys.modules); mprd.nothing"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "AttributeError: module 'mprd' has no attribute 'nothing'" in done.stderr
