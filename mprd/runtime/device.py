"""Where a network runs: CPU threads, and which accelerator."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mprd.errors import UserError

MALLOPT = {-3: 2**25, -1: 2**30}
"""M_MMAP_THRESHOLD, at its most, and M_TRIM_THRESHOLD of glibc, in bytes."""

MEMORY_LIMITS = (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"))
"""Where Linux says what memory a container is given, as bytes or `max` (cgroup v2 and v1)."""


class CpuShare(NamedTuple):
    """CPU threads of a process, plain numbers so that they can be sent to it."""

    threads: int
    """What torch computes with; 0 is torch's choice, as far as there are cores for it."""
    most: int | None = None
    """What it may compute with while its other processes stand idle; None is every core that the process may use."""


most_threads: int | None = None
"""`CpuShare.most` of this process, as torch's own number of threads is the process's."""


def num_cores() -> int:
    """Count the cores that this process may use: those it is bound to, and no more than its container is given."""
    from joblib import cpu_count

    return cpu_count()


def memory_bytes() -> int:
    """Return the memory of the machine, or what its container is given of it."""
    limits = [file.read_text().strip() for file in MEMORY_LIMITS if file.is_file()]
    return min([os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), *(int(n) for n in limits if n.isdigit())])


def usual_threads() -> int:
    """Count the threads that torch computes with by itself, as far as there are cores for them.

    torch does not see the limit of a container.
    """
    return min(torch.get_num_threads(), num_cores())


def set_threads(threads: int, most: int | None = None) -> None:
    """Set torch's CPU threads, and how many of them there may be while other processes of the run stand idle."""
    global most_threads
    most_threads = most
    threads = threads or usual_threads()
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Let glibc keep what a tensor leaves for the next one; it gives most of it back, and each page comes anew.

    Another C library, and an environment that tunes glibc itself, stay as they are.
    """
    is_tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not is_tuned:
        for parameter, value in MALLOPT.items():
            mallopt(parameter, value)


@contextmanager
def more_threads(num_idle: int) -> Iterator[None]:
    """Let torch compute on the cores of so many idle processes of the run as well, as far as `set_threads` allows."""
    usual = torch.get_num_threads()
    most = num_cores() if most_threads is None else most_threads
    torch.set_num_threads(max(usual, min(usual + num_idle, most)))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def send(values: Any, device: torch.device, *, dtype: torch.dtype | None = None) -> Tensor:
    """Copy numbers of the host to a device and go on at once.

    A plain copy returns when the accelerator is done with all that it was given before.
    """
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)


def send_pixels(pixels: Tensor, device: torch.device) -> Tensor:
    """Copy many numbers to a device and go on at once: through page-locked memory, without which much is waited for."""
    return (pixels.pin_memory() if device.type == "cuda" else pixels).to(device, non_blocking=True)


@contextmanager
def cudnn_benchmark() -> Iterator[None]:
    """Let cuDNN time its kernels for each new input size; pays off where few sizes recur, as in training batches."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Fetched:
    """Whole numbers on their way from a device to the host, which does other work until it asks for them."""

    def __init__(self, numbers: Tensor) -> None:
        """Send for `numbers` `[n]`."""
        self.numbers = numbers.to("cpu", non_blocking=True)
        is_awaited = numbers.device.type == "cuda"
        self.arrival = torch.cuda.current_stream(numbers.device).record_event() if is_awaited else None

    def tolist(self) -> list[int]:
        """Return the numbers once they are here."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.numbers.tolist()


def choose_device(name: str, *, setting: str = "train.device") -> torch.device:
    """Turn `auto`, `cpu` or `cuda[:N]` into a device that is there; raise UserError naming the setting otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{setting} must be auto, cpu, cuda or cuda:N, but got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{setting}: {name} is not on this machine ({torch.cuda.device_count()} CUDA devices)")
    return device
