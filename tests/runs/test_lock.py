"""One process at a time in the folder of a run or of a study."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mprd.errors import UserError
from mprd.runs import lock as folder_lock
from mprd.runs.lock import held
from mprd.train.cli import app as train_app
from mprd.tune.cli import app as tune_app

HOLDER = """
import os, sys, time
from pathlib import Path
from mprd.runs.lock import held
with held(Path(sys.argv[1])):
    # as a loading process does, which outlives a parent that is killed
    if os.fork() == 0:
        sys.stdout.close()
        time.sleep(60)
        os._exit(0)
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Hold `tmp_path` in another process."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        os.killpg(process.pid, signal.SIGKILL)


def refusal(app: object, args: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        app(args)  # type: ignore[operator]
    assert stop.value.code == 2
    return " ".join(capfd.readouterr().err.split())


def test_a_folder_is_refused_until_its_holder_is_gone_however_that_ends(
    holder: subprocess.Popen[str], tmp_path: Path
) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match=f"process {holder.pid} on .* is at work there"), held(tmp_path):
            pass
    holder.kill()
    holder.wait()
    with held(tmp_path):
        assert (tmp_path / folder_lock.LOCK_NAME).read_text().startswith(f"process {os.getpid()} on ")


def test_a_run_that_goes_on_elsewhere_is_not_resumed(
    tiny_run: Path, tmp_path: Path, holder: subprocess.Popen[str], capfd: pytest.CaptureFixture[str]
) -> None:
    files = {path.name: path.read_bytes() for path in tiny_run.iterdir() if path.is_file()}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    message = refusal(train_app, ["--resume", str(tmp_path), "--launcher", "local"], capfd)
    assert f"process {holder.pid} on" in message
    assert {path.name for path in tmp_path.iterdir()} == {*files, folder_lock.LOCK_NAME}


def test_a_study_that_goes_on_elsewhere_is_not_resumed(
    tmp_path: Path, holder: subprocess.Popen[str], capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "study.yaml").write_text("name: small\n")
    args = ["--study", "small", "--resume", "--out", str(tmp_path), "--launcher", "local"]
    assert f"process {holder.pid} on" in refusal(tune_app, args, capfd)
    assert {path.name for path in tmp_path.iterdir()} == {"study.yaml", folder_lock.LOCK_NAME}


def test_a_file_system_without_locks_is_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(folder_lock.fcntl, "lockf", refuse)
    with held(tmp_path):
        assert "cannot be locked (No locks available)" in caplog.text


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent: cannot write there: No such file"), held(tmp_path / "absent"):
        pass
