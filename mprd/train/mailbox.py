"""Files in the run folder through which a run's first worker and the process that started it talk.

They lie on the storage that all machines of a run share anyway, and outlive a worker that is killed.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

NOTICE_SECONDS = 0.25
"""Least time between two notices of a step."""


class Mailbox:
    """Notices from the first worker, in order; and a wish to stop, the other way."""

    def __init__(self, run: Path) -> None:
        self.folder = run / ".live"
        self.notices = self.folder / "notices.jsonl"
        self.stop_file = self.folder / "stop"
        self.error_file = self.folder / "error.txt"
        self.num_read = 0

    def open(self) -> None:
        """Begin with an empty board; the starting process does this once."""
        self.close()
        self.folder.mkdir(parents=True)

    def close(self) -> None:
        """Take the board away."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def post(self, kind: str, **fields: Any) -> None:
        """Add a notice."""
        with self.notices.open("a") as file:
            file.write(json.dumps({"kind": kind, **fields}) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the notices since the last call; a line that is still being written waits for the next."""
        if not self.notices.is_file():
            return []
        with self.notices.open("rb") as file:
            file.seek(self.num_read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self.num_read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]

    @property
    def stop(self) -> bool:
        """Whether the starting process wants the run to stop."""
        return self.stop_file.exists()

    def ask_to_stop(self) -> None:
        """Want the run to stop behind its next step."""
        self.stop_file.touch()

    @property
    def error(self) -> str | None:
        """The person's mistake that ended the run, if one did: starting again would not cure it."""
        return self.error_file.read_text() if self.error_file.exists() else None

    def fail(self, message: str) -> None:
        """Leave word of a mistake; the first one stays."""
        if not self.error_file.exists():
            self.error_file.write_text(message)


class PostedLines:
    """Post what a terminal would show."""

    def __init__(self, board: Mailbox) -> None:
        self.board = board
        self.posted_at = 0.0

    def step(self, *, epoch: int, phase: str, step: int, num_steps: int, loss: float | None) -> None:
        """Post a step, a few of them a second."""
        if time.monotonic() - self.posted_at >= NOTICE_SECONDS:
            self.board.post("step", epoch=epoch, phase=phase, step=step, num_steps=num_steps, loss=loss)
            self.posted_at = time.monotonic()

    def epoch(self, row: dict[str, Any]) -> None:
        """Post an epoch that has ended."""
        self.board.post("epoch", row=row)


class PostedLog(logging.Handler):
    """Post log lines."""

    def __init__(self, board: Mailbox) -> None:
        super().__init__()
        self.board = board

    def emit(self, record: logging.LogRecord) -> None:
        """Post one line."""
        self.board.post("log", level=record.levelno, text=record.getMessage())
