from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from mprd.config.loading import build_config
from mprd.config.schema import Config
from mprd.errors import UserError
from mprd.runs.folder import RunFolder
from mprd.runtime import checkpoint
from mprd.train.local import run_local
from tests.extract.test_run import extract

from .conftest import wait_for_cpus

pytest.importorskip("ray")
from mprd.parallel.ray_actors import check_budget

pytestmark = pytest.mark.ray


def test_too_few_cpus_are_an_error_with_the_number_that_ray_needs(cluster: None) -> None:
    for num_actors, num_workers in ((4, 1), (2, 2)):
        words = rf"^setting: {num_workers} x {num_actors} actors .* need 4, but Ray has 3.*--num-cpus 4"
        with pytest.raises(UserError, match=words):
            check_budget(num_actors, setting="setting", num_workers=num_workers)


def test_a_run_with_actors_ends_as_one_without_to_the_bit(cluster: None, tiny_config: Config, tmp_path: Path) -> None:
    final = []
    for executor in ("serial", "ray"):
        values = tiny_config.model_dump(mode="json")
        values["subgraphs"] = {"executor": executor, "num_actors": 1}
        values["pairs"]["refresh"] = "epoch"
        values["train"]["epochs"] = 1
        folder = RunFolder(tmp_path / executor)
        rows = run_local(build_config(values), folder, resume=False, console=Console(file=io.StringIO()))
        state = checkpoint.load(folder.last)
        losses = torch.tensor([[row["gcn_loss"], row["cnn_loss"]] for row in rows])
        final.append([losses, state["memory"], state["positives"], *state["gcn"].values()])
        wait_for_cpus()
    assert all(torch.equal(one, other) for one, other in zip(*final, strict=True))


def test_actors_write_the_file_that_one_process_writes(
    cluster: None, tiny_run: Path, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # parts of two batches
    monkeypatch.setattr("mprd.extract.parts.PART_IMAGES", 6)
    crops = Path(shutil.copytree(tiny_root / "bounding_box_train", tmp_path / "crops"))
    broken = sorted(crops.iterdir())[14]
    broken.write_bytes(b"")
    serial = extract(tiny_run, crops, tmp_path / "serial.parquet", batch_size=3, skip_bad=True)
    out = tmp_path / "ray.parquet"
    with pytest.raises(UserError, match=f"{broken}: cannot read the image"):
        extract(tiny_run, crops, out, batch_size=3, num_workers=2)
    assert not out.exists()
    actors = extract(tiny_run, crops, out, batch_size=3, num_workers=2, skip_bad=True)
    assert len(actors.paths) == 23
    assert actors[:3] == serial[:3]
    assert np.array_equal(actors.features, serial.features)
    with pytest.raises(UserError, match=r"--num-workers: .* actors"):
        extract(tiny_run, crops, tmp_path / "many.parquet", num_workers=999)
