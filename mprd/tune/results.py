"""The figures of a study: its trials by their last epoch, averaged over the seeds of each point."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any, TypeGuard

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
    """Distinct, ascending."""
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
        "seconds": sum(epoch.get("gcn_seconds", 0.0) + epoch.get("cnn_seconds", 0.0) for epoch in epochs),
    }
    return row | {key: last.get(key) for key in NAMES}


def average_points(
    study: Study, trials: list[Trial], rows: list[dict[str, Any]], *, objective: Objective
) -> list[PointResult]:
    """Average the finished trials of each point over their seeds, repeats of a seed first, in order of appearance.

    A trial without the objective is left out, such as one whose run folder was removed.
    """
    points: dict[str, tuple[Trial, dict[int, list[dict[str, Any]]]]] = {}
    for trial, row in zip(trials, rows, strict=True):
        if trial.state == "finished" and is_number(row[objective]):
            _, by_seed = points.setdefault(study.key(trial.point, trial.settings), (trial, {}))
            by_seed.setdefault(trial.seed, []).append(row)
    return [
        PointResult(first.point, first.settings, tuple(sorted(by_seed)), averages([*map(mean_row, by_seed.values())]))
        for first, by_seed in points.values()
    ]


def mean_row(repeats: list[dict[str, Any]]) -> dict[str, float | None]:
    """Average the figures of trials with equal settings and seed; None where one of them has none."""
    figures = averages(repeats)
    return {key: figures[key].mean if key in figures else None for key in NAMES}


def is_number(value: float | None) -> TypeGuard[float]:
    """Return whether a figure is known and finite."""
    return value is not None and math.isfinite(value)


def averages(rows: list[dict[str, Any]]) -> dict[str, MeanStd]:
    """Return mean and standard deviation of every figure that all rows have."""
    figures = {}
    for key in NAMES:
        values = [row[key] for row in rows if row[key] is not None]
        if len(values) == len(rows):
            figures[key] = MeanStd(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
    return figures


def rank_points(points: list[PointResult], objective: Objective) -> list[PointResult]:
    """Sort points by the objective, the best first."""
    # by name in case of a tie, so that the order of the trials does not matter
    return sorted(points, key=lambda point: (-point.figures[objective].mean, point.name))


def choose_best(points: list[PointResult], objective: Objective) -> PointResult | None:
    """Return the point with the highest mean among those with the most seeds, so that one lucky seed cannot win."""
    most = max((len(point.seeds) for point in points), default=0)
    return next(iter(rank_points([point for point in points if len(point.seeds) == most], objective)), None)


def order_agreement(points: list[PointResult], key: str) -> float | None:
    """Return Spearman's rank correlation of a figure with mAP over the points.

    None for fewer than `MIN_POINTS`, and where one of both is constant.
    """
    from scipy.stats import spearmanr

    both = [point.figures for point in points if {"mAP", key} <= point.figures.keys()]
    figures, maps = ([point[name].mean for point in both] for name in (key, "mAP"))
    if len(both) < MIN_POINTS or len(set(figures)) < 2 or len(set(maps)) < 2:
        return None
    return float(spearmanr(figures, maps).statistic)
