"""The plots of the report as inline SVG, in the colors of its style sheet, so that they follow its dark mode."""

from __future__ import annotations

import functools
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mprd.report.features import HardIdentities
from mprd.report.pairs import CandidateScores
from mprd.runs.curves import PANELS, Panel, Rows, draw_panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_COLORS = 12
"""Colors `--c0` ... of the style sheet."""
# placeholder colors that appear nowhere else in the SVG, each replaced by a variable of the style sheet
INK, LINE = "#c0de80", "#c0de81"
COLORS = [f"#c0de{number:02x}" for number in range(NUM_COLORS)]
VARIABLES = {INK: "var(--ink)", LINE: "var(--line)"}
VARIABLES |= {color: f"var(--c{number})" for number, color in enumerate(COLORS)}
RUN_COLORS = [*COLORS[2:], *COLORS[:2]]
"""By run; the first two colors mean true and false."""

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": LINE,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.color": LINE,
    "legend.frameon": False,
    "legend.fontsize": 9,
}

STUDY_PANELS = ("mAP", "Label-free scores", "Precision of P", "Recall of P", "AUC on the candidates")


@dataclass(frozen=True)
class Curves:
    """A drawn panel."""

    title: str
    hint: str
    svg: str


def draw_curves(runs: Sequence[tuple[str, Rows]], panels: Sequence[Panel] = PANELS) -> list[Curves]:
    """Draw the panels that have values in any of the named runs."""
    colors = RUN_COLORS if len(runs) > 1 else COLORS
    drawn = []
    for panel in panels:
        shown = panel.narrowed(len(runs))
        if not shown.is_empty([rows for _, rows in runs]):
            draw = functools.partial(draw_panel, panel=shown, runs=runs, colors=colors, neutral=INK)
            drawn.append(Curves(panel_title(panel, shown), panel.hint, draw_svg(panel.title, draw)))
    return drawn


def panel_title(panel: Panel, shown: Panel) -> str:
    """Name the column of a panel that shows only one of several."""
    label = shown.series[0][1]
    is_narrowed = len(shown.series) == 1 < len(panel.series)
    return f"{panel.title}: {label}" if is_narrowed and label != panel.title else panel.title


def draw_candidates(candidates: CandidateScores, run: str) -> dict[str, str]:
    """Draw the distribution of each score over true and false pairs."""
    return {
        name: draw_svg(f"{name} of {run}", functools.partial(draw_histogram, candidates=candidates, name=name))
        for name in (candidates.scores if len(candidates) else ())
    }


def draw_histogram(axes: Axes, *, candidates: CandidateScores, name: str) -> None:
    """Draw the histogram of a score, true and false pairs each as percent of their own number."""
    scores, is_true = candidates.scores[name], candidates.is_true
    low, high = (float(scores.min()), float(scores.max())) if name == "cosine" else (0.0, 1.0)
    edges = np.linspace(low, max(high, low + 1e-3), 41)
    kinds = [("pairs", np.ones(len(scores), dtype=bool), COLORS[0])]
    if is_true is not None:
        kinds = [("false", ~is_true, COLORS[1]), ("true", is_true, COLORS[0])]
    for kind, chosen, color in kinds:
        if chosen.any():
            counts, _ = np.histogram(scores[chosen], edges)
            shares = 100 * counts / chosen.sum()
            axes.stairs(shares, edges, fill=True, color=color, alpha=0.35)
            axes.stairs(shares, edges, color=color, linewidth=1.6, label=f"{kind}, {chosen.sum():,}")
    threshold = candidates.threshold if name == "g_ij" else None
    if threshold is not None:
        axes.axvline(threshold, color=INK, linestyle="--", linewidth=1, label=f"threshold {threshold:g}")
    # room for the legend
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    axes.set_xlabel(name)
    axes.set_ylabel("percent of its kind" if is_true is not None else "percent")
    axes.legend()


def draw_svg(label: str, draw: Callable[[Axes], None]) -> str:
    """Return a figure of one pair of axes as SVG."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    # the ids of clip paths derive from the salt, and must be unique on the page
    with rc_context({**STYLE, "svg.hashsalt": label}):
        figure = Figure(figsize=(4.4, 2.7), layout="constrained")
        axes = figure.subplots()
        axes.grid(alpha=0.6, linewidth=0.6)
        axes.set_axisbelow(True)
        draw(axes)
        return to_svg(figure, label)


def to_svg(figure: Figure, label: str) -> str:
    """Write a figure as SVG that scales with the page, its colors replaced by variables of the style sheet."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style[^>]*>.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)
    view = re.search(r'viewBox="[^"]*"', text)
    assert view is not None
    head = f'<svg {view[0]} role="img" aria-label="{html.escape(label)}" xmlns:xlink="http://www.w3.org/1999/xlink">'
    text = head + text[text.index(">") + 1 :]
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return re.sub(r"\s*\n\s*", "\n", text)


def draw_embedding(points: np.ndarray, chosen: HardIdentities, label: str) -> str:
    """Draw points `[n, 2]` as SVG: the hardest identities in color, the others in gray behind them."""
    low, high = points.min(0), points.max(0)
    scaled = 15 + 370 * (points - low) / np.maximum(high - low, 1e-9)
    others = ~np.isin(chosen.pids, chosen.hardest)
    parts = [f'<svg viewBox="0 0 400 400" role="img" aria-label="{html.escape(label)}" class="dots">']
    if others.any():
        parts.append(f'<path class="others" d="{dots(scaled[others])}"/>')
    for number, pid in enumerate(chosen.hardest):
        is_own = chosen.pids == pid
        title = f"identity {pid}, {is_own.sum()} images"
        parts.append(f'<path stroke="var(--c{number})" d="{dots(scaled[is_own])}"><title>{title}</title></path>')
    return "".join([*parts, "</svg>"])


def dots(points: np.ndarray) -> str:
    """Return a path of zero-length lines, drawn as dots by round line caps: a tenth of the size of circles."""
    return "".join(f"M{x:.0f} {y:.0f}h0" for x, y in points)
