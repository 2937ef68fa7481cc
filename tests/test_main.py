"""The one command above all: it lists the others, hands on to them, and completes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from mprd.__main__ import COMMANDS, app


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    code = "from mprd.__main__ import app; app(prog_name='mprd')"
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, env={**os.environ, **environment}
    )


def test_help_lists_every_command_with_a_word_on_it() -> None:
    done = run("--help", COLUMNS="100")
    lines = {line.strip("│ ").split("  ")[0].strip(): line for line in done.stdout.splitlines()}
    assert set(COMMANDS) <= set(lines)
    assert "Train MPRD" in lines["train"]


def test_the_shell_is_offered_the_commands() -> None:
    done = run(_MPRD_COMPLETE="complete_bash", COMP_WORDS="mprd e", COMP_CWORD="1")
    assert done.stdout.split() == ["evaluate", "extract", "export"]


def test_a_command_keeps_its_own_exit_code(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        app(["evaluate", "no/such/run"])
    assert stop.value.code == 2
    assert "no/such/run: not a run folder" in capfd.readouterr().err


def test_a_command_that_is_not_there_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        app(["trian"])
    assert stop.value.code == 2
    assert "trian" in capfd.readouterr().err
