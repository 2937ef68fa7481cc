"""Curves of a run as one PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mprd.evaluate.label_quality import PAIR_SCORES

PANELS = (
    ("Loss", (("cnn_loss", "CNN, Eq. 2"), ("gcn_loss", "GCN, Eq. 6"))),
    ("Retrieval", (("mAP", "mAP"), ("rank1", "Rank-1"), ("label_free_score", "label-free score"))),
    (
        "Pairs of P",
        (
            ("pair_precision", "precision"),
            ("pair_recall", "recall"),
            ("pair_precision_cross", "precision, cross-camera"),
            ("pair_recall_cross", "recall, cross-camera"),
        ),
    ),
    ("AUC on the candidates", tuple(PAIR_SCORES.items())),
    ("Sizes", (("positives", "$|P_i|$"), ("neighbors", "$k_i$"))),
    ("Schedules", (("gamma", "gamma, Eq. 1"), ("eta", "eta, Eq. 10"))),
)


def plot_curves(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw losses, retrieval, label quality, sizes and schedules against the epoch."""
    # matplotlib takes a second to import, and a run needs it only here
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, series) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for key, name in series:
            points = [(row["epoch"] + 1, row[key]) for row in rows if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker=".", label=name)
        axes.set_title(title)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
