"""The device and the CPU threads of a process, its freed memory, and copies between host and device."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mprd.errors import UserError
from mprd.runtime.machine import num_cores

MALLOPT = {-3: 2**25, -1: 2**30}
"""glibc's M_MMAP_THRESHOLD (at its maximum) and M_TRIM_THRESHOLD, in bytes."""

max_threads: int | None = None
"""`CpuThreads.max_threads` of this process; global, as torch's number of threads is."""


def set_threads(threads: int, limit: int | None = None) -> None:
    """Set torch's CPU threads, and their limit for `more_threads`; see `CpuThreads`."""
    global max_threads
    max_threads = limit
    # torch does not respect the limit of a container
    threads = threads or min(torch.get_num_threads(), num_cores())
    if threads != torch.get_num_threads():
        torch.set_num_threads(threads)


def keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system, which costs a page fault per page.

    Does nothing under another C library, or where the environment tunes glibc.
    """
    is_tuned = any(name.startswith("MALLOC_") or name == "GLIBC_TUNABLES" for name in os.environ)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and not is_tuned:
        for parameter, value in MALLOPT.items():
            mallopt(parameter, value)


@contextmanager
def more_threads(num_idle: int) -> Iterator[None]:
    """Add the cores of `num_idle` idle processes to torch's threads, up to the limit given to `set_threads`."""
    usual = torch.get_num_threads()
    limit = num_cores() if max_threads is None else max_threads
    torch.set_num_threads(max(usual, min(usual + num_idle, limit)))
    try:
        yield
    finally:
        torch.set_num_threads(usual)


def send(values: Any, device: torch.device, *, dtype: torch.dtype | None = None) -> Tensor:
    """Copy values of the host to a device without a sync; a plain copy waits for all queued work of the device."""
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)


def send_pixels(pixels: Tensor, device: torch.device) -> Tensor:
    """Copy a large tensor to a device without a sync, through page-locked memory."""
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


def choose_device(name: str, *, setting: str = "train.device") -> torch.device:
    """Return the device for `auto`, `cpu` or `cuda[:N]`; raise UserError naming the setting where there is none."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"{setting} must be auto, cpu, cuda or cuda:N, but got {name!r}")
    if name != "cpu" and int(name[5:] or 0) >= torch.cuda.device_count():
        raise UserError(f"{setting}: {name} is not on this machine ({torch.cuda.device_count()} CUDA devices)")
    return torch.device(name)
