"""What every benchmark shares: timing on CPU and GPU, and the one line of JSON that ends its output."""

from __future__ import annotations

import json
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch


def report(**fields: object) -> None:
    """Print `fields` (which must hold `ratio`) and the machine they were taken on as one line of JSON; call it last."""
    assert "ratio" in fields, "a benchmark reports a ratio"
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"CPU {platform.machine()}"
    machine = {
        "device": device,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
    }
    print(json.dumps({**machine, **fields}), flush=True)


def median_seconds(function: Callable[[], object], *, runs: int) -> float:
    """Return the median wall time of `runs` calls in seconds, after one call that is not timed."""
    function()
    return statistics.median(_seconds(function) for _ in range(runs))


def interleaved_medians(a: Callable[[], object], b: Callable[[], object], *, runs: int) -> tuple[float, float]:
    """Return the median wall times of `a` and `b` in seconds, called in turn so that a busy machine slows both.

    One call of each goes untimed.
    """
    a()
    b()
    pairs = [(_seconds(a), _seconds(b)) for _ in range(runs)]
    return statistics.median(pair[0] for pair in pairs), statistics.median(pair[1] for pair in pairs)


def _seconds(function: Callable[[], object]) -> float:
    _synchronize()
    start = time.perf_counter()
    function()
    _synchronize()
    return time.perf_counter() - start


def _synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
