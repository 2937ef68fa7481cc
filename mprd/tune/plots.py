"""The plots of a study: its curve beside the paper's, parameter importance, and parallel coordinates."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from mprd.runs.html import show
from mprd.tune.results import PointResult
from mprd.tune.study import SEED, Paper, Study

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    """Draw the plots that the results allow; return their files by title."""
    folder.mkdir(exist_ok=True)
    # a run folder may have been removed
    finished = [row for row in rows if row["state"] == "finished" and row[objective] is not None]
    plots: dict[str, Path] = {}
    # a curve over points that a sampler drew would mean nothing
    if points and study.sampler == "grid":
        plots["Curve"] = folder / "curve.png"
        draw_curve(study, points, plots["Curve"])
    if importance:
        plots["Parameter importance"] = folder / "importance.png"
        draw_importance(importance, objective, plots["Parameter importance"])
    if finished and study.sampler != "grid":
        plots["Slices"] = folder / "slices.png"
        draw_slices(study.varied, finished, objective, plots["Slices"])
    if finished:
        plots["Parallel coordinates"] = folder / "parallel.png"
        draw_parallel([*study.varied, SEED], finished, objective, plots["Parallel coordinates"])
    return plots


def new_figure(*widths: float, height: float = 4.2) -> tuple[Any, Sequence[Axes]]:
    """Return a figure with axes of these widths in inches, side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(sum(widths), height), layout="constrained")
    axes = figure.subplots(1, len(widths), width_ratios=widths, squeeze=False)
    return figure, list(axes[0])


def swept_number(study: Study) -> tuple[str, list[float]] | None:
    """Return the one setting that a study varies, with its values; None if there are several, or not numbers."""
    if study.points or len(study.varied) != 1:
        return None
    values = [point.set[study.varied[0]] for point in study.grid()]
    return (study.varied[0], [float(value) for value in values]) if are_numbers(values) else None


def are_numbers(values: Sequence[Any]) -> TypeGuard[Sequence[float]]:
    """Return whether all values are numbers, rather than names, booleans or None."""
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def draw_curve(study: Study, points: list[PointResult], path: Path) -> None:
    """Draw every figure over the points, beside the paper's."""
    setting, numbers = swept_number(study) or (None, [])
    paper = study.paper
    if setting is not None:
        points = sorted(points, key=lambda point: point.settings[setting])
    labels = [point.name for point in points]
    height = 4.2 if setting else 1.6 + 0.42 * len(points)
    figure, axes = new_figure(*([6.5, 4.5] if paper else [8.0]), height=height)
    draw_measured(axes[0], points, setting)
    label_axes(axes[0], labels, setting)
    if setting is not None and len(numbers) > 1:
        # the whole sweep, even if only a part of it has run
        margin = 0.05 * (max(numbers) - min(numbers))
        axes[0].set_xlim(min(numbers) - margin, max(numbers) + margin)
    axes[0].set_title("measured: mean and standard deviation over seeds")
    axes[0].legend(fontsize="small")
    if paper is not None:
        draw_paper(axes[1], paper, labels, setting, axes[0].get_xlim())
    figure.savefig(path, dpi=110)


def draw_measured(axes: Axes, points: list[PointResult], setting: str | None) -> None:
    """Draw mean and standard deviation of each figure: a curve over the numbers of a setting, or a row per point."""
    for key, name, color in SERIES:
        with_figure = [(number, point) for number, point in enumerate(points) if key in point.figures]
        means = [100 * point.figures[key].mean for _, point in with_figure]
        bars = [100 * (point.figures[key].std or 0) for _, point in with_figure]
        if setting is not None:
            numbers = [point.settings[setting] for _, point in with_figure]
            axes.errorbar(numbers, means, yerr=bars, marker="o", capsize=3, label=name, color=color)
        else:
            rows = [number for number, _ in with_figure]
            axes.errorbar(means, rows, xerr=bars, fmt="o", capsize=3, label=name, color=color)


