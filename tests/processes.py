"""Processes of tests: a command in a forked one, and who is left of its session."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mprd.cli import run_command


@dataclass
class Forked:
    """A command in a process and a session of its own."""

    pid: int
    log: Path
    """What it prints."""

    def members(self) -> list[int]:
        """Return the processes of its session but zombies, as `ps` shows them."""
        shown = subprocess.run(["ps", "-eo", "pid=,sid=,stat="], capture_output=True, text=True, check=True).stdout
        rows = [line.split() for line in shown.splitlines()]
        return [int(pid) for pid, session, state in rows if int(session) == self.pid and not state.startswith("Z")]

    def wait(self, *, seconds: float) -> int:
        """Return the exit code, negative for a signal."""
        status: list[int] = []

        def has_ended() -> bool:
            pid, code = os.waitpid(self.pid, os.WNOHANG)
            status.extend([code] if pid else [])
            return bool(pid)

        assert until(has_ended, seconds=seconds)
        return os.waitstatus_to_exitcode(status[0])


@contextmanager
def forked(command: Callable[[], object], log: Path) -> Iterator[Forked]:
    """Run a command line's function in a fork of this process, which is faster than a new interpreter."""
    pid = os.fork()
    if pid == 0:
        os.setsid()
        sys.stdout = sys.stderr = log.open("w", buffering=1)
        try:
            run_command(lambda: command() and None)
            os._exit(0)
        except SystemExit as stop:
            os._exit(int(stop.code or 0))
        finally:
            os._exit(99)
    run = Forked(pid, log)
    try:
        yield run
    finally:
        for left in run.members():
            os.kill(left, signal.SIGKILL)


def until(condition: Callable[[], object], *, seconds: float) -> bool:
    """Wait for a condition; return whether it came true."""
    end = time.monotonic() + seconds
    while not (is_true := bool(condition())) and time.monotonic() < end:
        time.sleep(0.05)
    return is_true
