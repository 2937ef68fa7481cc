"""Processes that Ray lost: why, and how often since the last checkpoint."""

from __future__ import annotations

import re
from pathlib import Path

from mprd.errors import UserError
from mprd.parallel.cluster import shorten
from mprd.storage.copies import changed_at

LOSSES = {
    r"low on memory|OUT_OF_MEMORY": "{} ran out of memory: run fewer processes there, or smaller sizes",
    "will be taken": "{} will be taken",
    r"node has died|node was terminated|node died|Node failure": "{} went away",
    # Ray's list of causes for a closed connection
    r"OOM killer": "its process on {} was killed, perhaps as memory ran out",
}
"""What Ray's errors about a lost process have in them, and what that means."""


def explain_loss(error: BaseException) -> str:
    """Return in one line why a process was lost, or what it raised."""
    error = getattr(error, "health_check_failure", error)
    text = str(error)
    host = re.search(r"(?:ip[:=]|machine) ?([\w.:]+)", text)
    for pattern, meaning in LOSSES.items():
        if re.search(pattern, text):
            return meaning.format(f"machine {host[1]}" if host else "its machine")
    # the last line has the cause where Ray puts a heading above it
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return shorten(f"{type(error).__name__}: {lines[-1] if lines else 'no message'}")


class Losses:
    """Count how often the processes of a run were lost since its last checkpoint."""

    def __init__(self, limit: int, checkpoint: Path) -> None:
        self.limit, self.checkpoint = limit, checkpoint
        self.count, self.saved_at = 0, 0

    def add(self, reason: str, *, go_on: str) -> str:
        """Count a loss, and return a line about it; raise UserError with `go_on` beyond the limit."""
        saved_at = changed_at(self.checkpoint)
        self.count = self.count + 1 if saved_at == self.saved_at else 1
        self.saved_at = saved_at
        if self.count > self.limit:
            times = f"{self.count} times" if self.count > 1 else "once"
            raise UserError(f"lost {times} without a new checkpoint (train.max_restarts), at last: {reason}; {go_on}")
        return f"lost ({reason}); going on from the last checkpoint ({self.count} of {self.limit} times)"