def label_axes(axes: Axes, labels: list[str], setting: str | None) -> None:
    """Label the axes: numbers of a setting along x, or named points along y."""
    axes.grid(alpha=0.3)
    if setting is not None:
        axes.set_xlabel(setting)
        axes.set_ylabel("percent")
        return
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.set_xlabel("percent")


def draw_paper(axes: Axes, paper: Paper, labels: list[str], setting: str | None, limits: tuple[float, float]) -> None:
    """Draw the figures that the paper states, or else the shape that it describes."""
    axes.set_title(f"the paper, {paper.source}")
    if paper.peak is not None:
        draw_shape(axes, paper, setting, limits)
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


def draw_shape(axes: Axes, paper: Paper, setting: str | None, limits: tuple[float, float]) -> None:
    """Draw the described shape as arrows without a scale, because the text gives figures at the peak only."""
    low, high = limits
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
    text, clear = f"stated at {paper.peak:g}:\n" + "\n".join(stated), {"facecolor": "white", "edgecolor": "none"}
    axes.text(0.02, 0.03, text, transform=axes.transAxes, fontsize="small", va="bottom", bbox=clear)
    axes.set(xlim=(low, high), ylim=(0, 1), xlabel=setting or "")
    axes.set_yticks([])
    axes.set_ylabel("schematic, from its text")


def draw_importance(importance: dict[str, float], objective: str, path: Path) -> None:
    """Draw each setting's share of the objective's variance."""
    figure, (axes,) = new_figure(8.0, height=1.2 + 0.4 * len(importance))
    names = list(importance)[::-1]
    bars = axes.barh(names, [importance[name] for name in names], color="tab:blue")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.set_xlim(0, 1.1 * max(importance.values()))
    axes.set_xlabel(f"share of the variance of {objective} (fANOVA); {SEED} is noise")
    figure.savefig(path, dpi=110)


def draw_slices(settings: list[str], rows: list[dict[str, Any]], objective: str, path: Path) -> None:
    """Draw the objective of every finished run over each setting, later runs darker."""
    figure, axes = new_figure(*[3.0] * len(settings), height=3.2)
    heights = [100 * row[objective] for row in rows]
    for each, name in zip(axes, settings, strict=True):
        values = [row[name] for row in rows]
        if not are_numbers(values):
            values = [str(value) for value in values]
        each.scatter(
            values, heights, c=range(len(rows)), cmap="Blues", vmin=-len(rows), edgecolors="gray", linewidths=0.4
        )
        each.set_xlabel(name)
        each.grid(alpha=0.3)
        each.tick_params(axis="x", rotation=30)
    axes[0].set_ylabel(f"{objective}, percent")
    figure.savefig(path, dpi=110)


def draw_parallel(settings: list[str], rows: list[dict[str, Any]], objective: str, path: Path) -> None:
    """Draw every finished run as a line through its settings and figures, colored by the objective."""
    from matplotlib import colormaps

    figures = [key for key, _, _ in reversed(SERIES) if any(row[key] is not None for row in rows)]
    columns = [name for name in settings if len({row[name] for row in rows}) > 1] + figures
    scaled = {name: scale([row[name] for row in rows]) for name in columns}
    figure, (axes,) = new_figure(max(7.0, 1.7 * len(columns)))
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
    figure.suptitle(f"every finished run; lighter is a higher {objective}", fontsize="medium")
    figure.savefig(path, dpi=110)


PLATE = {"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1}


def scale(values: list[Any]) -> tuple[list[float], list[tuple[float, str]]]:
    """Scale values to 0..1; return them, and the labels of the axis: both ends of numbers, or every name."""
    if are_numbers(values):
        low, high = min(values), max(values)
        span = (high - low) or 1
        return [(value - low) / span for value in values], [(0.0, show(low)), ((high - low) / span, show(high))]
    names = sorted({str(value) for value in values})
    span = max(1, len(names) - 1)
    return [names.index(str(value)) / span for value in values], [(n / span, name) for n, name in enumerate(names)]
