"""The plots of a report as SVG inside the page, in the colours of its style sheet, so that they turn dark with it."""

from __future__ import annotations

import dataclasses
import functools
import html
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from mprd.evaluate.label_quality import PAIR_SCORES
from mprd.report.features import HardIdentities
from mprd.report.pairs import Candidates

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NUM_COLOURS = 12
"""Colours `--c0` ... of the style sheet."""
INK, LINE, SURFACE = "#c0de80", "#c0de81", "#c0de82"
# colours that matplotlib writes and nobody else, each to be replaced by a variable of the style sheet
VARIABLES = {INK: "var(--ink)", LINE: "var(--line)", SURFACE: "var(--surface)"}
VARIABLES |= {f"#c0de{number:02x}": f"var(--c{number})" for number in range(NUM_COLOURS)}

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
DASHES = ("-", "--", ":", "-.")

Lines = Sequence[tuple[str, list[dict[str, Any]]]]
"""Name and rows, one an epoch, of each run or of each point of a study."""


@dataclass(frozen=True)
class Panel:
    """What one panel of curves shows."""

    title: str
    series: tuple[tuple[str, str], ...]
    """Name in the metrics file, and in the legend."""
    hint: str
    """What one should see."""
    unit: str = "percent"
    """`percent`, `plain`, or `log`."""


PANELS = (
    Panel("mAP", (("mAP", "mAP"), ("mAP_trapezoid", "trapezoid")), "Rises and levels off; a fall means labels decay."),
    Panel("Rank-k", (("rank1", "Rank-1"), ("rank5", "Rank-5"), ("rank10", "Rank-10")), "Rises with mAP."),
    Panel(
        "Label-free scores",
        (("label_free_score", "score"), ("silhouette", "silhouette of P")),
        "Seen without labels; where one orders epochs as mAP does, it may choose one.",
        "plain",
    ),
    Panel("CNN loss", (("cnn_loss", "Eq. 2"),), "Falls; jumps where labels start or schedules step.", "plain"),
    Panel(
        "GCN loss",
        (("gcn_loss", "Eq. 6"),),
        "Holds eta times the loss of the labeled pairs, so it falls with eta too.",
        "plain",
    ),
    Panel(
        "Pairs an image",
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
        "The GCN earns its place where g, or the agreement made of it, lies above all that needs no training.",
        "plain",
    ),
    Panel("Schedules", (("gamma", "gamma, Eq. 1"), ("eta", "eta, Eq. 10")), "As set; no measurement.", "plain"),
    Panel(
        "Learning rates",
        (("lr_backbone", "pre-trained layers"), ("lr_new", "new layers")),
        "As set; no measurement.",
        "log",
    ),
    Panel(
        "Mean cosine of random pairs",
        (("mean_random_cosine", "cosine"),),
        "Stays near 0; near 1 the features have run together.",
        "plain",
    ),
)
STUDY_PANELS = ("mAP", "Label-free scores", "Precision of P", "Recall of P", "AUC on the candidates")


@dataclass(frozen=True)
class Drawn:
    """A panel as it stands on the page."""

    title: str
    hint: str
    svg: str


def draw_curves(lines: Lines, panels: Sequence[Panel] = PANELS) -> list[Drawn]:
    """Draw the panels for which there is anything to draw; colours tell runs apart where there are several."""
    drawn = []
    for panel in panels:
        shown = dataclasses.replace(panel, series=choose_series(panel, len(lines)))
        keys = [key for key, _ in shown.series]
        if any(row.get(key) is not None for _, rows in lines for row in rows for key in keys):
            svg = with_style(panel.title, functools.partial(draw_panel, lines, shown))
            label = shown.series[0][1]
            is_cut = len(shown.series) == 1 < len(panel.series) and label != panel.title
            drawn.append(Drawn(f"{panel.title}: {label}" if is_cut else panel.title, panel.hint, svg))
    return drawn


def choose_series(panel: Panel, num_lines: int) -> tuple[tuple[str, str], ...]:
    """Take as many kinds of line as the eye can follow where runs share a panel."""
    return panel.series if num_lines <= 1 else panel.series[:2] if num_lines <= 3 else panel.series[:1]


def with_style(label: str, draw: Callable[[], Figure]) -> str:
    """Draw a figure under the page's style, and return it as SVG."""
    from matplotlib import rc_context

    # ids of clip paths are made of the salt: two plots of a page must not share any
    with rc_context({**STYLE, "svg.hashsalt": label}):
        return to_svg(draw(), label)


