"""Commands of mprd in processes of their own: when they reach a state, how they stop, the memory of their processes."""

from __future__ import annotations

import atexit
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

from mprd.parallel.reaper import list_processes
from mprd.runtime import checkpoint

LIMIT = 300
"""Seconds for a command to reach a state."""
numbers = count()
started: list[subprocess.Popen[bytes]] = []


class Command:
    """A command of mprd with the run folder `out`, in a process of its own."""

    def __init__(self, folder: Path, name: str, *args: str, sets: tuple[str, ...]) -> None:
        self.out = folder / f"{name}{next(numbers)}"
        self.log = self.out.with_suffix(".log")
        line = [sys.executable, "-m", f"mprd.{name}", "--preset", "demo", "--out", str(self.out), *args]
        line += [text for setting in sets for text in ("--set", setting)]
        self.started = time.monotonic()
        with self.log.open("w") as log:
            self.process = subprocess.Popen(line, stdout=log, stderr=log, cwd=folder)
        started.append(self.process)

    def wait_for(self, condition: Callable[[Command], object]) -> float:
        """Wait until a state is reached; return the seconds since the start."""
        while not condition(self):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() - self.started < LIMIT, self.log.read_text()
            time.sleep(0.02)
        return time.monotonic() - self.started

    def end(self) -> float:
        """Wait for the end; return the seconds since the start."""
        assert self.process.wait() == 0, self.log.read_text()
        return time.monotonic() - self.started

    def stop(self) -> float:
        """Return the seconds from SIGTERM to the end."""
        sent = time.monotonic()
        self.process.terminate()
        code = self.process.wait()
        seconds = time.monotonic() - sent
        # before it watches signals, SIGTERM itself ends it
        assert code in (130, -signal.SIGTERM), self.log.read_text()
        return seconds

    def says(self, pattern: str) -> re.Match[str] | None:
        return re.search(pattern, self.log.read_text())

    def position(self) -> tuple[int, bool, int] | None:
        """Return epoch, whether the CNN's phase has begun, and step of the last checkpoint."""
        file = self.out / "checkpoints" / "last.pt"
        if not file.exists():
            return None
        state = checkpoint.load(file)
        return state["epoch"], state["phase"] == "cnn", state["step"]

    def has_stepped(self) -> bool:
        return self.position() not in (None, (0, False, 0))

    def has_row(self) -> bool:
        """Return whether a run, or one of a study, has ended an epoch."""
        return any(self.out.rglob("metrics.jsonl"))


@atexit.register
def kill_all() -> None:
    """Kill the commands that still run, as after an error; the helpers of a killed Ray end by themselves."""
    for process in started:
        process.kill()


# atexit hears of no signal
signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))


def peak_gb(command: Command) -> float:
    """Wait for the end; return the largest sum of proportional set sizes of a command and its descendants."""
    peak = 0
    while command.process.poll() is None:
        peak = max(peak, sum(map(proportional_kb, descendants(command.process.pid))))
        time.sleep(0.2)
    command.end()
    return peak * 1024 / 1e9


def descendants(root: int) -> list[int]:
    parents = list_processes()[0]
    found = [root]
    for above in found:
        found += [pid for pid, parent in parents.items() if parent == above]
    return found


def proportional_kb(pid: int) -> int:
    try:
        text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    except OSError:  # it has ended
        return 0
    found = re.search(r"^Pss: +(\d+)", text, re.MULTILINE)
    return int(found[1]) if found else 0
