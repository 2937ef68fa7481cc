"""End what is left of a Ray on this machine within seconds of the process that started it, even of a killed one.

Ray's agents notice the end of a killed cluster after a minute or more. This file is run by an interpreter of its own,
and needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
import time

MARK = "MPRD_RAY"
"""Variable in the environment of Ray's processes."""
GRACE_SECONDS = 3.0

watcher: subprocess.Popen[bytes] | None = None
"""Held, because its input ends with this object."""


def watch() -> None:
    """Start the watch over the Ray that this process is about to start."""
    global watcher
    if os.path.isdir("/proc") and MARK not in os.environ:
        mark = secrets.token_hex(8)
        command = [sys.executable, "-S", "-E", __file__, mark]
        watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
        os.environ[MARK] = mark


def is_of_ray(pid: str, mark: bytes) -> bool:
    """Return whether a process is one of the marked Ray, whose workers may have started others."""
    try:
        with open(f"/proc/{pid}/environ", "rb") as environment, open(f"/proc/{pid}/cmdline", "rb") as command:
            words = command.read()
            return mark in environment.read().split(b"\0") and (words.startswith(b"ray::") or b"/ray/" in words)
    except OSError:
        return False


def main(mark: str) -> None:
    """Wait for the end of the input, and end the marked processes that are then left."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.read()
    time.sleep(GRACE_SECONDS)
    for pid in filter(str.isdigit, os.listdir("/proc")):
        if int(pid) != os.getpid() and is_of_ray(pid, f"{MARK}={mark}".encode()):
            with contextlib.suppress(OSError):
                os.kill(int(pid), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1])
