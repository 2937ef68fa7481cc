"""The report of a study: results.parquet, table.txt, best.yaml, plots, and one HTML page."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table

from mprd.config.nested import look_up
from mprd.config.schema import Config
from mprd.runs.folder import describe_run, write_text
from mprd.runs.html import render_page, show
from mprd.runtime.files import replaced
from mprd.text import new_console
from mprd.tune.folder import StudyFolder
from mprd.tune.plots import draw_plots
from mprd.tune.results import NAMES, PointResult, average_points, choose_best, order_agreement, trial_row
from mprd.tune.study import Objective, Study
from mprd.tune.trial import Trial, trial_config

LABEL_FREE = ("label_free_score", "silhouette")
COLUMNS = (*LABEL_FREE, "mAP", "rank1", "pair_precision", "pair_recall")
"""Figures of the table."""


@dataclass(frozen=True)
class StudyResults:
    """All trials and points of a study."""

    study: Study
    objective: Objective
    rows: list[dict[str, Any]]
    """By trial."""
    points: list[PointResult]
    best: PointResult | None

    @property
    def columns(self) -> list[str]:
        """Return the figures that any trial has."""
        return [key for key in COLUMNS if any(row[key] is not None for row in self.rows)]

    def table_values(self) -> dict[str, Any]:
        """Return the variables of `study_tables.html`."""
        orders = {NAMES[key]: order_agreement(self.points, key) for key in LABEL_FREE}
        states = [row["state"] for row in self.rows]
        return {
            "study": self.study,
            "points": self.points,
            "rows": self.rows,
            "best": self.best,
            "objective": self.objective,
            "names": NAMES,
            "columns": self.columns,
            "counts": {state: states.count(state) for state in ("finished", "stopped", "failed", "running")},
            "orders": {name: agreement for name, agreement in orders.items() if agreement is not None},
            "paper_cell": paper_cell,
        }


def read_results(folder: StudyFolder, study: Study, objective: Objective) -> StudyResults:
    """Read the run folders of all trials."""
    trials = folder.read_trials()
    rows = [trial_row(folder, trial, study) for trial in trials]
    points = average_points(study, trials, rows, objective=objective)
    if other_quantity(study, folder.read_config()):
        study = study.model_copy(update={"paper": None})
    return StudyResults(study, objective, rows, points, choose_best(points, objective))


def other_quantity(study: Study, config: Config) -> str | None:
    """Return in words that the settings make the study vary another quantity than the paper; None if they do not."""
    if study.paper is None:
        return None
    needs = study.paper.needs
    found = {name: look_up(config, name) for name in needs}
    if found == needs:
        return None
    changed = ", ".join(f"{name}={show(found[name])}" for name in needs if found[name] != needs[name])
    wanted = ", ".join(f"{name}={show(value)}" for name, value in needs.items())
    return (
        f"{study.name}: {', '.join(study.varied)} under {changed} is not what {study.paper.source} of the "
        f"paper varies ({wanted}), so its figures are left out"
    )


def write_study_report(
    folder: StudyFolder, study: Study, config: Config, *, objective: Objective, importance: dict[str, float]
) -> Table:
    """Write every file of the report, and return a table for the terminal.

    Args:
        importance: share of the objective's variance by setting; may be empty.
    """
    results = read_results(folder, study, objective)
    write_parquet(results.rows, folder.path / "results.parquet")
    if results.best is not None:
        write_best(folder, config, results, results.best)
    plain = new_console(record=True, width=160, quiet=True)
    plain.print(point_table(results, results.columns))
    write_text(folder.path / "table.txt", plain.export_text())
    points, rows, plots = results.points, results.rows, folder.path / "plots"
    files = draw_plots(results.study, points, rows, importance, objective=objective, folder=plots)
    write_text(folder.path / "report.html", render(results, files))
    shown = (objective, "mAP", "rank1")  # what 80 columns hold; all figures are in the files
    return point_table(results, [key for key in results.columns if key in shown])


def write_parquet(rows: list[dict[str, Any]], path: Path) -> None:
    """Write one row per trial; a column of mixed types becomes text."""
    import pyarrow as pa
    import pyarrow.parquet

    columns = {}
    for name in rows[0] if rows else ():
        values = [row[name] for row in rows]
        types = {type(value) for value in values if value is not None}
        if len(types) > 1 and not types <= {int, float}:
            values = [None if value is None else str(value) for value in values]
        columns[name] = pa.array(map(float, values)) if types == {int, float} and None not in values else values
    # Arrow takes neither names that are not UTF-8 nor all others
    with replaced(path) as temporary, temporary.open("wb") as file:
        pyarrow.parquet.write_table(pa.table(columns), file)


def write_best(folder: StudyFolder, config: Config, results: StudyResults, best: PointResult) -> None:
    """Write all settings of the best point, for `mprd train --config`."""
    study, objective = results.study, results.objective
    trial = Trial(0, best.name, best.settings, best.seeds[0])
    settings = trial_config(config, trial).model_dump(mode="json")
    figures = ", ".join(f"{NAMES[key]} {best.figures[key]}" for key in (objective, "mAP") if key in best.figures)
    seeds = f"{len(best.seeds)} of {len(study.all_seeds)} seeds"
    head = f"# {study.name}: {best.name} is best by {NAMES[objective]} over {seeds}\n# {figures}\n"
    write_text(folder.path / "best.yaml", head + yaml.safe_dump(settings, sort_keys=False))


def point_table(results: StudyResults, columns: list[str]) -> Table:
    """Tabulate figures of the points in percent, beside the paper's."""
    study = results.study
    papers = study.paper.values if study.paper else {}
    title = f"{study.name}: mean ± deviation over seeds, in percent; *: the objective, the best"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("point", overflow="fold")
    table.add_column("seeds", justify="right")
    for key in columns:
        table.add_column(NAMES[key] + (" *" if key == results.objective else ""), justify="right")
    for dataset in papers:
        table.add_column(f"{dataset}\nmAP / Rank-1", justify="right")
    for point in results.points:
        figures = [str(point.figures[key]) if key in point.figures else "-" for key in columns]
        paper = [paper_cell(study, dataset, point.name) for dataset in papers]
        mark = " *" if point is results.best else ""
        table.add_row(point.name + mark, str(len(point.seeds)), *figures, *paper)
    return table


def paper_cell(study: Study, dataset: str, point: str) -> str:
    """Format the paper's figures of a point; empty where it has none."""
    assert study.paper is not None
    figures = study.paper.values[dataset].get(point)
    return "" if figures is None else f"{100 * figures.mAP:.1f} / {100 * figures.rank1:.1f}"


def render(results: StudyResults, plots: dict[str, Path]) -> str:
    """Return the page, with its plots inline, so that it is one file."""
    return render_page(
        "study.html",
        s=results.table_values(),
        plots={title: base64.b64encode(path.read_bytes()).decode() for title, path in plots.items()},
        made=describe_run(),
    )
