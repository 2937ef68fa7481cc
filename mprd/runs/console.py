"""What a person sees while a run goes on, and the table at its end."""

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


class EpochLines:
    """One live line for the running epoch on a terminal, and one line for each that has ended."""

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
        """Move the live line."""
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
        """Print the line of an epoch that has ended."""
        self.console.print(
            epoch_line(row, self.num_epochs, self.seconds_left(row["epoch"])), highlight=False, soft_wrap=True
        )

    def seconds_left(self, epoch: int) -> float:
        """Estimate from the epochs seen by this process."""
        if not self.started:
            return 0.0
        first = min(self.started)
        elapsed = time.monotonic() - self.started[first]
        return elapsed / (epoch - first + 1) * (self.num_epochs - epoch - 1)


class ImageLine:
    """One live line for a pass over many images on a terminal, and how fast it went."""

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
        """Move the line; images that an earlier call has done say nothing of the speed."""
        if is_earlier:
            self.started = time.monotonic()
        else:
            self.num_done += num_images
        self.progress.update(self.task, advance=num_images, speed=self.speed())

    def speed(self) -> float:
        """Return images a second."""
        return self.num_done / max(1e-9, time.monotonic() - self.started)


def epoch_line(row: dict[str, Any], num_epochs: int, seconds_left: float) -> str:
    """Say in one line how an epoch went."""
    parts = [f"epoch {row['epoch'] + 1:>2}/{num_epochs}"]
    parts += [f"{name} {row[key]:.3f}" for key, name in (("cnn_loss", "loss"), ("gcn_loss", "gcn")) if is_set(row, key)]
    parts.append(f"|P| {row['positives']:.1f}")
    # who is on all images says more of P than who is on the labeled ones
    source, of = ("pair", "") if "pair_precision" in row else ("labelled", " of labeled")
    shares = {f"{source}_precision": f"prec{of}", f"{source}_recall": f"rec{of}", "mAP": "mAP", "rank1": "R1"}
    parts += [f"{name} {100 * row[key]:.1f}" for key, name in shares.items() if is_set(row, key)]
    if is_set(row, "images_per_second"):
        parts.append(f"{row['images_per_second']:.0f} img/s")
    parts.append(f"{seconds_left / 60:.1f} min left")
    return "  ".join(parts)


def is_set(row: dict[str, Any], key: str) -> bool:
    """Say whether a figure was taken."""
    return row.get(key) is not None


def final_table(rows: list[dict[str, Any]], untrained: dict[str, float]) -> Table:
    """Set the last epoch beside the one a label-free score picks and the best on test, named as what they are."""
    columns = {f"{name}\n(epoch {row['epoch'] + 1})": row for name, row in chosen_rows(rows).items()}
    return figure_table(columns | ({"untrained": untrained} if untrained else {}))


def figure_table(columns: dict[str, dict[str, Any]]) -> Table:
    """Set the figures of several rows side by side, in percent."""
    table = Table(title="Result, in percent")
    table.add_column("figure")
    for name in columns:
        table.add_column(name, justify="right")
    for key, name in FIGURES:
        if any(is_set(row, key) for row in columns.values()):
            table.add_row(name, *(f"{100 * row[key]:.1f}" if is_set(row, key) else "-" for row in columns.values()))
    return table


def chosen_rows(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Choose the last epoch (the headline), the best by the label-free score, and the best on test."""
    picks = {"last epoch": rows[-1]}
    evaluated = [row for row in rows if is_set(row, "mAP")]
    if evaluated:
        picks["by label-free score"] = max(evaluated, key=lambda row: row["label_free_score"])
        picks["best on test"] = max(evaluated, key=lambda row: row["mAP"])
    else:
        picks["by label-free score"] = max(rows, key=lambda row: row["label_free_score"])
    return picks
