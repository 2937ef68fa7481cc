"""Run the loop in this process: data, run folder, signals, progress, checkpoints.

`run_local` is the whole of it; `train` is the part that each worker of a larger run takes.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import FrameType
from typing import Any, Protocol

import torch
from rich.console import Console

from mprd.config.schema import Config
from mprd.data.datasets import ReidDataset
from mprd.engine.state import TrainState
from mprd.engine.trainer import CHECK_STEPS, Hooks, Trainer, fit, ignore
from mprd.errors import Interrupted, UserError
from mprd.evaluate.epoch_metrics import COLLAPSED, epoch_row, untrained_row
from mprd.parallel.backends import choose_builder, choose_search
from mprd.runs.console import EpochLines, closing_lines, final_table
from mprd.runs.curves import plot_curves
from mprd.runs.dataset import open_dataset
from mprd.runs.folder import RunFolder, write_text
from mprd.runs.lock import held
from mprd.runtime import checkpoint
from mprd.runtime.device import choose_device, keep_freed_memory, set_threads
from mprd.runtime.distributed import WorkerGroup
from mprd.train.profiler import Profile
from mprd.train.trackers import Trackers, check_tracker

logger = logging.getLogger("mprd")

DRAW_SHARE = 50
"""Curves are drawn again when so many times as long has passed as drawing took: half a second each, as long as a short
epoch, adds up."""


def run_local(
    config: Config,
    folder: RunFolder,
    *,
    resume: bool,
    console: Console,
    on_row: Callable[[dict[str, Any]], None] = ignore,
    profiled: bool = False,
) -> list[dict[str, Any]]:
    """Train to the last epoch and write the table and the curves; return the rows of all epochs.

    Args:
        profiled: also write and print where the time went, and keep a trace of a few steps.
        on_row: called with each epoch's row once it is written; what it raises ends the run.

    Raises UserError for the person's mistakes, Interrupted when a signal asked to stop (the state is saved).
    """
    set_threads(config.train.threads)
    keep_freed_memory()
    device = choose_device(config.train.device)
    check_tracker(config.train.tracker)
    dataset = open_dataset(config, folder)
    if not resume:
        folder.create(config)
    with held(folder.path):
        with watch_signals(console) as signals, EpochLines(console, num_epochs=config.train.epochs) as lines:
            recorder = Recorder(config, folder, signals=signals, lines=lines, on_row=on_row)
            profile = Profile(device, folder.path / "trace.json")
            attach = profile.attach if profiled else ignore
            train(config, dataset, folder, device=device, recorder=recorder, resume=resume, attach=attach)
        finish(folder, recorder.rows, console)
        if profiled:
            write_text(folder.path / "profile.txt", profile.table())
            console.print(profile.table(), highlight=False)
    return recorder.rows


def train(
    config: Config,
    dataset: ReidDataset,
    folder: RunFolder,
    *,
    device: torch.device,
    recorder: Recorder | Follower,
    resume: bool,
    workers: WorkerGroup | None = None,
    attach: Callable[[Trainer], None] = ignore,
) -> None:
    """Train to the last epoch, from the last checkpoint when resuming.

    Args:
        attach: called with the trainer before it does anything.

    Raises UserError where an accelerator's memory is too small, naming the settings that help.
    """
    with explained_memory(config):
        size = 1 if workers is None else workers.size
        hooks = replace(
            recorder.hooks(),
            build_subgraphs=choose_builder(config.subgraphs, num_workers=size),
            search_all=choose_search(config.neighbors, num_workers=size),
        )
        trainer = Trainer(config, dataset, device=device, hooks=hooks, workers=workers)
        attach(trainer)
        try:
            if resume:
                trainer.state.load_state_dict(checkpoint.load(folder.last), path=folder.last)
                recorder.forget_from(trainer.state.epoch)
            else:
                trainer.fill_memory()
                recorder.begin(trainer)
            fit(trainer)
        except Interrupted:
            recorder.close()
            raise
        recorder.close()


@contextmanager
def explained_memory(config: Config) -> Iterator[None]:
    """Turn an accelerator's out-of-memory error into one line with the settings that help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        c = config
        raise UserError(
            f"out of memory on the accelerator ({str(error).splitlines()[0].split('. ')[0]}); what helps: "
            f"train.batch_size (now {c.train.batch_size}), data.height and data.width ({c.data.height}, "
            f"{c.data.width}), backbone.name ({c.backbone.name}), backbone.last_stride=2, eval.batch_size "
            f"({c.eval.batch_size}), gcn.batch_size ({c.gcn.batch_size}), neighbors.k_max ({c.neighbors.k_max}), "
            "or more workers"
        ) from None


