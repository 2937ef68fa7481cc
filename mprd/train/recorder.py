"""Write what a run leaves and show its progress, from the callbacks of `fit`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Protocol

from mprd.config.schema import Config
from mprd.engine.callbacks import Callbacks, ignore
from mprd.engine.trainer import CHECK_STEPS, Trainer
from mprd.errors import Interrupted
from mprd.evaluate.epoch_metrics import COLLAPSED, epoch_row, untrained_row
from mprd.runs.curves import plot_curves
from mprd.runs.folder import RunFolder
from mprd.runtime.distributed import WorkerGroup
from mprd.runtime.spans import span
from mprd.text import quoted
from mprd.train.run_log import RunLog
from mprd.train.signals import StopRequest
from mprd.train.trackers import Trackers

logger = logging.getLogger("mprd")

DRAW_SHARE = 50
"""Curves are redrawn after this many times the seconds that drawing took: half a second adds up in short epochs."""


class ProgressLines(Protocol):
    """Where progress is shown."""

    def step(self, *, epoch: int, phase: str, step: int, num_steps: int, loss: float | None) -> None:
        """Show a step."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Show an epoch that has ended."""


class Recorder:
    """Keep run folder and screen up to date.

    Every rank has one, as all take part in evaluation and must stop behind the same step; only the first writes.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        *,
        stop: StopRequest,
        lines: ProgressLines,
        workers: WorkerGroup | None = None,
        on_row: Callable[[dict[str, Any]], None] = ignore,
    ) -> None:
        """Continue the rows that the folder holds.

        Args:
            on_row: called on every rank with each epoch's row, `{}` on all but the first; what it raises ends the run.
        """
        self.config = config
        self.folder = folder
        self.stop = stop
        self.workers = workers or WorkerGroup()
        self.on_row = on_row
        self.rows = folder.read_rows()
        self.lines = [lines]
        self.log: RunLog | None = None
        self.trackers: Trackers | None = None
        if self.workers.is_first:
            self.log = RunLog(folder.path / "log.txt", num_epochs=config.train.epochs)
            self.lines.append(self.log.lines)
            self.trackers = Trackers(config, folder.path)
        self.saved_at = time.monotonic()
        self.loss: float | None = None
        self.num_drawn, self.draw_at = 0, 0.0

    def callbacks(self) -> Callbacks:
        """Return the callbacks for `fit`."""
        return Callbacks(self.after_step, self.after_epoch, self.between_epochs)

    def begin(self, trainer: Trainer) -> None:
        """Save the start, and the retrieval figures of the untrained network."""
        row = untrained_row(trainer)
        if self.workers.is_first:
            self.log_limit(trainer)
            self.folder.write_untrained(row)
            self.save(trainer)

    def forget_from(self, epoch: int) -> None:
        """Drop the rows of epochs that will be trained again."""
        self.rows = [row for row in self.rows if row["epoch"] < epoch]

    def after_step(self, trainer: Trainer, num_steps: int) -> None:
        """Show the step, save when due, and stop when requested."""
        self.show_step(trainer, num_steps)
        # without agreement on the step, ranks that go on would wait for the others for ever
        stop = self.workers.any(self.stop.stop)
        if stop or self.is_due():
            self.save(trainer)
        if stop:
            raise Interrupted(
                f"stopped in epoch {trainer.state.epoch + 1}; go on with --resume {quoted(self.folder.path)}"
            )

    def show_step(self, trainer: Trainer, num_steps: int) -> None:
        """Update the live line; the losses of an accelerator are read every CHECK_STEPS steps."""
        if not self.workers.is_first:
            return
        state, stats = trainer.state, trainer.stats
        name, count = ("gcn_loss", "gcn_steps") if state.phase == "gcn" else ("cnn_loss", "images")
        if not stats.pending or state.step % CHECK_STEPS == 0:
            self.loss = stats.mean(name, count)
        for lines in self.lines:
            lines.step(epoch=state.epoch, phase=state.phase, step=state.step, num_steps=num_steps, loss=self.loss)

    def is_due(self) -> bool:
        """Return whether the next checkpoint is due."""
        seconds = self.config.train.checkpoint_seconds
        return seconds > 0 and time.monotonic() - self.saved_at > seconds

    def between_epochs(self, trainer: Trainer) -> None:
        """Save, stop when requested, and draw the curves when due."""
        self.save(trainer)
        epoch = trainer.state.epoch
        if self.workers.any(self.stop.stop) and epoch < self.config.train.epochs:
            raise Interrupted(f"stopped after epoch {epoch}; go on with --resume {quoted(self.folder.path)}")
        if self.workers.is_first and time.monotonic() > self.draw_at:
            self.draw()

    def save(self, trainer: Trainer) -> None:
        """Write the last checkpoint."""
        if self.workers.is_first:
            with span("saving"):
                self.folder.save(trainer.state_dict())
        self.saved_at = time.monotonic()

    def after_epoch(self, trainer: Trainer) -> None:
        """Evaluate, keep the best checkpoint by the label-free score, and write the row everywhere."""
        with span("evaluation"):
            row = epoch_row(trainer)
            if self.workers.is_first:
                self.write_row(row, trainer)
        self.on_row(row)

    def write_row(self, row: dict[str, Any], trainer: Trainer) -> None:
        """Write an epoch's row to folder, trackers, curves and screen."""
        if row["label_free_score"] > trainer.state.best_score:
            trainer.state.best_score = row["label_free_score"]
            self.folder.save_best(trainer.state_dict())
        self.rows.append(row)
        self.folder.write_rows(self.rows)
        if self.trackers is not None:
            self.trackers.log(row)
        for lines in self.lines:
            lines.epoch(row)
        self.warn(row)

    def log_limit(self, trainer: Trainer) -> None:
        """Log the limit of positives, or why `pairs.limit` sets none."""
        pairs, meta, limit = self.config.pairs, self.config.meta, trainer.limit
        if limit is not None:
            logger.info(
                "pairs.limit: at most %d positives under an image's camera and %d under others, by the labeled ones",
                limit.same,
                limit.other,
            )
        elif pairs.limit and meta.num_ids > 0 and not meta.is_whole:
            logger.info(
                "pairs.limit: none, and no length of J's lists, for meta.labels may leave images of an identity out "
                "(see meta.all_listed)"
            )

    def warn(self, row: dict[str, Any]) -> None:
        """Log lists that `neighbors.k_max` cuts, once, and features that have collapsed."""
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
        """Draw the curves, and schedule the next redraw; a stop, which has seconds, leaves them to the resumed run."""
        if self.stop.stop:
            return
        started = time.monotonic()
        plot_curves(self.rows, self.folder.path / "curves.png")
        ended = time.monotonic()
        self.num_drawn, self.draw_at = len(self.rows), ended + DRAW_SHARE * (ended - started)

    def close(self) -> None:
        """Close trackers and log, and draw the last epochs."""
        if self.log is None or self.trackers is None:
            return
        self.trackers.close()
        self.log.close()
        if self.num_drawn != len(self.rows):
            self.draw()
