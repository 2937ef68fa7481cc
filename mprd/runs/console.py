"""Console output of a run: progress, a line per epoch, the final table."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

FIGURES = (
    ("mAP", "mAP"),
    ("rank1", "Rank-1"),
    ("rank5", "Rank-5"),
    ("rank10", "Rank-10"),
    ("mAP_trapezoid", "mAP, trapezoid"),
    ("mINP", "mINP"),
    ("mAP_before_bn", "mAP before BN"),
    ("mAP_reranked", "mAP re-ranked"),
    ("mAP_standardised", "mAP, cameras taken out"),
    ("pair_precision", "pair precision"),
    ("pair_recall", "pair recall"),
    ("labelled_precision", "known precision"),
    ("labelled_recall", "known recall"),
    ("label_free_score", "label-free score"),
    ("silhouette", "silhouette of P"),
)
"""Columns of metrics.jsonl that tables show, with their labels."""


class EpochLines:
    """Show a progress bar for the running epoch if on a terminal, and print a line for each finished epoch."""

    def __init__(self, console: Console, *, num_epochs: int) -> None:
        self.console = console
        self.num_epochs = num_epochs
        self.started: dict[int, float] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None

    def __enter__(self) -> EpochLines:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, *, epoch: int, phase: str, step: int, num_steps: int, loss: float | None) -> None:
        """Update the progress bar."""
        self.started.setdefault(epoch, time.monotonic())
        if self.task is None:
            self.task = self.progress.add_task("", figures="")
        self.progress.update(
            self.task,
            description=f"epoch {epoch + 1}/{self.num_epochs} {phase}",
            completed=step,
            total=num_steps,
            figures="" if loss is None else f"loss {loss:.3f}",
        )

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the line of a finished epoch."""
        self.console.print(
            epoch_line(row, self.num_epochs, self.seconds_left(row["epoch"])), highlight=False, soft_wrap=True
        )

    def seconds_left(self, epoch: int) -> float:
        """Estimate the remaining seconds from the epochs of this process."""
        if not self.started:
            return 0.0
        first = min(self.started)
        elapsed = time.monotonic() - self.started[first]
        return elapsed / (epoch - first + 1) * (self.num_epochs - epoch - 1)


class ImageLine:
    """Show a progress bar for a pass over images if on a terminal, and measure its speed."""

    def __init__(self, console: Console, num_images: int) -> None:
        columns = (TextColumn("images"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn())
        left = (TimeRemainingColumn(), TextColumn("left, {task.fields[speed]:.0f} images/s"))
        self.progress = Progress(*columns, *left, console=console, transient=True, disable=not console.is_terminal)
        self.task = self.progress.add_task("", total=num_images, speed=0.0)
        self.started = time.monotonic()
        self.num_done = 0

    def __enter__(self) -> ImageLine:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def advance(self, num_images: int, is_earlier: bool) -> None:
        """Update the progress bar; images completed by an earlier call do not count for the speed."""
        if is_earlier:
            self.started = time.monotonic()
        else:
            self.num_done += num_images
        self.progress.update(self.task, advance=num_images, speed=self.speed())

    def speed(self) -> float:
        """Return images per second."""
        return self.num_done / max(1e-9, time.monotonic() - self.started)


def epoch_line(row: dict[str, Any], num_epochs: int, seconds_left: float) -> str:
    """Format the figures of an epoch as one line."""
    parts = [f"epoch {row['epoch'] + 1:>2}/{num_epochs}"]
    parts += [f"{name} {row[key]:.3f}" for key, name in (("cnn_loss", "loss"), ("gcn_loss", "gcn")) if is_set(row, key)]
    parts.append(f"|P| {row['positives']:.1f}")
    # shares over all images are preferred; without identities only those of labeled images exist
    source, of = ("pair", "") if "pair_precision" in row else ("labelled", " of labeled")
    shares = {f"{source}_precision": f"prec{of}", f"{source}_recall": f"rec{of}", "mAP": "mAP", "rank1": "R1"}
    parts += [f"{name} {100 * row[key]:.1f}" for key, name in shares.items() if is_set(row, key)]
    if is_set(row, "images_per_second"):
        parts.append(f"{row['images_per_second']:.0f} img/s")
    parts.append(f"{seconds_left / 60:.1f} min left")
    return "  ".join(parts)


def is_set(row: dict[str, Any], key: str) -> bool:
    """Return whether a figure is present and not None."""
    return row.get(key) is not None


def final_table(rows: list[dict[str, Any]], untrained: dict[str, float]) -> Table:
    """Return the figures of the epochs that `chosen_rows` picks, and of the untrained network."""
    columns = {f"{name}\n(epoch {row['epoch'] + 1})": row for name, row in chosen_rows(rows).items()}
    return figure_table(columns | ({"untrained": untrained} if untrained else {}))


def figure_table(columns: dict[str, dict[str, Any]]) -> Table:
    """Return a table with the figures of each row as a column, in percent."""
    table = Table(title="Result, in percent")
    table.add_column("figure")
    for name in columns:
        table.add_column(name, justify="right")
    for key, name in FIGURES:
        if any(is_set(row, key) for row in columns.values()):
            table.add_row(name, *(f"{100 * row[key]:.1f}" if is_set(row, key) else "-" for row in columns.values()))
    return table


def chosen_rows(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pick the last epoch (the headline), the best by label-free score, and the best on test, by column title."""
    picks = {"last epoch": rows[-1]}
    evaluated = [row for row in rows if is_set(row, "mAP")]
    if evaluated:
        picks["by label-free score"] = max(evaluated, key=lambda row: row["label_free_score"])
        picks["best on test"] = max(evaluated, key=lambda row: row["mAP"])
    else:
        picks["by label-free score"] = max(rows, key=lambda row: row["label_free_score"])
    return picks
