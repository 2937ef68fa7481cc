"""Advice leads somewhere: the command that a message names is run as the message spells it."""

from __future__ import annotations

import re
import shlex
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from mprd.__main__ import app as mprd
from mprd.runs.folder import RunFolder
from tests.conftest import TINY

Said = Callable[..., str]


@pytest.fixture
def said(capfd: pytest.CaptureFixture[str]) -> Said:
    """Return a function that runs a command, checks its exit code, and returns what it prints."""

    def run(*words: object, code: int = 0) -> str:
        with pytest.raises(SystemExit) as stop:
            mprd([str(word) for word in words])
        output = capfd.readouterr()
        assert (stop.value.code or 0) == code, output.err
        return output.out + output.err

    return run


@pytest.fixture
def options(tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Copy the tiny data set, with one image that cannot be read, below a folder whose name has a space."""
    data = tmp_path / "some data"
    shutil.copytree(tiny_root, data)
    min((data / "bounding_box_train").iterdir()).write_bytes(b"")
    monkeypatch.chdir(tmp_path)
    sets = [word for setting in (*TINY, "train.threads=1", "train.epochs=2") for word in ("--set", setting)]
    return ["--preset", "demo", "--launcher", "local", "--data", data, *sets]


def interrupt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Send this process a SIGINT when the next epoch ends."""
    left = [signal.SIGINT]
    monkeypatch.setattr("mprd.train.recorder.plot_curves", lambda *_: left and signal.raise_signal(left.pop()))


def advised(text: str) -> list[str]:
    """Return the options after `go on with`, as a shell reads them."""
    found = re.search(r"go on with (--.*?)(?:, or .*)?$", text.strip())
    assert found is not None, text
    return shlex.split(found[1])


def test_a_run_goes_on_as_its_messages_say(
    options: list[object], tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a run"
    failed = said("train", *options, "--out", out, code=2)
    setting = re.search(r"\((\S+) leaves such files out of a training\)", failed)
    assert setting is not None
    # before its first checkpoint a run starts again, by itself or resumed
    said("train", "--launcher", "local", "--resume", out, code=2)
    interrupt_once(monkeypatch)
    stopped = said("train", *options, "--set", setting[1], "--out", out, code=130)
    said("train", *advised(stopped), "--launcher", "local")
    assert len(RunFolder(out).read_rows()) == 2
    taken = said("train", *options, "--set", setting[1], "--out", out, code=2)
    ended = said("train", *advised(taken), "--launcher", "local")
    report, search = re.findall(r"mprd (report|search) (.*)", ended)
    said(report[0], *shlex.split(report[1]))
    query = tmp_path / "some data" / "query"
    said(
        search[0], *shlex.split(search[1].replace("CROPS", f"'{query}'").replace("IMAGE", f"'{min(query.iterdir())}'"))
    )
    RunFolder(out).last.unlink()
    assert "to train anew, change --out" in said("train", "--launcher", "local", "--resume", out, code=2)


def test_a_study_goes_on_as_its_messages_say(
    options: list[object], tmp_path: Path, said: Said, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = {"name": "two", "doc": "Two.", "space": {"pairs.mu": {"grid": [0.4, 0.5]}}}
    (tmp_path / "tune_configs").mkdir()
    (tmp_path / "tune_configs" / "two.yaml").write_text(yaml.safe_dump(study))
    command = ["tune", "--study", "two", *options, "--set", "data.on_bad_image=skip", "--out", tmp_path / "a study"]
    interrupt_once(monkeypatch)
    stopped = said(*command, code=130)
    assert "2 of 2 trials" in said("tune", *advised(stopped), "--launcher", "local")
    taken = said(*command, code=2)
    # nothing is left: a folder that was removed to free the disk shows no figures, and is not missed
    shutil.rmtree(min((tmp_path / "a study" / "trials").iterdir()))
    assert "0 of 2 trials" in said("tune", *advised(taken), "--launcher", "local")
    said("report", tmp_path / "a study")


def test_extraction_goes_on_as_its_messages_say(
    trained_run: Path, options: list[Any], tmp_path: Path, said: Said
) -> None:
    command = ["extract", trained_run, tmp_path / "some data" / "bounding_box_train", "--out", tmp_path / "f.parquet"]
    failed = said(*command, code=2)
    option = re.search(r"\((--\S+) leaves such files out\)", failed)
    assert option is not None
    said(*command, option[1])
    assert "remove it or give another --out" in said(*command, option[1], code=2)
    (tmp_path / "f.parquet").unlink()
    said(*command, option[1])
