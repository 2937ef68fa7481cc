"""The figures of a study: its trials by their last epoch, averaged over the seeds of each point."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Any

from mprd.runs.console import FIGURES
from mprd.tune.folder import StudyFolder
from mprd.tune.study import SEED, Objective, Settings, Study
from mprd.tune.trial import Trial

NAMES = dict(FIGURES)
"""Columns of metrics.jsonl and their names."""
MIN_POINTS = 4
"""Points below which a rank correlation means nothing."""


@dataclass(frozen=True)
class MeanStd:
    """A figure averaged over seeds."""

    mean: float
    std: float | None
    """Sample standard deviation; None for one seed."""

    def __str__(self) -> str:
        """Format in percent."""
        spread = "" if self.std is None else f" ± {100 * self.std:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


@dataclass(frozen=True)
class PointResult:
    """The finished trials of a point."""

    name: str
    settings: Settings
    seeds: tuple[int, ...]
    figures: dict[str, MeanStd]


def trial_row(folder: StudyFolder, trial: Trial, study: Study) -> dict[str, Any]:
    """Return a trial's row of results.parquet: settings, state, and the figures of its last epoch."""
    epochs = folder.run_folder(trial).read_rows()
    last = epochs[-1] if epochs else {}
    row: dict[str, Any] = {
        "number": trial.number,
        "run": f"trials/{trial.folder_name}",
        "point": trial.point,
        **{name: trial.settings.get(name) for name in study.varied},
        SEED: trial.seed,
        "state": trial.state,
        "reason": trial.reason,
        "epochs": len(epochs),
        "seconds": sum(epoch["gcn_seconds"] + epoch["cnn_seconds"] for epoch in epochs),
    }
    return row | {key: last.get(key) for key in NAMES}


def average_points(trials: list[Trial], rows: list[dict[str, Any]]) -> list[PointResult]:
    """Average the finished trials of each point over their seeds, in order of first appearance."""
    groups: dict[str, list[tuple[Trial, dict[str, Any]]]] = {}
    for trial, row in zip(trials, rows, strict=True):
        if trial.state == "finished":
            groups.setdefault(trial.point, []).append((trial, row))
    return [
        PointResult(
            name, group[0][0].settings, tuple(trial.seed for trial, _ in group), averages([r for _, r in group])
        )
        for name, group in groups.items()
    ]


def averages(rows: list[dict[str, Any]]) -> dict[str, MeanStd]:
    """Return mean and standard deviation of every figure that all rows have."""
    figures = {}
    for key in NAMES:
        values = [row[key] for row in rows if row[key] is not None]
        if len(values) == len(rows):
            figures[key] = MeanStd(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
    return figures


def choose_best(points: list[PointResult], objective: Objective) -> PointResult | None:
    """Return the point with the highest mean among those with the most seeds, so that one lucky seed cannot win."""
    most = max((len(point.seeds) for point in points), default=0)
    complete = [point for point in points if len(point.seeds) == most]
    return max(complete, key=lambda point: point.figures[objective].mean, default=None)


def order_agreement(points: list[PointResult], key: str) -> float | None:
    """Return the rank correlation of a figure with mAP over the points; None for fewer than `MIN_POINTS`."""
    both = [point.figures for point in points if {"mAP", key} <= point.figures.keys()]
    if len(both) < MIN_POINTS:
        return None
    return rank_correlation([figures[key].mean for figures in both], [figures["mAP"].mean for figures in both])


def rank_correlation(first: list[float], second: list[float]) -> float | None:
    """Return Spearman's rank correlation, with mean ranks for ties; None where one side is constant."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return statistics.correlation(mean_ranks(first), mean_ranks(second))


def mean_ranks(values: list[float]) -> list[float]:
    """Return ranks from the smallest value; equal values share their mean rank."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]
