"""The tables of the report: the figures of one run or of several, and the paper's rows with our runs among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mprd.report.runs import Run
from mprd.runs.console import FIGURES, chosen_rows
from mprd.tune.paper_results import DATASETS, PaperRow, paper_dataset, paper_method, paper_rows


@dataclass(frozen=True)
class Cell:
    """A figure of a run."""

    value: float | None
    change: float | None = None
    """Difference to the first run."""
    is_best: bool = False
    note: str = ""


@dataclass(frozen=True)
class FigureRow:
    """A figure of all runs."""

    name: str
    cells: list[Cell]


@dataclass(frozen=True)
class ResultTable:
    """Figures by row."""

    columns: list[tuple[str, str]]
    """Name and note of each column; empty where the columns are the runs."""
    rows: list[FigureRow]


def result_table(runs: Sequence[Run]) -> ResultTable:
    """Tabulate the last and the selected epochs of one run, or the last epochs of several."""
    if len(runs) > 1:
        return ResultTable([], compare_figures(runs))
    picks = {} if not runs or not runs[0].rows else chosen_rows(runs[0].rows)
    columns = [(name, f"epoch {row['epoch'] + 1}") for name, row in picks.items()]
    chosen = [*picks.values()]
    if runs and runs[0].untrained:
        columns, chosen = [*columns, ("untrained", "")], [*chosen, runs[0].untrained]
    rows = [FigureRow(name, [Cell(row.get(key)) for row in chosen]) for key, name in FIGURES]
    return ResultTable(columns, drop_empty(rows))


def compare_figures(runs: Sequence[Run]) -> list[FigureRow]:
    """Tabulate each figure of the runs with its difference to the first run."""
    last = [run.rows[-1] if run.rows else {} for run in runs]
    rows = [FigureRow(name, compare([row.get(key) for row in last])) for key, name in FIGURES]
    picks = {
        "by label-free score": "mAP of the epoch by label-free score",
        "best on test": "mAP of the epoch that is best on test",
    }
    for pick, name in picks.items():
        picked = [chosen_rows(run.rows).get(pick, {}) if run.rows else {} for run in runs]
        notes = [f"epoch {row['epoch'] + 1}" if row.get("mAP") is not None else "" for row in picked]
        rows.append(FigureRow(name, compare([row.get("mAP") for row in picked], notes=notes)))
    untrained = FigureRow("mAP untrained", compare([run.untrained.get("mAP") for run in runs]))
    return drop_empty([*rows, untrained])


def drop_empty(rows: list[FigureRow]) -> list[FigureRow]:
    """Drop the rows without any value."""
    return [row for row in rows if any(cell.value is not None for cell in row.cells)]


def compare(values: list[float | None], *, notes: Sequence[str] = ()) -> list[Cell]:
    """Return a cell per value, with its difference to the first and a mark at the highest of several."""
    known = [value for value in values if value is not None]
    cells = []
    for number, value in enumerate(values):
        is_compared = value is not None and len(known) > 1
        first = values[0] if is_compared and number else None
        change = value - first if value is not None and first is not None else None
        is_best = is_compared and value == max(known) > min(known)
        cells.append(Cell(value, change, is_best, notes[number] if notes else ""))
    return cells


@dataclass(frozen=True)
class PaperTable:
    """The paper's rows for a data set, and our runs on it."""

    dataset: str
    rows: list[PaperRow]
    ours: list[tuple[Any, str, dict[str, Any]]]
    """Run, the row of the paper that its settings correspond to, and its last epoch."""


def paper_tables(runs: Sequence[tuple[Any, Run, int | None]]) -> tuple[list[PaperTable], list[tuple[str, str]]]:
    """Return a table for each of the paper's data sets that a run was trained on, and the runs that only look like it.

    Args:
        runs: a label, the run, and its number of training images where known.

    Returns:
        The tables; then the names of runs in the layout of a data set of the paper but on other images, with its name.
    """
    tables: dict[str, PaperTable] = {}
    others = []
    for label, run, num_train in runs:
        dataset = paper_dataset(run.config, num_train=num_train)
        if dataset is not None:
            table = tables.setdefault(dataset, PaperTable(dataset, paper_rows(dataset), []))
            table.ours.append((label, paper_method(run.config), run.rows[-1] if run.rows else {}))
        elif run.config.data.dataset in DATASETS:
            others.append((run.name, DATASETS[run.config.data.dataset]))
    return list(tables.values()), others
