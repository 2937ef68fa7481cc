"""Ctrl-C and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Protocol

from rich.console import Console

REPEAT_SECONDS = 1.0
"""Seconds within which another SIGTERM counts as the same request."""


class StopRequest(Protocol):
    """Whether the run is to stop."""

    @property
    def stop(self) -> bool:
        """True from the request on."""


class NoStop:
    """A rank that never asks: it learns of a request from the first one."""

    stop = False


class Signals:
    """A request to stop by Ctrl-C or SIGTERM."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stop = False
        self.stopped_at = 0.0

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Request a stop after the current step; a second Ctrl-C stops at once, and so does a later SIGTERM."""
        # a process group and its leader may each be sent the first one
        is_second = number == signal.SIGINT or time.monotonic() - self.stopped_at > REPEAT_SECONDS
        if self.stop and is_second:
            raise KeyboardInterrupt
        self.stop, self.stopped_at = True, time.monotonic()
        # print is not reentrant; a notebook's stream may have no file descriptor
        with suppress(OSError, ValueError):
            os.write(self.console.file.fileno(), b"\nstopping after this step; Ctrl-C again stops at once\n")


@contextmanager
def watch_signals(console: Console) -> Iterator[Signals]:
    """Turn Ctrl-C and SIGTERM into a request to stop while the block runs."""
    signals = Signals(console)
    if threading.current_thread() is not threading.main_thread():
        # only the main thread may set handlers
        yield signals
        return
    old = {number: signal.signal(number, signals.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
