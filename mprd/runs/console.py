"""Console output of a run: progress, a line per epoch, the final table."""

from __future__ import annotations

import io
import math
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from rich import box
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

from mprd.errors import UserError
from mprd.runs.folder import RunFolder, write_text
from mprd.storage.copies import push
from mprd.text import new_console, quoted

FIGURES = (
    ("mAP", "mAP"),
    ("rank1", "Rank-1"),
    ("rank5", "Rank-5"),
    ("rank10", "Rank-10"),
    ("mAP_trapezoid", "mAP, trapezoid"),
    ("mINP", "mINP"),
    ("mAP_before_bn", "mAP before BN"),
    ("mAP_reranked", "mAP re-ranked"),
    ("mAP_whitened", "mAP, whitened"),
    ("pair_precision", "pair precision"),
    ("pair_recall", "pair recall"),
    ("labelled_precision", "known precision"),
    ("labelled_recall", "known recall"),
    ("label_free_score", "label-free score"),
    ("silhouette", "silhouette of P"),
)
"""Columns of metrics.jsonl that tables show, with their labels."""

HEARTBEAT_SECONDS = 60.0
"""Longest silence where there is no terminal for a live display."""

SHORT_NAMES = {"last epoch": "last", "by label-free score": "label-free"}
"""Titles of a table that fits 80 columns."""


class EpochLines:
    """Show a progress bar for the running epoch if on a terminal, and print a row for each finished epoch."""

    def __init__(self, console: Console, *, num_epochs: int) -> None:
        self.console = console
        self.num_epochs = num_epochs
        self.started: dict[int, float] = {}
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            TextColumn("left in this phase"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self.task: TaskID | None = None
        self.titles = ""
        self.printed = time.monotonic()

    def __enter__(self) -> EpochLines:
        self.progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def step(self, *, epoch: int, phase: str, step: int, num_steps: int, loss: float | None) -> None:
        """Update the progress bar; without a terminal print a line where none has been for HEARTBEAT_SECONDS."""
        now = time.monotonic()
        self.started.setdefault(epoch, now)
        title, figures = f"epoch {epoch + 1}/{self.num_epochs} {phase}", "" if loss is None else f"loss {loss:.3f}"
        if self.progress.disable:
            if now - self.printed >= HEARTBEAT_SECONDS:
                self.printed = now
                self.console.print(f"{title}  step {step}/{num_steps}  {figures}", highlight=False, soft_wrap=True)
            return
        if self.task is None:
            self.task = self.progress.add_task("", figures="")
        self.progress.update(self.task, description=title, completed=step, total=num_steps, figures=figures)

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the row of a finished epoch, under titles when they change."""
        self.printed = time.monotonic()
        cells = epoch_cells(row, self.num_epochs, self.seconds_left(row["epoch"]))
        titles = "".join(title.rjust(width) for title, width, _ in cells)
        if titles != self.titles:
            self.console.print(titles, style="bold", highlight=False, soft_wrap=True)
            self.titles = titles
        self.console.print("".join(cell.rjust(width) for _, width, cell in cells), highlight=False, soft_wrap=True)

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


def epoch_cells(row: dict[str, Any], num_epochs: int, seconds_left: float) -> list[tuple[str, int, str]]:
    """Return title, width and text of each cell of an epoch's row; at most 79 characters wide in all."""
    # shares over all images are preferred; without identities only those of labeled images exist
    source, of = ("pair", "") if "pair_precision" in row else ("labelled", " known")
    figures = (
        ("loss", 7, "cnn_loss", ".3f", 1),
        ("gcn", 7, "gcn_loss", ".3f", 1),
        ("|P|", 7, "positives", ".1f", 1),
        (f"prec{of}", 6 + len(of), f"{source}_precision", ".1f", 100),
        (f"rec{of}", 6 + len(of), f"{source}_recall", ".1f", 100),
        ("mAP", 6, "mAP", ".1f", 100),
        ("R1", 6, "rank1", ".1f", 100),
        ("img/s", 7, "images_per_second", ".0f", 1),
    )
    cells = [("epoch", 7, f"{row['epoch'] + 1}/{num_epochs}")]
    cells += [
        (title, width, format(scale * row[key], form) if is_set(row, key) else "-")
        for title, width, key, form, scale in figures
    ]
    return [*cells, ("left", 8, str(timedelta(seconds=round(seconds_left))))]


def finish(folder: RunFolder, rows: list[dict[str, Any]], console: Console) -> None:
    """Write and print the final table."""
    if not rows:
        raise UserError(f"{folder.metrics_file}: has no rows of the epochs of this run; {folder.last.name} is whole")
    table = final_table(rows, folder.read_untrained())
    plain = new_console(record=True, width=100, file=io.StringIO())
    plain.print(table)
    write_text(folder.path / "table.txt", plain.export_text())
    push(folder.path)
    console.print(table)
    console.print(closing_lines(folder.path), highlight=False, soft_wrap=True)


def closing_lines(folder: Path) -> str:
    """Name a finished run's files and the next commands to type."""
    return (
        f"files  {folder}\n"
        "         table.txt  curves.png  metrics.jsonl  checkpoints/last.pt\n"
        f"next   mprd report {quoted(folder)}\n"
        f"       mprd search {quoted(folder)} --gallery CROPS --query IMAGE"
    )


def is_set(row: dict[str, Any], key: str) -> bool:
    """Return whether a figure is present and not None."""
    return row.get(key) is not None


def final_table(rows: list[dict[str, Any]], untrained: dict[str, float]) -> Table:
    """Return the figures of the epochs that `chosen_rows` picks, and of the untrained network."""
    columns = {
        f"{SHORT_NAMES.get(name, name)}\nepoch {row['epoch'] + 1}": row for name, row in chosen_rows(rows).items()
    }
    return figure_table(columns | ({"untrained": untrained} if untrained else {}))


def figure_table(columns: dict[str, dict[str, Any]]) -> Table:
    """Return a table with the figures of each row as a column, in percent."""
    table = Table(title="Result, in percent", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for key, name in FIGURES:
        if any(is_set(row, key) for row in columns.values()):
            table.add_row(name, *(f"{100 * row[key]:.1f}" if is_set(row, key) else "-" for row in columns.values()))
    return table


def score_of(row: dict[str, Any]) -> float:
    """Return the label-free score of a row; the lowest where it is missing."""
    return row["label_free_score"] if is_set(row, "label_free_score") else -math.inf


def chosen_rows(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Pick the last epoch (the headline), the best by label-free score, and the best on test, by column title."""
    picks = {"last epoch": rows[-1]}
    evaluated = [row for row in rows if is_set(row, "mAP")]
    if evaluated:
        picks["by label-free score"] = max(evaluated, key=score_of)
        picks["best on test"] = max(evaluated, key=lambda row: row["mAP"])
    else:
        picks["by label-free score"] = max(rows, key=score_of)
    return picks
