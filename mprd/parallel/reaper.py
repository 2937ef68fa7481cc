"""End what is left of a Ray on this machine within seconds of the process that started it, even of a killed one.

Ray's agents notice the end of a killed cluster after a minute or more. This file is run by an interpreter of its own,
and needs the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time

LOOK_SECONDS = 2.0
"""Interval at which the processes of the Ray are listed."""
GRACE_SECONDS = 3.0
"""Time that they have to end by themselves."""

watcher: subprocess.Popen[bytes] | None = None
"""Held, because its input ends with this object."""

Processes = dict[int, str]
"""Start times by process id, which the system gives to others later."""


def watch() -> None:
    """Start the watch over the Ray that this process is about to start."""
    global watcher
    if os.path.isdir("/proc") and watcher is None:
        command = [sys.executable, "-S", "-E", __file__, str(os.getpid())]
        # its input ends with this process
        watcher = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)


def list_processes() -> tuple[dict[int, int], Processes]:
    """Return the parent of each process, and when each started."""
    parents, starts = {}, {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/stat") as file:
            # the name before may hold anything
            fields = file.read().rpartition(")")[2].split()
            parents[pid], starts[pid] = int(fields[1]), fields[19]
    return parents, starts


def ray_below(root: int) -> Processes:
    """Return the descendants of a process that are Ray's; its workers may have started others."""
    parents, starts = list_processes()
    found = {}
    for pid in starts:
        above = pid
        while above in parents and above != root:
            above = parents[above]
        if above == root and pid not in (root, os.getpid()) and is_of_ray(pid):
            found[pid] = starts[pid]
    return found


def is_of_ray(pid: int) -> bool:
    """Return whether the command of a process is one of Ray's."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:
        command = file.read()
        return command.startswith(b"ray::") or b"/ray/" in command
    return False


def main(parent: int) -> None:
    """List Ray's processes until the input ends, and then end those that are left."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    seen: Processes = {}
    while not select.select([sys.stdin], [], [], LOOK_SECONDS)[0]:
        seen |= ray_below(parent)
    time.sleep(GRACE_SECONDS)
    starts = list_processes()[1]
    for pid, start in seen.items():
        if starts.get(pid) == start:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(int(sys.argv[1]))
