from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mprd.config.loading import build_config
from mprd.config.schema import Config
from mprd.errors import UserError
from mprd.runs.folder import RunFolder
from mprd.runtime import checkpoint
from mprd.train.local import run_local

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
        values["train"]["epochs"] = 2
        folder = RunFolder(tmp_path / executor)
        rows = run_local(build_config(values), folder, resume=False, console=Console(file=io.StringIO()))
        state = checkpoint.load(folder.last)
        losses = torch.tensor([[row["gcn_loss"], row["cnn_loss"]] for row in rows])
        final.append([losses, state["memory"], state["positives"], *state["gcn"].values()])
        wait_for_cpus()
    assert all(torch.equal(one, other) for one, other in zip(*final, strict=True))


def test_starting_ray_leaves_the_signals_to_the_run() -> None:
    code = (
        "import signal, torch\nold = signal.signal(signal.SIGTERM, lambda *_: None)\n"
        "mine = signal.getsignal(signal.SIGTERM)\n"
        "from mprd.parallel.ray_actors import join_ray\njoin_ray(1)\nassert signal.getsignal(signal.SIGTERM) is mine\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
