"""The cores and the memory of a machine, within the limits of its container. Imports no torch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Files with the memory limit of a container, in bytes or `max` (cgroup v2 and v1)."""


class CpuThreads(NamedTuple):
    """CPU threads of a process; plain numbers, to be sent to Ray workers."""

    threads: int
    """torch's threads; 0: torch's default, at most the cores available."""
    max_threads: int | None = None
    """The limit while loader processes are idle; None: all cores available."""


def num_cores() -> int:
    """Return the cores available to this process, by its affinity and the limits of its container."""
    from joblib import cpu_count

    return cpu_count()


def memory_bytes() -> int:
    """Return the memory of the machine, or the limit of its container."""
    limits = [file.read_text().strip() for file in MEMORY_LIMITS if file.is_file()]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(int(n) for n in limits if n.isdigit())])
