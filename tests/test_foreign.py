"""Folders and files of others, and threads: commands work, or name in one line what they may not read."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import mprd.evaluate.run
import mprd.extract.run
import mprd.search.run
import mprd.search.tables
import mprd.tune.local  # noqa: F401 - root's Python cannot be read without root's rights
from mprd.config.schema import Config
from mprd.evaluate.cli import app as evaluate
from mprd.export.cli import app as export
from mprd.extract.cli import app as extract
from mprd.runs.folder import RunFolder
from mprd.runtime import checkpoint
from mprd.search.cli import app as search
from mprd.text import new_console
from mprd.train.cli import app as train
from mprd.train.local import run_local


@contextmanager
def as_nobody() -> Iterator[None]:
    """Give up the rights of root, to which every file is open."""
    own = os.geteuid()
    if own == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(own)


@pytest.fixture
def run(trained_run: Path, tiny_root: Path, tmp_path: Path) -> Path:
    """Copy the trained run and some images into a folder that all may read."""
    # with pytest-xdist there is one folder more
    for folder in (tmp_path, *tmp_path.parents):
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)
    tiny_root.chmod(0o755)
    shutil.copytree(tiny_root / "query", tmp_path / "images")
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


COMMANDS: list[tuple[Any, list[str]]] = [
    (evaluate, ["{run}"]),
    (extract, ["{run}", "{run}/../images", "--out", "{run}/../f.parquet"]),
    (search, ["{run}", "--gallery", "{run}/../images", "--query", "{run}/../images"]),
    (export, ["{run}", "--format", "torchscript"]),
    (train, ["--resume", "{run}", "--launcher", "local"]),
]


@pytest.mark.parametrize("closed", [".", "checkpoints", "checkpoints/last.pt", "config.yaml"])
@pytest.mark.parametrize(("app", "words"), COMMANDS)
def test_a_run_that_may_not_be_read_is_named_in_one_line(
    closed: str, app: Any, words: list[str], run: Path, refuse: Callable[..., str]
) -> None:
    (run / closed).chmod(0)
    with as_nobody():
        line = refuse(app, *(word.format(run=run) for word in words))
    assert str(run) in line
    assert "ermission" in line or "cannot write" in line


def test_a_run_of_another_is_evaluated_extracted_and_searched(run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for path in (run, *run.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    mine = run.parent / "mine"
    mine.mkdir()
    mine.chmod(0o777)
    images = run.parent / "images"
    for app, words in (
        (evaluate, [run]),
        (extract, [run, images, "--out", mine / "f.parquet"]),
        (search, [run, "--gallery", images, "--query", images, "--features-dir", mine]),
    ):
        with as_nobody(), pytest.raises(SystemExit) as stop:
            app([str(word) for word in words])
        assert not stop.value.code, capfd.readouterr().err


def test_a_checkpoint_may_be_read_by_those_who_may_read_the_folder(tmp_path: Path) -> None:
    umask = os.umask(0o022)
    try:
        checkpoint.save({"epoch": 1}, tmp_path / "last.pt")
    finally:
        os.umask(umask)
    assert (tmp_path / "last.pt").stat().st_mode & 0o777 == 0o644


def test_a_run_trains_in_a_thread(tiny_config: Config, tmp_path: Path) -> None:
    """As in a notebook, which has no signals of its own to give, nor a terminal."""
    errors: list[BaseException] = []

    def work() -> None:
        short = tiny_config.model_copy(update={"train": tiny_config.train.model_copy(update={"epochs": 1})})
        loading = short.model_copy(update={"data": short.data.model_copy(update={"num_workers": 1, "cache": "none"})})
        try:
            run_local(loading, RunFolder(tmp_path / "run"), resume=False, console=new_console(quiet=True))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []
    assert len(RunFolder(tmp_path / "run").read_rows()) == 1