def new_figure() -> tuple[Figure, Axes]:
    """Make a figure with one panel, without a display."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.4, 2.7), layout="constrained")
    FigureCanvasSVG(figure)
    axes = figure.subplots()
    axes.grid(alpha=0.6, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def draw_panel(lines: Lines, panel: Panel) -> Figure:
    """Draw one panel of curves against the epoch."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = new_figure()
    factor = 100 if panel.unit == "percent" else 1
    is_one = len(lines) == 1
    for number, (_, rows) in enumerate(lines):
        for dash, (key, label) in zip(DASHES, panel.series, strict=False):
            points = [(row["epoch"] + 1, factor * row[key]) for row in rows if row.get(key) is not None]
            if points:
                color = series_colour(panel, key) if is_one else run_colour(number)
                axes.plot(
                    *zip(*points, strict=True),
                    dash,
                    color=color,
                    label=label if is_one else None,
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
        if not is_one:
            for dash, (_, label) in zip(DASHES, panel.series, strict=False):
                axes.plot([], [], dash, color=INK, label=label)
        axes.legend()
    return figure


def series_colour(panel: Panel, key: str) -> str:
    """Return the colour of a series where there is one run."""
    return colour([name for name, _ in panel.series].index(key))


def colour(number: int) -> str:
    """Return the colour that stands for `--c<number>` until the page is written."""
    return f"#c0de{number % NUM_COLOURS:02x}"


def run_colour(number: int) -> str:
    """Return the colour of a run among several; the first two colours say true and false."""
    return colour(number + 2)


def draw_candidates(candidates: Candidates, run: str) -> dict[str, str]:
    """Draw the distribution of each score, for true and for false pairs."""
    return {
        name: with_style(f"{name} of {run}", functools.partial(draw_histogram, candidates, name))
        for name in (candidates.scores if len(candidates) else ())
    }


def draw_histogram(candidates: Candidates, name: str) -> Figure:
    """Draw one score, each kind of pair as shares of its own number."""
    figure, axes = new_figure()
    scores, is_true = candidates.scores[name], candidates.is_true
    low, high = (float(scores.min()), float(scores.max())) if name == "cosine" else (0.0, 1.0)
    # overlaps are fractions of small numbers: fine bins would show a comb
    edges = np.linspace(low, max(high, low + 1e-3), 17 if name == "list overlap" else 41)
    kinds = [("pairs", np.ones(len(scores), dtype=bool), colour(0))]
    if is_true is not None:
        kinds = [("false", ~is_true, colour(1)), ("true", is_true, colour(0))]
    for kind, chosen, color in kinds:
        if chosen.any():
            counts, _ = np.histogram(scores[chosen], edges)
            shares = 100 * counts / chosen.sum()
            axes.stairs(shares, edges, fill=True, color=color, alpha=0.35)
            axes.stairs(shares, edges, color=color, linewidth=1.6, label=f"{kind}, {chosen.sum():,}")
    if name == candidates.decides:
        axes.axvline(
            candidates.threshold, color=INK, linestyle="--", linewidth=1, label=f"threshold {candidates.threshold:g}"
        )
    # room for the legend
    axes.set_ylim(top=1.25 * axes.get_ylim()[1])
    axes.set_xlabel(name)
    axes.set_ylabel("percent of its kind" if is_true is not None else "percent")
    axes.legend()
    return figure


def to_svg(figure: Figure, label: str) -> str:
    """Write a figure as SVG without a size of its own, its colours as variables of the page's style sheet."""
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
    for hexadecimal, variable in VARIABLES.items():
        text = text.replace(hexadecimal, variable)
    return re.sub(r"\s*\n\s*", "\n", text)


def draw_embedding(points: np.ndarray, chosen: HardIdentities, label: str) -> str:
    """Draw points `[n, 2]` as SVG: the hardest identities in colour, the others in gray behind them."""
    low, high = points.min(0), points.max(0)
    scaled = 15 + 370 * (points - low) / np.maximum(high - low, 1e-9)
    others = ~np.isin(chosen.pids, chosen.hardest)
    parts = [f'<svg viewBox="0 0 400 400" role="img" aria-label="{html.escape(label)}" class="dots">']
    if others.any():
        parts.append(f'<path class="others" d="{dots(scaled[others])}"/>')
    for number, pid in enumerate(chosen.hardest):
        is_one = chosen.pids == pid
        title = f"identity {pid}, {is_one.sum()} images"
        parts.append(f'<path stroke="var(--c{number})" d="{dots(scaled[is_one])}"><title>{title}</title></path>')
    return "".join([*parts, "</svg>"])


def dots(points: np.ndarray) -> str:
    """Write points as a path of lines without length, which round ends turn into dots: a tenth of circles' size."""
    return "".join(f"M{x:.0f} {y:.0f}h0" for x, y in points)
