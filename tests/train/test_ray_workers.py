"""Training through Ray: the bits of a run in one process, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mprd.errors import UserError
from mprd.runtime import checkpoint
from mprd.train.cli import launch
from mprd.train.mailbox import Mailbox
from tests.engine.test_workers import CALM

from .test_cli import SLOW, arguments, one_thread, settings, without_times

# -- without a cluster ----------------------------------------------------------------------------


def test_messages_are_read_once_and_in_order(tmp_path: Path) -> None:
    writer, reader = Mailbox(tmp_path), Mailbox(tmp_path)
    assert reader.read() == []
    writer.open()
    writer.post("step", step=1)
    writer.post("epoch", row={"mAP": None})
    assert reader.read() == [{"kind": "step", "step": 1}, {"kind": "epoch", "row": {"mAP": None}}]
    with writer.messages.open("a") as file:
        file.write('{"kind": "log", ')
    assert reader.read() == []
    with writer.messages.open("a") as file:
        file.write('"text": "whole now"}\n')
    assert reader.read() == [{"kind": "log", "text": "whole now"}]


def test_a_stop_request_and_the_first_error_stay_in_the_mailbox(tmp_path: Path) -> None:
    writer, reader = Mailbox(tmp_path), Mailbox(tmp_path)
    writer.open()
    assert (reader.stop, reader.error) == (False, None)
    reader.request_stop()
    writer.fail("no such file: x")
    writer.fail("another")
    assert (writer.stop, reader.error) == (True, "no such file: x")
    writer.open()
    assert (reader.stop, reader.error) == (False, None)


@pytest.mark.parametrize(
    ("device", "num_workers", "resources", "message"),
    [
        ("cpu", 0, {"CPU": 2}, "--num-workers must be at least 1, but got 0"),
        ("cpu", 3, {"CPU": 2}, r"needs 3 logical CPUs, but Ray has 2: ask for --num-workers 2, or .* --num-cpus 3"),
        ("auto", 2, {"CPU": 8, "GPU": 1}, r"needs 2 GPUs, but Ray has 1: ask for --num-workers 1"),
        ("cuda", 1, {"CPU": 8}, r"needs 1 GPUs, but Ray has 0: .* train\.device=cpu"),
        ("cuda:1", 1, {"CPU": 8, "GPU": 2}, r"train\.device: Ray chooses each worker's GPU"),
    ],
)
def test_too_few_resources_are_told_with_the_number_to_ask_for(
    device: str, num_workers: int, resources: dict[str, float], message: str
) -> None:
    from mprd.train.ray_workers import choose_scaling

    with pytest.raises(UserError, match=message):
        choose_scaling(device, num_workers, resources)


def test_actors_beside_the_workers_count() -> None:
    from mprd.train.ray_workers import choose_scaling

    assert choose_scaling("cpu", 2, {"CPU": 6}, num_actors=2).num_workers == 2
    wanted = r"2 with 2 actors each needs 6 logical CPUs, but Ray has 5: ask for --num-workers 1, or"
    with pytest.raises(UserError, match=wanted):
        choose_scaling("cpu", 2, {"CPU": 5}, num_actors=2)


def test_workers_are_not_asked_of_one_process(tiny_root: Path) -> None:
    with pytest.raises(UserError, match="--num-workers and --address are Ray's: give --launcher ray"):
        launch(
            settings(tiny_root),
            out=Path("never"),
            resume=None,
            launcher="local",
            on_ray={"num_workers": 2, "address": None},
        )


def test_a_worker_has_a_gpu_where_there_is_one() -> None:
    from mprd.train.ray_workers import choose_scaling

    assert choose_scaling("auto", 1, {"CPU": 8, "GPU": 1}).use_gpu is True
    assert choose_scaling("cpu", 1, {"CPU": 8, "GPU": 1}).use_gpu is False
    assert choose_scaling("auto", 2, {"CPU": 2}).use_gpu is False


def test_out_of_memory_names_the_settings_that_help(tiny_config) -> None:  # type: ignore[no-untyped-def]
    from mprd.train.local import explained_memory

    with pytest.raises(UserError, match=r"out of memory .* train\.batch_size \(now 8\), data\.height"):  # noqa: SIM117
        with explained_memory(tiny_config):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")


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


def num_rows(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def first_worker(run: Path) -> int:
    """Return the process that the first worker last said it was."""
    lines = (run / ".live" / "messages.jsonl").read_text().splitlines()
    return [json.loads(line)["pid"] for line in lines if '"started"' in line][-1]


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


@pytest.fixture(scope="module")
def undisturbed(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in this process, undisturbed."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    launch(settings(tiny_root, *SLOW), out=out, resume=None, launcher="local")
    return out


@pytest.mark.ray
def test_a_run_whose_worker_was_killed_ends_in_the_bits_of_one_process(
    undisturbed: Path, tiny_root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(*arguments(tiny_root, run, *SLOW))
    wait_for(process, lambda: num_rows(run) >= 2)
    os.kill(first_worker(run), signal.SIGKILL)
    output = finish(process)
    assert "a worker was lost; going on from the last checkpoint (1 of 3 times)" in output
    assert "Result, in percent" in output
    assert_same_bits(undisturbed, run)
    assert not (run / ".live").exists()


@pytest.mark.ray
def test_a_run_that_was_stopped_and_whose_driver_was_killed_goes_on_to_the_same_bits(
    undisturbed: Path, tiny_root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    process = start(*arguments(tiny_root, run, *SLOW))
    wait_for(process, lambda: num_rows(run) >= 1)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 130, output
    assert f"go on with --resume {run}" in output.replace("\n", "")
    so_far = num_rows(run)
    assert so_far < 12
    process = start("--resume", str(run))
    wait_for(process, lambda: num_rows(run) > so_far)
    worker = first_worker(run)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 120
    while is_alive(worker):
        assert time.monotonic() < deadline, "the worker outlived its driver"
        time.sleep(0.1)
    launch(dict.fromkeys(("preset", "data", "set_", "config", "seed")), out=None, resume=run, launcher="local")
    assert_same_bits(undisturbed, run)


@pytest.mark.ray
def test_two_workers_of_which_one_was_killed_end_where_one_process_does(tiny_root: Path, tmp_path: Path) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    changes = (*CALM, "train.checkpoint_seconds=0.001")
    launch(settings(tiny_root, *changes), out=alone, resume=None, launcher="local")
    process = start(*arguments(tiny_root, run, *changes), "--num-workers", "2")
    wait_for(process, lambda: num_rows(run) >= 1)
    os.kill(first_worker(run), signal.SIGKILL)
    output = finish(process)
    assert "a worker was lost" in output
    a, b = (checkpoint.load(folder / "checkpoints" / "last.pt") for folder in (alone, run))
    torch.testing.assert_close(a["memory"], b["memory"], rtol=0, atol=1e-4)
    for one, two in zip(without_times(alone), without_times(run), strict=True):
        assert one["cnn_loss"] == pytest.approx(two["cnn_loss"], abs=1e-4)


@pytest.mark.ray
def test_a_mistake_met_by_a_worker_is_one_line_and_no_new_start(tiny_root: Path, tmp_path: Path) -> None:
    process = start(*arguments(tiny_root, tmp_path / "run", "train.lr_new=1e30"))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    assert [line for line in output.splitlines() if line.startswith("error: the CNN loss is")], output
    assert "a worker was lost" not in output
