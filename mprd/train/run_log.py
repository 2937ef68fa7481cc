"""log.txt of a run: log lines and a row for each epoch, written while the run goes on."""

from __future__ import annotations

import logging
from pathlib import Path

from mprd.cli import OneLine
from mprd.runs.console import EpochLines
from mprd.text import new_console

logger = logging.getLogger("mprd")


class RunLog:
    """Append to the file what a terminal would show."""

    def __init__(self, path: Path, *, num_epochs: int) -> None:
        self.file = path.open("a", encoding="utf-8", errors="backslashreplace")
        console = new_console(file=self.file, force_terminal=False, color_system=None)
        self.lines = EpochLines(console, num_epochs=num_epochs)
        self.handler = logging.StreamHandler(self.file)
        self.handler.setFormatter(OneLine("%(asctime)s %(levelname)s: %(message)s"))
        logger.addHandler(self.handler)

    def close(self) -> None:
        logger.removeHandler(self.handler)
        self.file.close()
