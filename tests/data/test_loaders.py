"""Loaders yield what their images hold, in order, and end in one line, with all their processes, however they end."""

from __future__ import annotations

import faulthandler
import os
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mprd.config.loading import build_config
from mprd.config.nested import layered
from mprd.config.schema import Config
from mprd.data import images, loaders
from mprd.data.decode import read_image
from mprd.data.loaders import ImageLoader
from mprd.errors import UserError
from mprd.runs.folder import RunFolder
from mprd.text import new_console
from mprd.train.local import run_local
from tests.processes import forked, until

BATCHES = [[5, 0, 3], [1], [0, 0], [2, 4], [7]]


class Numbers:
    """Images that hold their own index; `fault` is called for image 4."""

    def __init__(self, fault: object = None) -> None:
        self.fault = fault
        self.shape = (3, 2, 1)

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index == 4 and callable(self.fault):
            self.fault()
        return torch.full(self.shape, float(index)), index


def refuse() -> None:
    raise UserError("four.jpg: cannot read the image")


def divide() -> None:
    raise ZeroDivisionError


def die(number: int) -> None:
    faulthandler.disable()
    os.kill(os.getpid(), number)


@pytest.fixture
def two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "num_cores", lambda: 2)


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.usefixtures("two_cores")
def test_batches_come_in_order_and_stay_what_they_are(num_workers: int) -> None:
    loader = ImageLoader(Numbers(), BATCHES, num_workers=num_workers)
    assert len(loader) == len(BATCHES)
    found = list(loader)
    assert [ids.tolist() for _, ids in found] == BATCHES
    assert [images[:, 0, 0, 0].tolist() for images, _ in found] == BATCHES
    assert {(images.dtype, ids.dtype, images.shape[1:]) for images, ids in found} == {
        (torch.float32, torch.int64, (3, 2, 1))
    }
    assert list(ImageLoader(Numbers(), [], num_workers=num_workers)) == []


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (refuse, UserError, "^four.jpg: cannot read the image$"),
        (divide, RuntimeError, "ZeroDivisionError"),
        (lambda: die(signal.SIGKILL), UserError, "SIGKILL, as happens where memory runs out.*data.num_workers"),
        (lambda: die(signal.SIGBUS), UserError, "SIGBUS.*--shm-size.*data.num_workers"),
        (lambda: os._exit(3), UserError, "exit code 3.*data.num_workers"),
    ],
)
@pytest.mark.usefixtures("two_cores")
def test_a_fault_in_a_loader_is_an_error_here(fault: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        list(ImageLoader(Numbers(fault), BATCHES, num_workers=2))
    assert children() == []


def children() -> list[str]:
    """Return the children of this process but zombies."""
    shown = subprocess.run(["ps", "-o", "stat=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [line for line in shown.stdout.splitlines() if not line.startswith("Z") and "ps -o" not in line]


@pytest.mark.usefixtures("two_cores")
def test_a_reader_that_leaves_early_leaves_no_process() -> None:
    for _images, _ids in ImageLoader(Numbers(), BATCHES, num_workers=2):
        break
    assert until(lambda: children() == [], seconds=3)


@pytest.mark.usefixtures("two_cores")
def test_without_processes_or_memory_for_them_this_process_loads(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(os, "fork", full)
    assert [ids.tolist() for _, ids in ImageLoader(Numbers(), BATCHES, num_workers=2)] == BATCHES
    assert "data.num_workers: cannot start loader processes (Resource temporarily unavailable)" in caplog.text


def read_slowly(path: Path, **options: str) -> Image.Image:
    time.sleep(0.02)
    return read_image(path, **options)


WAYS = {
    "kill the parent": ("parent", signal.SIGKILL, -signal.SIGKILL, ""),
    "stop the parent": ("parent", signal.SIGTERM, 130, "; go on with --resume"),
    "interrupt the parent": ("parent", signal.SIGINT, 130, "; go on with --resume"),
    "kill a loader": ("loader", signal.SIGKILL, 2, "data.num_workers"),
}


@pytest.mark.parametrize("way", WAYS)
def test_nothing_survives_a_training(
    way: str, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whom, number, code, message = WAYS[way]
    # a socket in it would have too long a path
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / ("long" * 25)))
    monkeypatch.setattr(images, "read_image", read_slowly)
    config = build_config(
        layered(tiny_config.model_dump(), {"data": {"num_workers": 1, "cache": "none"}, "train": {"epochs": 1000}})
    )
    folder = RunFolder(tmp_path / "run")
    train = partial(run_local, config, folder, resume=False, console=new_console(quiet=True))
    with forked(train, tmp_path / "log.txt") as run:
        assert until(lambda: len(run.members()) > 1, seconds=30)
        target = run.pid if whom == "parent" else next(pid for pid in run.members() if pid != run.pid)
        os.kill(target, number)
        assert run.wait(seconds=20) == code
        said = run.log.read_text()
        assert message in said
        assert "Traceback" not in said
        assert until(lambda: run.members() == [], seconds=5)
