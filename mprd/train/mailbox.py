"""Messages between the processes of a run or study, through an actor on the machine of the starting process.

Messages survive a worker that is killed; the actor ends with the starting process.
"""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from mprd.storage.places import shown

NOTICE_SECONDS = 0.25
"""Least seconds between two messages of a step, and between two looks for a stop request."""
RESTART_SECONDS = 0.1
"""Time between two looks whether workers may be started again."""
FLUSH_SECONDS = 5
"""Longest wait for messages at the end of a process."""


class Box:
    """What is in a mailbox: the actor."""

    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []
        self.stopped: set[str] = set()
        self.restarts = 0

    def post(self, message: dict[str, Any]) -> None:
        self.messages.append(message)

    def take(self) -> list[dict[str, Any]]:
        """Return the messages since the last call."""
        taken, self.messages = self.messages, []
        return taken

    def request_stop(self, name: str) -> None:
        self.stopped.add(name)

    def is_stopped(self, name: str) -> bool:
        return name in self.stopped

    def allow_restarts(self, number: int) -> None:
        self.restarts = number

    def num_restarts(self) -> int:
        return self.restarts


class Mailbox:
    """Messages in order, and stop requests in the other direction: to a run, or by name to a trial.

    Posting does not wait for the actor. May be sent to other processes.
    """

    def __init__(self, box: Any = None) -> None:
        """Make an empty mailbox, or use the actor of one."""
        if box is None:
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1, "scheduling_strategy": here}
            box = ray.remote(Box).options(**options).remote()
        self.box = box
        self.restarts = 0
        """Restarts of the workers that this process has allowed, or waited for."""
        self.posted: Any = None
        self.taking: Any = None
        self.stop = False
        """Whether the starting process has requested a stop, once `listen` was called."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Mailbox, (self.box,)

    def post(self, kind: str, **fields: Any) -> None:
        """Send a message."""
        self.posted = self.box.post.remote({"kind": kind, **fields})

    def flush(self) -> None:
        """Wait until the messages of this process have arrived."""
        if self.posted is not None:
            ray.wait([self.posted], timeout=FLUSH_SECONDS)

    def read(self, *, seconds: float) -> list[dict[str, Any]]:
        """Return the messages since the last call; none where the actor does not answer in time."""
        self.taking = self.taking or self.box.take.remote()
        if not ray.wait([self.taking], timeout=seconds)[0]:
            return []
        taking, self.taking = self.taking, None
        return ray.get(taking)

    def listen(self) -> None:
        """Look for a stop request now and then, beside the steps."""

        def look() -> None:
            with suppress(RayError):
                while not self.stop:
                    self.stop = ray.get(self.box.is_stopped.remote(""))
                    time.sleep(NOTICE_SECONDS)

        threading.Thread(target=look, daemon=True).start()

    def request_stop(self) -> None:
        """Request a stop after the next step."""
        self.box.request_stop.remote("")

    def allow_restart(self) -> None:
        """Let Ray's controller, which waits, start the workers once more."""
        self.restarts += 1
        self.box.allow_restarts.remote(self.restarts)

    def wait_for_restart(self) -> None:
        """Wait until the starting process allows one more."""
        self.restarts += 1
        while ray.get(self.box.num_restarts.remote()) < self.restarts:
            time.sleep(RESTART_SECONDS)

    def request_stop_of(self, trial: str) -> None:
        """Request a trial to stop after its epoch."""
        ray.get(self.box.request_stop.remote(trial))

    def stops(self, trial: str) -> bool:
        """Return whether a trial was requested to stop."""
        return ray.get(self.box.is_stopped.remote(trial))


class PostedLines:
    """Post what a terminal would show."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox
        self.posted_at = 0.0

    def step(self, *, epoch: int, phase: str, step: int, num_steps: int, loss: float | None) -> None:
        """Post a step, a few of them a second."""
        if time.monotonic() - self.posted_at >= NOTICE_SECONDS:
            self.mailbox.post("step", epoch=epoch, phase=phase, step=step, num_steps=num_steps, loss=loss)
            self.posted_at = time.monotonic()

    def epoch(self, row: dict[str, Any]) -> None:
        """Post an epoch that has ended."""
        self.mailbox.post("epoch", row=row)


class PostedLog(logging.Handler):
    """Post log lines."""

    def __init__(self, mailbox: Mailbox) -> None:
        super().__init__()
        self.mailbox = mailbox

    def emit(self, record: logging.LogRecord) -> None:
        """Post one line, with the URLs of working copies, whose paths are this machine's."""
        self.mailbox.post("log", level=record.levelno, text=shown(record.getMessage()))
