"""`mprd train`: wrong input is one line, real signals stop it, and a resume is bit-identical."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from mprd.cli import choose_launcher
from mprd.config.schema import Config
from mprd.errors import Interrupted, UserError
from mprd.runs.folder import RunFolder
from mprd.runtime import checkpoint
from mprd.train.cli import app, launch
from mprd.train.local import run_local
from mprd.train.signals import Signals
from tests.conftest import NAMELESS, TINY
from tests.processes import forked, until


def settings(root: Path | None, *overrides: str) -> dict:
    return {"preset": "demo", "data": root, "set_": [*TINY, *overrides], "config": None, "seed": None}


def arguments(root: Path, out: Path, *overrides: str) -> list[str]:
    sets = [text for override in (*TINY, *overrides) for text in ("--set", override)]
    return ["--launcher", "local", "--preset", "demo", "--data", str(root), "--out", str(out), *sets]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--preset", "market", "--data", "x"], "unknown preset 'market', did you mean market1501"),
        (["--preset", "market1501"], "data.root: the data set market1501 needs a folder"),
        (["--preset", "market1501", "--data", "no/such/folder"], "no/such/folder"),
        (["--preset", "recommended"], "data.root: these settings need a folder; give --data ROOT"),
        (["--data", "no/such/folder"], "no/such/folder: no such folder"),
        (["--set", "pairs.mue=1"], "unknown setting pairs.mue, did you mean pairs.mu"),
        (["--launcher", "slurm"], "--launcher must be"),
        (["--launcher", "ray", "--profile"], "--profile times a run in this process"),
        (["--profile", "--num-workers", "2"], "--num-workers and --address are Ray's"),
        (["--resume", "no/such/run"], "no/such/run: not a run folder"),
        (["--resume", "x", "--seed", "0"], "--resume goes on with the settings of its run folder"),
        (["--set", "train.device=cuda:99", "--out", "never"], "train.device: cuda:99 is not on this machine"),
    ],
)
def test_mistakes_are_refused_in_one_line(args: list[str], message: str, refuse: Callable[..., str]) -> None:
    assert message in refuse(app, *args)


def test_a_folder_of_crops_trains_in_a_smoke_run_without_cameras_identities_or_evaluation(
    nameless_root: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    app(["--smoke", "--launcher", "local", "--data", str(nameless_root), "--out", str(run)], standalone_mode=False)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert "mAP" not in rows[-1]
    stored = RunFolder(run).read_config()
    assert (stored.data.dataset, stored.meta.num_ids) == ("folder", 0)


def test_ray_trains_where_it_is_installed_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert [choose_launcher(name) for name in (None, "local", "ray")] == ["ray", "local", "ray"]
    # as on a machine without Ray
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert choose_launcher(None) == "local"
    with pytest.raises(UserError, match="--launcher ray needs Ray, which is not installed"):
        choose_launcher("ray")


def test_an_image_that_cannot_be_read_is_named_or_skipped(
    tiny_root: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    root = tmp_path / "data"
    shutil.copytree(tiny_root, root)
    broken = root / "bounding_box_train" / "0001_c1s1_000001_01.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    assert str(broken) in refuse(app, *arguments(root, tmp_path / "stopped"))
    skip = settings(root, "data.on_bad_image=skip", "train.epochs=1")
    launch(skip, out=tmp_path / "skipped", resume=None, launcher="local")
    assert len(checkpoint.load(tmp_path / "skipped" / "checkpoints" / "last.pt")["memory"]) == 23


def test_crops_without_ids_train_and_are_not_evaluated(nameless_root: Path, tmp_path: Path) -> None:
    folder = settings(nameless_root, *NAMELESS, "train.epochs=2")
    launch(folder, out=tmp_path / "run", resume=None, launcher="local")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    assert "mAP" not in rows[-1]
    assert rows[-1]["cnn_loss"] > 0


def start(root: Path, out: Path) -> subprocess.Popen[bytes]:
    """Start a training process that saves after every step, and wait until it is in its second epoch."""
    command = [sys.executable, "-m", "mprd.train", *arguments(root, out, *SLOW)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=one_thread())
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not metrics.exists():
        assert process.poll() is None, "the run ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


SLOW = ("train.epochs=12", "train.checkpoint_seconds=0.02", "eval.every=4")


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


# SIGINT has the handler of SIGTERM
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_stopped_run_resumes_to_the_same_bits(
    number: signal.Signals, code: int, undisturbed: Path, tiny_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    process = start(tiny_root, out)
    process.send_signal(number)
    assert process.wait(timeout=60) == code
    saved = checkpoint.load(out / "checkpoints" / "last.pt")
    assert saved["epoch"] < 12
    launch(dict.fromkeys(("preset", "data", "set_", "config", "seed")), out=None, resume=out, launcher="local")
    first, second = (checkpoint.load(run / "checkpoints" / "last.pt") for run in (undisturbed, out))
    for name, tensor in first["backbone"].items():
        assert torch.equal(tensor, second["backbone"][name]), name
    assert torch.equal(first["memory"], second["memory"])
    assert torch.equal(first["positives"], second["positives"])
    assert without_times(undisturbed) == without_times(out)


def test_a_signal_in_the_middle_of_a_print_is_heard(tmp_path: Path) -> None:
    class Busy(io.StringIO):
        """What a buffered stream does when a signal's handler writes to it while it is writing."""

        def write(self, _text: str) -> int:
            raise RuntimeError("reentrant call")

        def fileno(self) -> int:
            return told.fileno()

    with (tmp_path / "told.txt").open("w+") as told:
        signals = Signals(Console(file=Busy()))
        signals.handle(signal.SIGTERM, None)
        assert signals.stop
        assert "stopping after this step" in (tmp_path / "told.txt").read_text()
    unheard = Signals(Console(file=io.StringIO()))  # without a descriptor, as in a notebook
    unheard.handle(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        unheard.handle(signal.SIGINT, None)


def call_once() -> None:
    torch.linalg.svd(torch.randn(5000, 5000))


def call_often() -> None:
    while True:
        torch.randn(100, 100).sum()


@pytest.mark.parametrize(
    ("work", "seconds", "message"),
    [(call_once, 0.3, "stopped within a step; go on"), (call_often, 60, "stopped at once")],
)
def test_a_long_step_does_not_hold_up_a_stop(
    work: Callable[[], None],
    seconds: float,
    message: str,
    tiny_config: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mprd.train.signals.STEP_SECONDS", 0.3)
    monkeypatch.setattr("mprd.train.signals.CALL_SECONDS", seconds)
    run, begun = tmp_path / "run", tmp_path / "begun"

    def after_epoch(_row: dict[str, Any]) -> None:
        begun.touch()
        work()

    def train() -> None:
        try:
            run_local(tiny_config, RunFolder(run), resume=False, console=Console(), on_row=after_epoch)
        except KeyboardInterrupt:
            raise Interrupted("stopped at once") from None

    with forked(train, tmp_path / "log.txt") as process:
        assert until(begun.exists, seconds=60)
        os.kill(process.pid, signal.SIGTERM)
        assert process.wait(seconds=60) == 130
    assert (tmp_path / "log.txt").read_text().splitlines()[-1].startswith(message)
    assert len(run_local(tiny_config, RunFolder(run), resume=True, console=Console(quiet=True))) == 3


@pytest.fixture(scope="module")
def undisturbed(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the run of the signal tests without disturbing it."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    launch(settings(tiny_root, *SLOW), out=out, resume=None, launcher="local")
    return out


def without_times(run: Path) -> list[dict]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if "second" not in key} for row in rows]


@pytest.mark.parametrize("is_stopped", [False, True])
def test_curves_are_drawn_now_and_then_and_at_the_end_hold_all_epochs(
    is_stopped: bool, tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[int] = []
    sizes: list[int] = []

    def slowly(rows: list[dict[str, Any]], _path: Path) -> None:
        drawn.append(len(rows))
        time.sleep(1.0)

    def stop(row: dict[str, Any]) -> None:
        # what a run writes for its users is there while it runs
        run = tmp_path / "run"
        assert f"{row['epoch'] + 1}/4" in (run / "log.txt").read_text()
        assert len((run / "metrics.jsonl").read_text().splitlines()) == row["epoch"] + 1
        (events,) = (run / "events").iterdir()
        sizes.append(events.stat().st_size)
        if is_stopped and row["epoch"] == 2:
            raise Interrupted("stopped")

    monkeypatch.setattr("mprd.train.recorder.plot_curves", slowly)
    config = tiny_config.model_copy(update={"train": tiny_config.train.model_copy(update={"epochs": 4})})
    with pytest.raises(Interrupted) if is_stopped else nullcontext():
        run_local(config, RunFolder(tmp_path / "run"), resume=False, console=Console(quiet=True), on_row=stop)
    assert drawn == [1, 3 if is_stopped else 4]
    assert sizes == sorted({*sizes})


@pytest.mark.parametrize(("labeller", "is_told"), [("reciprocal", True), ("mplp", False)])
def test_a_limit_is_told_where_a_labeller_reads_it(
    labeller: str, is_told: bool, tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mprd")
    sets = ("train.epochs=1", "neighbors.whitening=true", f"pairs.labeller={labeller}")
    launch(settings(tiny_root, *sets), out=tmp_path / "run", resume=None, launcher="local")
    told = [message for message in caplog.messages if message.startswith("pairs.limit:")]
    assert [message.startswith("pairs.limit: at most") for message in told] == [True] * is_told


def test_cut_lists_are_told_once_and_counted_in_each_epoch(
    tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    launch(settings(tiny_root, "neighbors.similarity=-1"), out=run, resume=None, launcher="local")
    assert sum("neighbors.k_max = 6 cut" in message for message in caplog.messages) == 1
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    assert all(row["neighbors_capped"] > 0 for row in rows)
