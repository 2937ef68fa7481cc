"""One process at a time writes into the folder of a run or of a study."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mprd.errors import UserError
from mprd.runs.lock import LOCK_NAME, held
from mprd.train.cli import app as train_app
from mprd.tune.cli import app as tune_app

HOLDER = """
import os, sys, time
from pathlib import Path
from mprd.runs.lock import held
with held(Path(sys.argv[1])):
    # like a loader worker, the child outlives a killed parent
    if os.fork() == 0:
        sys.stdout.close()
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Hold the lock of `tmp_path` in another process."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def test_a_folder_is_locked_until_its_process_ends_even_by_a_kill(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=f"process {holder.pid} on .* is at work there"), held(tmp_path):
            pass
    holder.kill()
    holder.wait()
    with held(tmp_path):
        assert (tmp_path / LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")


def test_a_locked_run_or_study_is_not_resumed(
    tiny_run: Path, tmp_path: Path, holder: subprocess.Popen[str], refuse: Callable[..., str]
) -> None:
    (tmp_path / "config.yaml").write_text((tiny_run / "config.yaml").read_text())
    (tmp_path / "study.yaml").write_text("name: small\n")
    args = ["--resume", tmp_path, "--launcher", "local"]
    assert f"process {holder.pid} on" in refuse(train_app, *args)
    assert f"process {holder.pid} on" in refuse(tune_app, "--study", "small", *args[2:], "--resume", "--out", tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"config.yaml", "study.yaml", LOCK_NAME}


def test_a_file_system_without_locks_only_warns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("mprd.runs.lock.fcntl.lockf", refuse)
    with held(tmp_path):
        assert "No locks available" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match=r"file/absent: cannot write there: Not a directory"), held(file / "absent"):
        pass
