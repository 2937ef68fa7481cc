"""Messages between a run's first worker and the process that started it, as files in the run folder.

All machines of a run share that storage, and the files survive a worker that is killed.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

NOTICE_SECONDS = 0.25
"""Least seconds between two messages of a step."""


class Mailbox:
    """Messages of the first worker, in order, and a stop request in the other direction."""

    def __init__(self, run: Path, name: str = "messages") -> None:
        """Use the file of one writer, `name`; on shared storage a file has one machine that appends."""
        self.run = run
        self.folder = run / ".live"
        self.messages = self.folder / f"{name}.jsonl"
        self.stop_file = self.folder / "stop"
        self.error_file = self.folder / "error.txt"
        self.num_read = 0

    def open(self) -> None:
        """Start empty; the starting process calls this once."""
        self.close()
        self.folder.mkdir(parents=True)

    def close(self) -> None:
        """Remove all messages."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def post(self, kind: str, **fields: Any) -> None:
        """Append a message."""
        with self.messages.open("a") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the messages since the last call; an unfinished line is left for the next."""
        if not self.messages.is_file():
            return []
        with self.messages.open("rb") as file:
            file.seek(self.num_read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.num_read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    @property
    def stop(self) -> bool:
        """Whether the starting process has requested a stop."""
        return self.stop_file.exists()

    def request_stop(self) -> None:
        """Request a stop after the next step."""
        self.stop_file.touch()

    @property
    def error(self) -> str | None:
        """The user's error that ended the run, if any: a restart would not cure it."""
        return self.error_file.read_text("utf-8", "surrogateescape") if self.error_file.exists() else None

    def fail(self, message: str) -> None:
        """Record an error; the first one stays."""
        if not self.error_file.exists():
            self.error_file.write_text(message, "utf-8", "surrogateescape")


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
        """Post one line."""
        self.mailbox.post("log", level=record.levelno, text=record.getMessage())
