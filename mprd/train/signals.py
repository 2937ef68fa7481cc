"""Ctrl-C and SIGTERM as a request to stop after the current step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Protocol

from mprd.errors import STOPPED

if TYPE_CHECKING:
    from rich.console import Console

REPEAT_SECONDS = 1.0
"""Seconds within which another SIGTERM counts as the same request."""
STEP_SECONDS = 2.0
"""Limit for the step in which a stop is requested; a run that goes on is interrupted, as by a second Ctrl-C."""
CALL_SECONDS = 1.5
"""Limit for the call that the interrupt waits for, such as a long one of torch; then the process ends."""


class StopRequest(Protocol):
    """Whether the run is to stop."""

    @property
    def stop(self) -> bool:
        """True from the request on."""


class Signals:
    """A request to stop by Ctrl-C or SIGTERM."""

    def __init__(self, console: Console, *, is_limited: bool = False) -> None:
        self.console, self.is_limited = console, is_limited
        self.stop = False
        self.stopped_at = 0.0
        self.is_over = threading.Event()
        """Set when the run has ended by itself."""

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Request a stop after the current step; a second Ctrl-C stops at once, and so does a later SIGTERM."""
        # a process group and its leader may each be sent the first one
        is_second = number == signal.SIGINT or time.monotonic() - self.stopped_at > REPEAT_SECONDS
        if self.stop and is_second:
            raise KeyboardInterrupt
        is_first, self.stop, self.stopped_at = not self.stop, True, time.monotonic()
        self.say(b"\nstopping after this step; Ctrl-C again stops at once\n")
        if is_first and self.is_limited:
            threading.Thread(target=self.limit, daemon=True).start()

    def say(self, line: bytes) -> None:
        # print is not reentrant; a notebook's stream may have no file descriptor
        with suppress(OSError, ValueError):
            os.write(self.console.file.fileno(), line)

    def limit(self) -> None:
        """End a run whose step takes too long; the last checkpoint stays as it is."""
        main = threading.main_thread().ident
        assert main is not None
        if self.is_over.wait(STEP_SECONDS):
            return
        signal.pthread_kill(main, signal.SIGINT)
        if not self.is_over.wait(CALL_SECONDS):
            self.say(b"stopped within a step; go on from the last checkpoint with --resume\n")
            os._exit(STOPPED)


@contextmanager
def watch_signals(console: Console, *, is_limited: bool = False) -> Iterator[Signals]:
    """Turn Ctrl-C and SIGTERM into a request to stop while the block runs.

    Args:
        is_limited: end a run that has not stopped within STEP_SECONDS.
    """
    signals = Signals(console, is_limited=is_limited)
    if threading.current_thread() is not threading.main_thread():
        # only the main thread may set handlers
        yield signals
        return
    old = {number: signal.signal(number, signals.handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        signals.is_over.set()
        for number, handler in old.items():
            signal.signal(number, handler)