def finish(folder: RunFolder, rows: list[dict[str, Any]], console: Console) -> None:
    """Write and print the final table."""
    if not rows:
        raise UserError(f"{folder.path}: the run has no epochs to report")
    table = final_table(rows, folder.read_untrained())
    plain = Console(record=True, width=100, file=io.StringIO())
    plain.print(table)
    write_text(folder.path / "table.txt", plain.export_text())
    console.print(table)
    console.print(closing_lines(folder.path), highlight=False, soft_wrap=True)


class Lines(Protocol):
    """Where progress is shown."""

    def step(self, *, epoch: int, phase: str, step: int, num_steps: int, loss: float | None) -> None:
        """Show a step."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Show an epoch that has ended."""


class Wish(Protocol):
    """Whether somebody has asked to stop."""

    @property
    def stop(self) -> bool:
        """True from then on."""


class Signals:
    """Whether Ctrl-C or SIGTERM has asked to stop."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.stop = False

    def ask(self, number: int, _frame: FrameType | None) -> None:
        """Ask to stop after the step; a second Ctrl-C stops at once."""
        if self.stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.stop = True
        # a print in the middle of another is an error in Python; a notebook may take no bytes at all
        with suppress(OSError, ValueError):
            os.write(self.console.file.fileno(), b"\nstopping after this step; Ctrl-C again stops at once\n")


@contextmanager
def watch_signals(console: Console) -> Iterator[Signals]:
    """Turn Ctrl-C and SIGTERM into a wish to stop, for as long as the block runs."""
    signals = Signals(console)
    if threading.current_thread() is not threading.main_thread():
        # only the main thread may take signals; a worker's process has its own ways to be stopped
        yield signals
        return
    old = {number: signal.signal(number, signals.ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield signals
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Recorder:
    """Keep the run folder and the screen up to date; the first worker's task."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        *,
        signals: Wish,
        lines: Lines,
        workers: WorkerGroup | None = None,
        on_row: Callable[[dict[str, Any]], None] = ignore,
    ) -> None:
        self.config = config
        self.folder = folder
        self.signals = signals
        self.lines = lines
        self.workers = workers or WorkerGroup()
        self.on_row = on_row
        self.rows = folder.read_rows()
        self.trackers = Trackers(config, folder.path)
        self.saved_at = time.monotonic()
        self.steps_since = 0
        self.loss: float | None = None
        self.num_drawn, self.draw_at = 0, 0.0

    def hooks(self) -> Hooks:
        """Return the callables for `fit`."""
        return Hooks(after_step=self.after_step, after_epoch=self.after_epoch, checkpoint=self.checkpoint)

    def begin(self, trainer: Trainer) -> None:
        """Save the start, and what the network retrieves before it is trained."""
        self.say_limit(trainer)
        self.folder.write_untrained(untrained_row(trainer))
        self.save(trainer.state)

    def say_limit(self, trainer: Trainer) -> None:
        """Say how many positives an image has at most, or why a limit that was wanted is none."""
        pairs, meta, limit = self.config.pairs, self.config.meta, trainer.limit
        if limit is not None:
            logger.info(
                "pairs.limit: at most %d positives under an image's camera and %d under others, as labeled ones have",
                limit.same,
                limit.other,
            )
        elif pairs.limit and self.config.uses_meta and meta.num_ids > 0:
            logger.info("pairs.limit: none, for meta.labels may leave images of a person out (see meta.all_listed)")

    def forget_from(self, epoch: int) -> None:
        """Drop the rows of epochs that will be trained again."""
        self.rows = [row for row in self.rows if row["epoch"] < epoch]

    def after_step(self, state: TrainState, num_steps: int) -> None:
        """Move the live line, save when due, and stop when asked."""
        name, count = ("gcn_loss", "gcn_steps") if state.phase == "gcn" else ("cnn_loss", "images")
        if not state.stats.waiting or state.step % CHECK_STEPS == 0:
            self.loss = state.stats.mean(name, count)
        self.lines.step(epoch=state.epoch, phase=state.phase, step=state.step, num_steps=num_steps, loss=self.loss)
        self.steps_since += 1
        train = self.config.train
        is_due = bool(train.checkpoint_steps) and self.steps_since >= train.checkpoint_steps
        is_late = bool(train.checkpoint_seconds) and time.monotonic() - self.saved_at > train.checkpoint_seconds
        # all workers stop behind the same step, or those that went on would wait for the others for ever
        stop = self.workers.any(self.signals.stop)
        if is_due or is_late or stop:
            self.save(state)
        if stop:
            raise Interrupted(f"stopped in epoch {state.epoch + 1}; go on with --resume {self.folder.path}")

    def checkpoint(self, state: TrainState) -> None:
        """Save between two epochs, and stop when asked."""
        self.save(state)
        if self.workers.any(self.signals.stop) and state.epoch < self.config.train.epochs:
            raise Interrupted(f"stopped after epoch {state.epoch}; go on with --resume {self.folder.path}")

    def save(self, state: TrainState) -> None:
        """Save the state and set the clock back."""
        self.folder.save(state.state_dict())
        self.saved_at, self.steps_since = time.monotonic(), 0

    def after_epoch(self, trainer: Trainer) -> None:
        """Evaluate, keep the best by the label-free score, and write the row everywhere."""
        row = epoch_row(trainer)
        if row["label_free_score"] > trainer.state.best_score:
            trainer.state.best_score = row["label_free_score"]
            self.folder.save_best(trainer.state.state_dict())
        self.rows.append(row)
        self.folder.write_rows(self.rows)
        self.trackers.log(row)
        if time.monotonic() > self.draw_at:
            self.draw()
        self.lines.epoch(row)
        self.warn(row)
        self.on_row(row)

    def warn(self, row: dict[str, Any]) -> None:
        """Say what went wrong in an epoch without stopping it; lists that are cut, the first time alone."""
        if row["neighbors_capped"] and not any(earlier["neighbors_capped"] for earlier in self.rows[:-1]):
            logger.warning(
                "neighbors.k_max = %d cut %d neighbor lists in epoch %d; metrics.jsonl goes on counting",
                self.config.neighbors.k_max,
                row["neighbors_capped"],
                row["epoch"] + 1,
            )
        if row["mean_random_cosine"] > COLLAPSED:
            logger.warning(
                "collapse: random images have a mean cosine of %.3f; features no longer tell images apart",
                row["mean_random_cosine"],
            )

    def draw(self) -> None:
        """Draw the curves, and say when it is worth while again."""
        started = time.monotonic()
        plot_curves(self.rows, self.folder.path / "curves.png")
        ended = time.monotonic()
        self.num_drawn, self.draw_at = len(self.rows), ended + DRAW_SHARE * (ended - started)

    def close(self) -> None:
        """Draw what is not drawn yet, and close the event file and the tracker."""
        if self.num_drawn != len(self.rows):
            self.draw()
        self.trackers.close()


