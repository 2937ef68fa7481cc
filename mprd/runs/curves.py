"""Curves of the columns of metrics.jsonl by epoch, as training, the report and the benchmarks draw them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, Any]]
"""The rows of a run, one an epoch."""

PAIR_SCORES = {
    "gcn_auc": "g",
    "cosine_auc": "cosine",
    "reciprocal_auc": "k-reciprocal",
}
"""Columns that hold the AUC of a score on the candidate pairs, and the name of the score."""

DASHES: tuple[Literal["-", "--", ":", "-."], ...] = ("-", "--", ":", "-.")


@dataclass(frozen=True)
class Panel:
    """Columns that share one pair of axes."""

    title: str
    series: tuple[tuple[str, str], ...]
    """Columns, each with its label."""
    hint: str = ""
    """How to read it."""
    unit: Literal["percent", "plain", "log"] = "percent"

    def is_empty(self, runs: Sequence[Rows]) -> bool:
        """Return whether no run has any value."""
        return not any(row.get(column) is not None for rows in runs for row in rows for column, _ in self.series)

    def narrowed(self, num_runs: int) -> Panel:
        """Drop columns as runs are added: all for one run, two for up to three, else one."""
        num_series = len(self.series) if num_runs <= 1 else 2 if num_runs <= 3 else 1
        return dataclasses.replace(self, series=self.series[:num_series])


PANELS = (
    Panel("mAP", (("mAP", "mAP"), ("mAP_trapezoid", "trapezoid")), "Rises and levels off; a fall means labels decay."),
    Panel("Rank-k", (("rank1", "Rank-1"), ("rank5", "Rank-5"), ("rank10", "Rank-10")), "Rises with mAP."),
    Panel(
        "Label-free scores",
        (("label_free_score", "score"), ("silhouette", "silhouette of P")),
        "Computed without labels; a score that orders epochs as mAP does can select one.",
        "plain",
    ),
    Panel("CNN loss", (("cnn_loss", "Eq. 2"),), "Falls; jumps where labels start or schedules step.", "plain"),
    Panel(
        "GCN loss",
        (("gcn_loss", "Eq. 6"),),
        "Contains eta times the loss of the labeled pairs, so it falls with eta too.",
        "plain",
    ),
    Panel(
        "Pairs per image",
        (("positives", "|P_i|"), ("neighbors", "k_i")),
        "|P_i| grows towards an identity's number of images.",
        "plain",
    ),
    Panel(
        "Precision of P",
        (("pair_precision", "all pairs"), ("pair_precision_cross", "cross-camera")),
        "Cross-camera pairs are the hard ones, and the ones that teach.",
    ),
    Panel(
        "Recall of P",
        (("pair_recall", "all pairs"), ("pair_recall_cross", "cross-camera")),
        "The share of the true pairs that P holds.",
    ),
    Panel(
        "AUC on the candidates",
        tuple(PAIR_SCORES.items()),
        "The GCN is worth its cost where g lies above every training-free score.",
        "plain",
    ),
    Panel("Schedules", (("gamma", "gamma, Eq. 1"), ("eta", "eta, Eq. 10")), "From the settings.", "plain"),
    Panel(
        "Learning rates", (("lr_backbone", "pre-trained layers"), ("lr_new", "new layers")), "From the settings.", "log"
    ),
    Panel(
        "Mean cosine of random pairs",
        (("mean_random_cosine", "cosine"),),
        "Stays near 0; near 1 the features have collapsed.",
        "plain",
    ),
)


def draw_panel(
    axes: Axes, panel: Panel, runs: Sequence[tuple[str, Rows]], *, colors: Sequence[Any], neutral: str = "gray"
) -> None:
    """Draw the curves of named runs.

    Args:
        colors: one for each column of a single run; one for each of several runs, whose columns differ by dash.
        neutral: color of the dashes in the legend of several runs.
    """
    from matplotlib.ticker import MaxNLocator

    factor = 100 if panel.unit == "percent" else 1
    is_single = len(runs) == 1
    for number, (name, rows) in enumerate(runs):
        for place, ((column, label), dash) in enumerate(zip(panel.series, itertools.cycle(DASHES), strict=False)):
            points = [(row["epoch"] + 1, factor * row[column]) for row in rows if row.get(column) is not None]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    dash,
                    color=colors[(place if is_single else number) % len(colors)],
                    label=label if is_single and len(panel.series) > 1 else name,
                    # a line of one point is invisible
                    marker="o" if len(points) < 3 else None,
                    markersize=4,
                    linewidth=1.8,
                )
    if panel.unit == "log":
        axes.set_yscale("log")
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if panel.unit == "percent":
        axes.set_ylabel("percent")
    if len(panel.series) > 1:
        axes.legend(handles=None if is_single else dash_legend(panel, neutral))


def dash_legend(panel: Panel, color: str) -> list[Any]:
    """Return a line of each dash with the label of its column."""
    from matplotlib.lines import Line2D

    dashes = zip(panel.series, itertools.cycle(DASHES), strict=False)
    return [Line2D([], [], linestyle=dash, color=color, label=label) for (_, label), dash in dashes]


def plot_curves(rows: Rows, path: Path) -> None:
    """Write every panel of a run that has values into one PNG."""
    # matplotlib takes a second to import
    from matplotlib.figure import Figure

    panels = [panel for panel in PANELS if not panel.is_empty([rows])]
    num_columns = 4
    num_rows = -(-len(panels) // num_columns)
    figure = Figure(figsize=(4 * num_columns, 3.2 * num_rows))
    grid = figure.subplots(num_rows, num_columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for axes, panel in zip(grid.flat, panels, strict=False):
        draw_panel(axes, panel, [("", rows)], colors=[f"C{number}" for number in range(10)])
        axes.set_title(panel.title)
        axes.grid(alpha=0.3)
    # a layout engine would take longer than the drawing
    figure.subplots_adjust(0.05, 0.15 / num_rows, 0.98, 1 - 0.1 / num_rows, wspace=0.25, hspace=0.4)
    figure.savefig(path, dpi=90)


def mean_rows(runs: Sequence[Rows]) -> Rows:
    """Average the rows of several seeds epoch by epoch, leaving out columns that one of them lacks."""
    means = []
    for rows in zip(*runs, strict=False):
        columns = [column for column, value in rows[0].items() if isinstance(value, int | float)]
        full = [column for column in columns if all(isinstance(row.get(column), int | float) for row in rows)]
        mean = {column: sum(row[column] for row in rows) / len(rows) for column in full}
        means.append(mean | {"epoch": rows[0]["epoch"]})
    return means
