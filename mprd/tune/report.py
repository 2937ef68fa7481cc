"""What a study ends with: results.parquet, a table, best.yaml, plots, and one HTML page."""

from __future__ import annotations

import base64
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from mprd.config.schema import Config
from mprd.runs.console import FIGURES
from mprd.runs.folder import describe_run, write_text
from mprd.runs.html import render_page
from mprd.tune.folder import StudyFolder, Trial, trial_config
from mprd.tune.plots import draw_plots
from mprd.tune.study import SEED, Objective, Settings, Study

NAMES = dict(FIGURES)
LABEL_FREE = ("label_free_score", "silhouette")
COLUMNS = (*LABEL_FREE, "mAP", "rank1", "pair_precision", "pair_recall")
"""Figures of the table."""

SHORT = {"label_free_score": "score", "silhouette": "silh", "pair_precision": "prec", "pair_recall": "rec"}
"""Their names where a terminal is narrow."""


@dataclass(frozen=True)
class Spread:
    """The mean of a figure over seeds."""

    mean: float
    deviation: float | None
    """Sample standard deviation; None for one seed."""

    def __str__(self) -> str:
        """Write it in percent."""
        spread = "" if self.deviation is None else f" ± {100 * self.deviation:.1f}"
        return f"{100 * self.mean:.1f}{spread}"


@dataclass(frozen=True)
class PointResult:
    """All finished runs of a point."""

    name: str
    settings: Settings
    seeds: tuple[int, ...]
    figures: dict[str, Spread]


def write_report(
    folder: StudyFolder, study: Study, config: Config, *, objective: Objective, importance: dict[str, float]
) -> Table:
    """Write every file of the report, from the run folders alone, and return the table."""
    trials = folder.read_trials()
    rows = [trial_row(folder, trial, study) for trial in trials]
    write_parquet(rows, folder.path / "results.parquet")
    points = average(trials, rows)
    best = choose_best(points, objective)
    if best is not None:
        write_best(folder, config, study, best, objective)
    table = point_table(study, points, best, objective)
    plain = Console(record=True, width=120, quiet=True)
    plain.print(table)
    write_text(folder.path / "table.txt", plain.export_text())
    plots = draw_plots(study, points, rows, importance, objective=objective, folder=folder.path / "plots")
    write_text(folder.path / "report.html", render(study, points, rows, best, plots, objective=objective))
    return table


def trial_row(folder: StudyFolder, trial: Trial, study: Study) -> dict[str, Any]:
    """Return a trial's row of the results: what was set, how it ended, the figures of its last epoch."""
    epochs = folder.run_folder(trial).read_rows()
    last = epochs[-1] if epochs else {}
    row: dict[str, Any] = {
        "number": trial.number,
        "run": f"trials/{trial.name}",
        "point": trial.point,
        **{name: trial.settings.get(name) for name in study.varied},
        SEED: trial.seed,
        "state": trial.state,
        "reason": trial.reason,
        "epochs": len(epochs),
        "seconds": sum(epoch["gcn_seconds"] + epoch["cnn_seconds"] for epoch in epochs),
    }
    return row | {key: last.get(key) for key in NAMES}


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the results, a row a trial; a column of mixed kinds becomes text."""
    import pyarrow as pa
    import pyarrow.parquet

    columns = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        kinds = {type(value) for value in values if value is not None}
        if len(kinds) > 1 and not kinds <= {int, float}:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pa.array(map(float, values)) if kinds == {int, float} and None not in values else values
    pyarrow.parquet.write_table(pa.table(columns), path)


def average(trials: list[Trial], rows: list[dict[str, Any]]) -> list[PointResult]:
    """Average the finished runs of each point over their seeds, in the order in which points came."""
    groups: dict[str, list[tuple[Trial, dict[str, Any]]]] = {}
    for trial, row in zip(trials, rows, strict=True):
        if trial.state == "finished":
            groups.setdefault(trial.point, []).append((trial, row))
    return [
        PointResult(name, group[0][0].settings, tuple(trial.seed for trial, _ in group), spreads([r for _, r in group]))
        for name, group in groups.items()
    ]


def spreads(rows: list[dict[str, Any]]) -> dict[str, Spread]:
    """Return the mean and the spread of every figure that all rows have."""
    figures = {}
    for key in NAMES:
        values = [row[key] for row in rows if row[key] is not None]
        if len(values) == len(rows):
            figures[key] = Spread(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None)
    return figures


def choose_best(points: list[PointResult], objective: Objective) -> PointResult | None:
    """Choose the point with the highest mean among those with the most seeds: one lucky seed must not win."""
    most = max((len(point.seeds) for point in points), default=0)
    complete = [point for point in points if len(point.seeds) == most]
    return max(complete, key=lambda point: point.figures[objective].mean, default=None)


def write_best(folder: StudyFolder, config: Config, study: Study, best: PointResult, objective: Objective) -> None:
    """Write the best point's settings in full, as `mprd.train --config` takes them."""
    trial = next(t for t in folder.read_trials() if t.point == best.name and t.state == "finished")
    settings = trial_config(config, trial).model_dump(mode="json")
    figures = ", ".join(f"{NAMES[key]} {best.figures[key]}" for key in (objective, "mAP") if key in best.figures)
    head = f"# {study.name}: {best.name} is best by {NAMES[objective]} over {len(best.seeds)} seed(s)\n# {figures}\n"
    write_text(folder.path / "best.yaml", head + yaml.safe_dump(settings, sort_keys=False))