class Follower:
    """Stand in for the recorder where another worker records: take part in what all must do, and write nothing."""

    def __init__(
        self, config: Config, workers: WorkerGroup, *, on_row: Callable[[dict[str, Any]], None] = ignore
    ) -> None:
        self.config = config
        self.workers = workers
        self.on_row = on_row

    def hooks(self) -> Hooks:
        """Return the callables for `fit`."""
        return Hooks(after_step=self.after_step, after_epoch=self.after_epoch, checkpoint=self.checkpoint)

    def after_step(self, state: TrainState, _num_steps: int) -> None:
        """Stop when the recorder does."""
        if self.workers.any(False):
            raise Interrupted(f"stopped in epoch {state.epoch + 1}")

    def after_epoch(self, trainer: Trainer) -> None:
        """Extract for the recorder's evaluation."""
        self.on_row(epoch_row(trainer))

    def checkpoint(self, state: TrainState) -> None:
        """Stop when the recorder does."""
        if self.workers.any(False) and state.epoch < self.config.train.epochs:
            raise Interrupted(f"stopped after epoch {state.epoch}")

    def begin(self, trainer: Trainer) -> None:
        """Extract for the recorder's evaluation of the untrained network."""
        untrained_row(trainer)

    def forget_from(self, epoch: int) -> None:
        """Have nothing to forget."""

    def save(self, state: TrainState) -> None:
        """Leave saving to the recorder."""

    def close(self) -> None:
        """Have nothing to close."""
