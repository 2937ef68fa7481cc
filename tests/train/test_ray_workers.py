"""Training through Ray: the bits of a run in one process, whatever is killed on the way."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from mprd.errors import Interrupted, UserError
from mprd.runtime import checkpoint
from mprd.train.cli import launch
from mprd.train.signals import Signals

from .test_cli import SLOW, arguments, one_thread, settings, without_times

# -- without a cluster ----------------------------------------------------------------------------


def test_workers_are_not_asked_of_one_process(tiny_root: Path) -> None:
    with pytest.raises(UserError, match="--num-workers and --address are Ray's: give --launcher ray"):
        launch(
            settings(tiny_root),
            out=Path("never"),
            resume=None,
            launcher="local",
            on_ray={"num_workers": 2, "address": None},
        )


def test_out_of_memory_names_the_settings_that_help(tiny_config) -> None:  # type: ignore[no-untyped-def]
    from mprd.train.local import explained_memory

    with pytest.raises(UserError, match=r"out of memory .* train\.batch_size \(now 8\), data\.height"):  # noqa: SIM117
        with explained_memory(tiny_config):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


def test_workers_that_do_not_follow_a_stop_in_time_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mprd.train import ray_workers

    monkeypatch.setattr(ray_workers, "STEP_SECONDS", 0.5)
    signals = Signals(Console(file=io.StringIO()))
    messages = [{"kind": "started", "device": "cpu", "size": 1, "pid": 1}]
    requests: list[float] = []
    mailbox: Any = SimpleNamespace(
        taking=None,
        read=lambda seconds: [messages.pop()] if messages else [],
        request_stop=lambda: requests.append(time.monotonic()),
    )
    waiting: Any = SimpleNamespace(restart=lambda: None, check=lambda: None)
    losses: Any = None
    screen = ray_workers.Screen(signals.console, 0.0, losses, waiting, tmp_path, num_epochs=1)
    fit: Any = threading.Thread(target=time.sleep, args=(3,), daemon=True)
    threading.Timer(0.3, signals.handle, (signal.SIGTERM, None)).start()
    started = time.monotonic()
    with pytest.raises(Interrupted, match="go on from the last checkpoint with --resume"):
        ray_workers.follow(fit, mailbox, signals, screen)
    assert len(requests) == 1
    assert 0.7 < time.monotonic() - started < 2


# -- with one -------------------------------------------------------------------------------------


def start(*args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mprd.train", *args, "--launcher", "ray"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=one_thread())


def wait_for(process: subprocess.Popen[str], what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not what():
        if process.poll() is not None:
            raise AssertionError(f"the run ended too early:\n{process.communicate()[0]}")
        assert time.monotonic() < deadline
        time.sleep(0.02)


def start_and_wait(root: Path, run: Path, *args: str, changes: tuple[str, ...], rows: int) -> subprocess.Popen[str]:
    """Start a run, and wait until it has so many rows."""
    process = start(*arguments(root, run, *changes), *args)
    wait_for(process, lambda: num_rows(run) >= rows)
    return process


def num_rows(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def until(process: subprocess.Popen[str], text: str) -> str:
    """Read what a process prints up to a line with a text."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError("".join(lines))


def first_worker(process: subprocess.Popen[str]) -> int:
    """Return the process that is the next first worker by what the starting process prints."""
    return int(until(process, "(first: process ").rpartition("process ")[2].partition(")")[0])


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def finish(process: subprocess.Popen[str]) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    return output


def assert_same_bits(first: Path, second: Path) -> None:
    a, b = (checkpoint.load(run / "checkpoints" / "last.pt") for run in (first, second))
    for name, tensor in a["backbone"].items():
        assert torch.equal(tensor, b["backbone"][name]), name
    assert torch.equal(a["memory"], b["memory"])
    assert torch.equal(a["positives"], b["positives"])
    assert without_times(first) == without_times(second)


@pytest.mark.ray
def test_a_run_that_was_stopped_and_lost_its_worker_and_then_its_driver_ends_in_the_bits_of_one_process(
    tiny_root: Path, tmp_path: Path
) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    changes = (*SLOW, "train.epochs=16")
    launch(settings(tiny_root, *changes), out=alone, resume=None, launcher="local")
    process = start_and_wait(tiny_root, run, changes=changes, rows=1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert f"go on with --resume {run}" in output.replace("\n", "")
    so_far = num_rows(run)
    process = start("--resume", str(run))
    wait_for(process, lambda: num_rows(run) > so_far)
    os.kill(first_worker(process), signal.SIGKILL)
    output = until(process, "going on from the last checkpoint (1 of 3 times)")
    assert "a worker was lost (its process on machine" in output
    so_far = num_rows(run)
    wait_for(process, lambda: num_rows(run) > so_far)
    worker = first_worker(process)
    assert num_rows(run) < 16
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while is_alive(worker):
        assert time.monotonic() < deadline, "the worker outlived its driver"
        time.sleep(0.1)
    launch(dict.fromkeys(("preset", "data", "set_", "config", "seed")), out=None, resume=run, launcher="local")
    assert_same_bits(alone, run)


@pytest.mark.ray
def test_two_workers_of_which_one_was_killed_end_where_one_process_does(tiny_root: Path, tmp_path: Path) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    # in float32 batches of six images amplify rounding until a hard negative changes, in the second epoch
    changes = ("train.lr_new=0.0001", "backbone.camera_bn=false", "train.checkpoint_seconds=0.001")
    launch(settings(tiny_root, *changes), out=alone, resume=None, launcher="local")
    process = start_and_wait(tiny_root, run, "--num-workers", "2", changes=changes, rows=1)
    os.kill(first_worker(process), signal.SIGKILL)
    output = finish(process)
    assert "a worker was lost (its process on machine" in output
    assert "going on from the last checkpoint (1 of 3 times)" in output
    assert "Result, in percent" in output
    a, b = (checkpoint.load(folder / "checkpoints" / "last.pt") for folder in (alone, run))
    torch.testing.assert_close(a["memory"], b["memory"], rtol=0, atol=1e-4)
    for one, two in zip(without_times(alone), without_times(run), strict=True):
        assert one["cnn_loss"] == pytest.approx(two["cnn_loss"], abs=1e-4)