def point_table(study: Study, points: list[PointResult], best: PointResult | None, objective: Objective) -> Table:
    """Set the points below each other, in percent, with what the paper states beside them."""
    columns = [key for key in COLUMNS if any(key in point.figures for point in points)]
    stated = study.paper.values if study.paper else {}
    title = f"{study.name}: mean ± standard deviation over seeds, in percent; * the objective, the best"
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("point", overflow="fold", min_width=12)
    table.add_column("seeds", justify="right")
    for key in columns:
        table.add_column(SHORT.get(key, NAMES[key]) + (" *" if key == objective else ""), justify="right")
    for dataset in stated:
        table.add_column(f"{dataset},\npaper: mAP /\nRank-1", justify="right")
    for point in points:
        figures = [str(point.figures[key]) if key in point.figures else "-" for key in columns]
        paper = [paper_cell(study, dataset, point.name) for dataset in stated]
        mark = " *" if point is best else ""
        table.add_row(point.name + mark, str(len(point.seeds)), *figures, *paper)
    return table


def paper_cell(study: Study, dataset: str, point: str) -> str:
    """Write the paper's figures of a point, where it states any."""
    assert study.paper is not None
    figures = study.paper.values[dataset].get(point)
    return "" if figures is None else f"{100 * figures.mAP:.1f} / {100 * figures.rank1:.1f}"


def order_agreement(points: list[PointResult], key: str) -> float | None:
    """Say how far a figure orders points as mAP does; None for less than four, whose order says nothing."""
    both = [point.figures for point in points if {"mAP", key} <= point.figures.keys()]
    if len(both) < 4:
        return None
    return rank_correlation([figures[key].mean for figures in both], [figures["mAP"].mean for figures in both])


def rank_correlation(first: list[float], second: list[float]) -> float | None:
    """Return Spearman's rank correlation, ties sharing their mean rank; None where one side does not vary."""
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return statistics.correlation(mean_ranks(first), mean_ranks(second))


def mean_ranks(values: list[float]) -> list[float]:
    """Rank values from the smallest; equal ones share the mean of their ranks."""
    ordered = sorted(values)
    return [ordered.index(value) + (ordered.count(value) - 1) / 2 for value in values]


def study_tables(folder: StudyFolder, study: Study, *, objective: Objective) -> dict[str, Any]:
    """Return what the tables of a page about a study show, from its run folders alone."""
    trials = folder.read_trials()
    rows = [trial_row(folder, trial, study) for trial in trials]
    points = average(trials, rows)
    return table_values(study, points, rows, choose_best(points, objective), objective=objective)


def table_values(
    study: Study,
    points: list[PointResult],
    rows: list[dict[str, Any]],
    best: PointResult | None,
    *,
    objective: Objective,
) -> dict[str, Any]:
    """Gather what `study_tables.html` asks for."""
    orders = {NAMES[key]: order_agreement(points, key) for key in LABEL_FREE}
    return {
        "study": study,
        "points": points,
        "rows": rows,
        "best": best,
        "objective": objective,
        "names": NAMES,
        "columns": [key for key in COLUMNS if any(key in point.figures for point in points)],
        "counts": {state: sum(row["state"] == state for row in rows) for state in ("finished", "stopped", "failed")},
        "orders": {name: agreement for name, agreement in orders.items() if agreement is not None},
        "paper_cell": paper_cell,
    }


def render(
    study: Study,
    points: list[PointResult],
    rows: list[dict[str, Any]],
    best: PointResult | None,
    plots: dict[str, Path],
    *,
    objective: Objective,
) -> str:
    """Write the page, with its plots inside, so that it can be sent as one file."""
    return render_page(
        "study.html",
        s=table_values(study, points, rows, best, objective=objective),
        plots={title: base64.b64encode(path.read_bytes()).decode() for title, path in plots.items()},
        made=describe_run(),
    )
