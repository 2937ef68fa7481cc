"""The trials of a study while they run: a live table, or a line each minute where there is no terminal."""

from __future__ import annotations

import statistics
import sys
import threading
import time
from datetime import timedelta

from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from mprd.runs.console import HEARTBEAT_SECONDS, is_set
from mprd.tune.trial import Trial
from mprd.tune.trial_queue import Pace, TrialQueue

MAX_ENDED = 8
"""Trials that ended and are still in the table."""


class TrialBoard:
    """Show what the queue knows of its trials while the block runs."""

    def __init__(self, queue: TrialQueue, console: Console, *, num_epochs: int) -> None:
        """Args:
        num_epochs: of a trial that does not set `train.epochs` itself.
        """
        self.queue = queue
        self.console = console
        self.num_epochs = num_epochs
        self.is_over = threading.Event()
        self.live = Live(
            get_renderable=self.table,
            console=console,
            refresh_per_second=1,
            transient=True,
            # where it goes elsewhere, it stays there
            redirect_stderr=sys.stderr.isatty(),
        )

    def __enter__(self) -> TrialBoard:
        if self.console.is_terminal:
            self.live.start()
        else:
            threading.Thread(target=self.beat, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.is_over.set()
        self.live.stop()

    def beat(self) -> None:
        """Print a line each minute."""
        while not self.is_over.wait(HEARTBEAT_SECONDS):
            self.console.print(self.heartbeat(), highlight=False, soft_wrap=True)

    def heartbeat(self) -> str:
        """Return one line: how many trials ended, and where each running one is."""
        parts = [f"{trial.point}, seed {trial.seed}: {self.state(trial)}" for trial, _ in self.shown(running=True)]
        return "; ".join([self.summary(), *parts])

    def table(self) -> Table:
        """Return the table of the running trials, below the last that ended."""
        objective = self.queue.objective
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=self.summary(), caption_justify="left")
        table.add_column("trial", overflow="fold")
        for title in ("seed", "state", objective, "left"):
            table.add_column(title, justify="right", no_wrap=True)
        for trial, pace in [*self.shown(running=False)[-MAX_ENDED:], *self.shown(running=True)]:
            score = f"{pace.row[objective]:.3f}" if is_set(pace.row, objective) else "-"
            left = self.seconds_left(trial, pace) if trial.state == "running" else None
            table.add_row(trial.point, str(trial.seed), self.state(trial), score, in_words(left))
        return table

    def shown(self, *, running: bool) -> list[tuple[Trial, Pace]]:
        """Return the trials of this session that run, or those that ended, in order."""
        paces = dict(self.queue.paces)
        trials = [trial for trial in [*self.queue.trials] if trial.number in paces]
        return [(trial, paces[trial.number]) for trial in trials if (trial.state == "running") == running]

    def state(self, trial: Trial) -> str:
        """Return how a trial ended, or the epoch that it is in."""
        if trial.state != "running":
            return trial.state
        row = self.queue.paces[trial.number].row
        return f"epoch {row['epoch'] + 1}/{self.epochs(trial)} done" if row else "no epoch yet"

    def epochs(self, trial: Trial) -> int:
        return int(trial.settings.get("train.epochs", self.num_epochs))

    def seconds_left(self, trial: Trial, pace: Pace) -> float | None:
        """Estimate the remaining seconds of a running trial from its epochs in this session; None before the first."""
        if not pace.row:
            return None
        return max(0.0, (self.epochs(trial) - pace.row["epoch"] - 1) * pace.epoch_seconds + pace.at - time.monotonic())

    def summary(self) -> str:
        """Return how many trials ended, and the estimated time of the others."""
        queue, running = self.queue, self.shown(running=True)
        ended = sum(trial.state != "running" for trial in [*queue.trials])
        text = f"{ended} of {queue.num_trials} trials ended, {len(running)} running"
        known = [(trial, pace) for trial, pace in [*self.shown(running=False), *running] if pace.row]
        if not known:
            return text
        whole = statistics.fmean(self.epochs(trial) * pace.epoch_seconds for trial, pace in known)
        lefts = [self.seconds_left(trial, pace) for trial, pace in running]
        work = queue.num_left * whole + sum(whole if left is None else left for left in lefts)
        return f"{text}, about {in_words(work / max(1, len(running)))} left"


def in_words(seconds: float | None) -> str:
    return "-" if seconds is None else str(timedelta(seconds=round(seconds)))
