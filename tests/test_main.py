"""`mprd` lists its commands, completes their names, and passes on their exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

import pytest

from mprd.__main__ import COMMANDS, app


def run(*args: str, **environment: str) -> str:
    code = "from mprd.__main__ import run; run()"
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}).stdout


def test_help_lists_every_command_with_a_summary() -> None:
    lines = {line.strip("│ ").split("  ")[0].strip(): line for line in run("--help", COLUMNS="100").splitlines()}
    assert set(COMMANDS) <= set(lines)
    assert "Train MPRD" in lines["train"]


def test_shells_complete_the_commands() -> None:
    out = run(_MPRD_COMPLETE="complete_bash", COMP_WORDS="mprd e", COMP_CWORD="1")
    assert out.split() == ["evaluate", "extract", "export"]


def test_a_command_keeps_its_exit_code(refuse: Callable[..., str]) -> None:
    assert "no/such/run: not a run folder" in refuse(app, "evaluate", "no/such/run")


def test_an_unknown_command_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        app(["trian"])
    assert stop.value.code == 2
    assert "trian" in capfd.readouterr().err


def test_a_stop_keeps_its_exit_code_where_the_reader_of_its_output_has_gone() -> None:
    code = "import sys; from mprd.cli import main; main(lambda prog_name: (print('x'), sys.exit(130)), 'mprd')"
    read, write = os.pipe()
    os.close(read)
    command, buffered = [sys.executable, "-c", code], {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, env=buffered)
    os.close(write)
    assert (process.returncode, process.stderr) == (130, "")
