"""The plots of a study: its curve beside the paper's, what mattered, and every run at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mprd.runs.html import show
from mprd.tune.study import SEED, Paper, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mprd.tune.report import PointResult

SERIES = (
    ("mAP", "mAP", "tab:blue"),
    ("rank1", "Rank-1", "tab:orange"),
    ("label_free_score", "label-free score", "gray"),
    ("silhouette", "silhouette of P", "silver"),
)
"""Figures drawn for each point."""


def draw_plots(
    study: Study,
    points: list[PointResult],
    rows: list[dict[str, Any]],
    importance: dict[str, float],
    *,
    objective: str,
    folder: Path,
) -> dict[str, Path]:
    """Draw what the results allow; return the files under their titles."""
    folder.mkdir(exist_ok=True)
    finished = [row for row in rows if row["state"] == "finished"]
    plots: dict[str, Path] = {}
    if points and not draws_points(study):
        plots["Curve"] = folder / "curve.png"
        draw_curve(study, points, plots["Curve"])
    if importance:
        plots["Parameter importance"] = folder / "importance.png"
        draw_importance(importance, objective, plots["Parameter importance"])
    if finished:
        plots["Parallel coordinates"] = folder / "parallel.png"
        draw_parallel([*study.varied, SEED], finished, objective, plots["Parallel coordinates"])
    return plots


def draws_points(study: Study) -> bool:
    """Say whether points are drawn rather than listed, so that a curve over them means nothing."""
    return study.sampler != "grid"


def panels(*widths: float, height: float = 4.2) -> tuple[Any, Sequence[Axes]]:
    """Make a figure with panels of these widths in inches, side by side, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)
    return figure, list(axes[0])


def sweep(study: Study) -> tuple[str, list[float]] | None:
    """Name the one number that a study varies, with its values; None where it varies more, or no number."""
    if study.points or len(study.varied) != 1:
        return None
    values = [point.set[study.varied[0]] for point in study.grid()]
    numbers = [float(value) for value in values if isinstance(value, int | float) and not isinstance(value, bool)]
    return (study.varied[0], numbers) if len(numbers) == len(values) else None


def draw_curve(study: Study, points: list[PointResult], path: Path) -> None:
    """Draw every figure over the points, and beside it what the paper shows."""
    setting, numbers = sweep(study) or (None, [])
    paper = study.paper
    if setting is not None:
        points = sorted(points, key=lambda point: point.settings[setting])
    labels = [point.name for point in points]
    positions = [point.settings[setting] for point in points] if setting else list(range(len(points)))
    height = 4.2 if setting else 1.6 + 0.42 * len(points)
    figure, axes = panels(*([6.5, 4.5] if paper else [8.0]), height=height)
    for key, name, color in SERIES:
        where = [number for number, point in enumerate(points) if key in point.figures]
        spreads = [points[number].figures[key] for number in where]
        means = [100 * spread.mean for spread in spreads]
        bars = [100 * (spread.deviation or 0) for spread in spreads]
        at = [positions[number] for number in where]
        if setting is not None:
            axes[0].errorbar(at, means, yerr=bars, marker="o", capsize=3, label=name, color=color)
        else:
            axes[0].errorbar(means, at, xerr=bars, fmt="o", capsize=3, label=name, color=color)
    label_axes(axes[0], labels, setting)
    if setting is not None:
        # the whole sweep, also while only a part of it has run
        margin = 0.05 * (max(numbers) - min(numbers))
        axes[0].set_xlim(min(numbers) - margin, max(numbers) + margin)
    axes[0].set_title("measured: mean and standard deviation over seeds")
    axes[0].legend(fontsize="small")
    if paper is not None:
        draw_paper(axes[1], paper, labels, setting, axes[0])
    figure.savefig(path, dpi=110)


def label_axes(axes: Axes, labels: list[str], setting: str | None) -> None:
    """Name the axes: a number runs to the right, named points run down."""
    axes.grid(alpha=0.3)
    if setting is not None:
        axes.set_xlabel(setting)
        axes.set_ylabel("percent")
        return
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("percent")


