"""Studies on a cluster that grows from nothing, and trials whose processes are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.parallel.autoscaling import growing_cluster

from .conftest import overrides, read_trials, states

pytestmark = pytest.mark.ray
LIMIT = 15
"""Seconds of a stop on a busy machine; a quiet one takes fewer than five."""
IMPATIENT = "from mprd.parallel import resources; resources.ASK_SECONDS = 3; import mprd.tune.__main__"
"""`python -m mprd.tune` that soon gives up on an autoscaler."""


@pytest.fixture(scope="module")
def growing() -> Iterator[str]:
    """Start a head without CPUs, whose autoscaler may start a CPU machine and two with a GPU."""
    machines = {"cpu": ({"CPU": 1}, 1), "gpu": ({"CPU": 1, "GPU": 1}, 2)}
    # of a short path, for Ray's sockets
    with tempfile.TemporaryDirectory() as folder, growing_cluster(Path(folder), **machines) as address:
        yield address


def start(command: str, root: Path, out: Path, *args: str, sets: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    given = ["--preset", "demo", "--data", str(root), "--out", str(out), "--launcher", "ray", *args]
    given += [text for override in overrides(*sets) for text in ("--set", override)]
    code = ["-c", IMPATIENT] if command == "impatient tune" else ["-m", f"mprd.{command}"]
    line = [sys.executable, *code, *given]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def training(out: Path) -> list[Path]:
    """Return the run folders of the trials that have rows and have not ended."""
    if not (out / "trials.json").exists():
        return []
    folders = sorted(out.glob("trials/*"))
    return [folder for folder, state in zip(folders, states(out), strict=False) if state == "running" and rows(folder)]


def rows(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def test_a_run_asks_for_a_machine_and_waits_for_it(growing: str, tiny_root: Path, tmp_path: Path) -> None:
    process = start("train", tiny_root, tmp_path / "run", "--address", growing, sets=("train.device=cpu",))
    output = process.communicate(timeout=400)[0]
    assert process.returncode == 0, output
    assert "no machine has 1 CPU: the autoscaler starts 1 " in output
    assert rows(tmp_path / "run") == 1


def test_a_study_asks_for_gpus_and_grows_with_them(growing: str, tiny_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    process = start("tune", tiny_root, out, "--study", "small", "--address", growing, sets=("train.epochs=3",))
    most, until = 0, time.monotonic() + 500
    while process.poll() is None:
        assert time.monotonic() < until
        most = max(most, len(training(out)))
        time.sleep(0.05)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    assert "no machine has 1 CPU and 1 GPU: the autoscaler starts 1 gpu" in output
    assert "Ray: trials with 1 CPU and 1 GPU each, " in output
    assert ", and more on machines of the autoscaler" in output
    assert states(out) == ["finished"] * 4
    assert most == 2


def test_what_no_machine_of_the_autoscaler_has_is_refused(growing: str, tiny_root: Path, tmp_path: Path) -> None:
    given = ("--study", "small", "--address", growing, "--gpus-per-trial=2")
    process = start("impatient tune", tiny_root, tmp_path / "out", *given)
    output = process.communicate(timeout=200)[0]
    assert process.returncode == 2, output
    assert "error: a trial needs 1 CPU and 2 GPUs, but Ray has room for 0" in output


def test_a_lost_trial_goes_on_and_sigterm_ends_the_study_at_once(tiny_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    slow = ("train.epochs=40", "train.checkpoint_seconds=0.001")
    process = start("tune", tiny_root, out, "--study", "small", "--concurrency", "1", sets=slow)
    wait_for(process, lambda: training(out))
    (folder,) = training(out)
    # "process PID on HOST"
    os.kill(int((folder / ".lock").read_text().split()[1]), signal.SIGKILL)
    so_far = rows(folder)
    wait_for(process, lambda: rows(folder) > so_far)
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    output = process.communicate(timeout=100)[0]
    assert time.monotonic() - sent < LIMIT, output
    assert process.returncode == 130
    assert "mu=0.3, seed 0: lost (its process on" in output
    assert "going on from the last checkpoint (1 of 3 times)" in output
    assert f"go on with --resume --out {out}" in output
    assert [trial["state"] for trial in read_trials(out)] == ["running"]


def wait_for(process: subprocess.Popen[str], is_true) -> None:  # type: ignore[no-untyped-def]
    until = time.monotonic() + 400
    while not is_true():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