def draw_paper(axes: Axes, paper: Paper, labels: list[str], setting: str | None, measured: Axes) -> None:
    """Draw what the paper states: figures where it gives any, else the shape it describes."""
    axes.set_title(f"the paper, {paper.source}")
    if paper.peak is not None:
        draw_shape(axes, paper, setting, measured)
        return
    for (dataset, stated), marker in zip(paper.values.items(), "so^v", strict=False):
        for key, name, color in SERIES[:2]:
            at = [number for number, label in enumerate(labels) if label in stated]
            values = [100 * getattr(stated[labels[number]], key) for number in at]
            if setting is None:
                axes.plot(values, at, marker, color=color, label=f"{dataset}, {name}", alpha=0.8)
            else:
                numbers = [float(labels[number].rpartition("=")[2]) for number in at]
                axes.plot(numbers, values, f"{marker}--", color=color, label=f"{dataset}, {name}", alpha=0.8)
    label_axes(axes, labels, setting)
    axes.legend(fontsize="x-small")


def draw_shape(axes: Axes, paper: Paper, setting: str | None, measured: Axes) -> None:
    """Draw the described shape as arrows without a scale: the paper's text gives no figures off the peak."""
    low, high = measured.get_xlim()
    assert paper.peak is not None
    arrow = {"arrowstyle": "-|>", "linewidth": 2.5, "color": "tab:blue"}
    axes.annotate("", (paper.peak, 0.8), (low, 0.6), arrowprops=arrow)
    axes.annotate("", (high, 0.1), (paper.peak, 0.8), arrowprops=arrow)
    axes.text((low + paper.peak) / 2, 0.76, "slow, smooth rise", ha="center", rotation=9)
    axes.text((high + paper.peak) / 2, 0.52, "abrupt drop", ha="left")
    axes.axvline(paper.peak, linestyle=":", color="gray")
    stated = [
        f"{dataset}: mAP {100 * figures.mAP:.1f}, Rank-1 {100 * figures.rank1:.1f}"
        for dataset, values in paper.values.items()
        for figures in values.values()
    ]
    axes.text(low, 0.02, f"stated at {paper.peak:g}:\n" + "\n".join(stated), fontsize="small", va="bottom")
    axes.set(xlim=(low, high), ylim=(0, 1), xlabel=setting or "")
    axes.set_yticks([])
    axes.set_ylabel("schematic: as its text describes it")


def draw_importance(importance: dict[str, float], objective: str, path: Path) -> None:
    """Draw each setting's share of the objective's variance."""
    figure, (axes,) = panels(8.0, height=1.2 + 0.4 * len(importance))
    names = list(importance)[::-1]
    bars = axes.barh(names, [importance[name] for name in names], color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.1 * max(importance.values()))
    axes.set_xlabel(f"share of the variance of {objective} (fANOVA); {SEED} is chance")
    figure.savefig(path, dpi=110)


def draw_parallel(settings: list[str], rows: list[dict[str, Any]], objective: str, path: Path) -> None:
    """Draw every finished run as a line through its settings to its figures, coloured by the objective."""
    from matplotlib import colormaps

    figures = [key for key, _, _ in reversed(SERIES) if any(row[key] is not None for row in rows)]
    columns = [name for name in settings if len({row[name] for row in rows}) > 1] + figures
    scaled = {name: scale([row[name] for row in rows]) for name in columns}
    figure, (axes,) = panels(max(7.0, 1.7 * len(columns)))
    shade = scaled[objective][0] if objective in scaled else [0.5] * len(rows)
    for number in sorted(range(len(rows)), key=lambda number: shade[number]):
        heights = [scaled[name][0][number] for name in columns]
        axes.plot(range(len(columns)), heights, color=colormaps["viridis"](shade[number]), alpha=0.8)
    for at, name in enumerate(columns):
        axes.axvline(at, color="black", linewidth=0.8)
        for height, text in scaled[name][1]:
            axes.text(at + 0.03, height, text, fontsize="small", va="center", bbox=PLATE)
    axes.set_xticks(range(len(columns)), [f"{name}\n(objective)" if name == objective else name for name in columns])
    axes.set_xlim(-0.1, len(columns) - 0.7)
    axes.set_yticks([])
    axes.set_frame_on(False)
    figure.suptitle(f"every finished run; the lighter, the higher its {objective}", fontsize="medium")
    figure.savefig(path, dpi=110)


PLATE = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}


def scale(values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Place values between 0 and 1, and say what stands where: both ends of numbers, every name."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        low, high = min(values), max(values)
        span = (high - low) or 1
        return [(value - low) / span for value in values], [(0.0, show(low)), ((high - low) / span, show(high))]
    names = sorted({str(value) for value in values})
    span = max(1, len(names) - 1)
    return [names.index(str(value)) / span for value in values], [(n / span, name) for n, name in enumerate(names)]
