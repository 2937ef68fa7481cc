"""Draw the figure of the method for README and docs, light and dark: `python docs/method_figure.py`."""

from __future__ import annotations

import math
from pathlib import Path

FOLDER = Path(__file__).parent / "figures"
WIDTH, HEIGHT = 1060, 344
MIDDLE = 128
"""Height of the row of boxes."""

THEMES = {
    "light": {
        "ink": "#1d2430", "quiet": "#5a6473", "line": "#8a94a3", "box": "#f3f5f8", "edge": "#c3cad4",
        "one": "#2367c4", "other": "#d95f0e", "shared": "#7048c9", "pull": "#178a5e", "push": "#c2255c",
        "skin": "#e0ac8a",
    },
    "dark": {
        "ink": "#e5e8ed", "quiet": "#a3adba", "line": "#7c8796", "box": "#20252d", "edge": "#434b58",
        "one": "#6fa8ff", "other": "#ff9b5e", "shared": "#b39bff", "pull": "#4fd1a0", "push": "#ff7aa2",
        "skin": "#c99a7c",
    },
}  # fmt: skip


def figure(theme: str) -> str:
    """Return the whole figure as SVG."""
    c = THEMES[theme]
    parts = [
        *images(c),
        *box(c, 178, 92, "CNN", "F(x)"),
        *memory(c),
        *pair_graph(c),
        *box(c, 724, 92, "GCN", "G"),
        *positives(c),
        *labeled(c),
        *feedback(c),
    ]
    parts += [arrow(c, x, MIDDLE, x + 30, MIDDLE) for x in (143, 274, 442, 690, 820)]
    title = (
        "The CNN writes features into a memory. For a pair of images the neighborhoods of both form a graph of two "
        "stars. A graph network reads it and gives the likelihood that both show one person. Likely pairs are pulled "
        "together, hard negatives pushed apart, and five labeled identities guide the graph network."
    )
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
            'font-family="system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif" font-size="14">',
            f"<title>MPRD</title><desc>{title}</desc>",
            *parts,
            "</svg>\n",
        ]
    )


def images(c: dict[str, str]) -> list[str]:
    """Draw unlabeled crops of two people under several cameras."""
    parts = [text(c, 87, 30, "unlabeled images", weight=600), text(c, 87, 212, "of several cameras", colour="quiet")]
    for row, (first, second) in enumerate((("one", "other"), ("other", "one"))):
        for column, who in enumerate((first, second)):
            parts += pedestrian(c, 41 + 50 * column, 46 + 76 * row, who)
    return parts


def pedestrian(c: dict[str, str], x: float, y: float, who: str) -> list[str]:
    """Draw a person of simple shapes in a frame of 42 x 70."""
    middle, trousers = x + 21, c["ink"] if who == "one" else c["line"]
    return [
        f'<rect x="{x}" y="{y}" width="42" height="70" rx="4" fill="{c["box"]}" stroke="{c["edge"]}"/>',
        f'<circle cx="{middle}" cy="{y + 15}" r="7" fill="{c["skin"]}"/>',
        f'<rect x="{middle - 9}" y="{y + 23}" width="18" height="22" rx="4" fill="{c[who]}"/>',
        f'<rect x="{middle - 8}" y="{y + 44}" width="7" height="20" rx="2" fill="{trousers}"/>',
        f'<rect x="{middle + 1}" y="{y + 44}" width="7" height="20" rx="2" fill="{trousers}"/>',
    ]


def box(c: dict[str, str], x: float, width: float, title: str, below: str) -> list[str]:
    """Draw a network."""
    return [
        f'<rect x="{x}" y="{MIDDLE - 36}" width="{width}" height="72" rx="10" fill="{c["box"]}" stroke="{c["ink"]}" '
        'stroke-width="1.5"/>',
        text(c, x + width / 2, MIDDLE - 2, title, size=18, weight=600),
        text(c, x + width / 2, MIDDLE + 20, below, colour="quiet"),
    ]


def memory(c: dict[str, str]) -> list[str]:
    """Draw the memory: a row of cells for each image."""
    parts = [text(c, 372, 30, "memory M", weight=600), text(c, 372, 212, "one row per image (Eq. 1)", colour="quiet")]
    strengths = ((0.9, 0.3, 0.6, 0.2, 0.7), (0.2, 0.8, 0.3, 0.9, 0.4))
    for row, who in enumerate(("one", "other", "other", "one", "one", "other", "one")):
        for column, strength in enumerate(strengths[who == "other"]):
            x, y = 315 + 23 * column, 48 + 22 * row
            parts.append(
                f'<rect x="{x}" y="{y}" width="21" height="18" rx="2" fill="{c[who]}" fill-opacity="{strength}" '
                f'stroke="{c["edge"]}"/>'
            )
    return parts


def pair_graph(c: dict[str, str]) -> list[str]:
    """Draw the two stars of a pair: neighbors of i, of j, and of both (Eq. 4)."""
    i, j = (531.0, float(MIDDLE)), (629.0, float(MIDDLE))
    around_i = [around(i, angle, 45) for angle in (125, 180, 235)]
    around_j = [around(j, angle, 45) for angle in (-55, 0, 55)]
    shared = [(580.0, MIDDLE - 44.0), (580.0, MIDDLE + 44.0)]
    edges = [(i, j), *((i, end) for end in around_i + shared), *((j, end) for end in around_j + shared)]
    parts = [
        text(c, 580, 30, "the graph of a pair (i, j)", weight=600),
        text(c, 580, 212, "their neighbors: two stars (Eq. 4)", colour="quiet"),
    ]
    parts += [
        f'<line x1="{a[0]:.1f}" y1="{a[1]:.1f}" x2="{b[0]:.1f}" y2="{b[1]:.1f}" stroke="{c["line"]}" '
        'stroke-width="1.5"/>'
        for a, b in edges
    ]
    leaves = (
        [(end, "one") for end in around_i] + [(end, "one") for end in around_j] + [(end, "shared") for end in shared]
    )
    parts += [node(c, end, 7, who) for end, who in leaves]
    for end, name in ((i, "i"), (j, "j")):
        parts += [node(c, end, 14, "one"), text(c, end[0], end[1] + 5, name, colour="box", weight=700, style="italic")]
    return parts


def positives(c: dict[str, str]) -> list[str]:
    """Draw the answer: the likelihood of a pair, and what becomes of it."""
    x = 955
    return [
        text(c, x, 30, "pseudo labels", weight=600),
        text(c, x, 76, "likelihood g(i, j)", size=15),
        text(c, x, 122, "above mu: positive (Eq. 7)", colour="pull"),
        text(c, x, 150, "hardest others: negative", colour="push"),
        text(c, x, 212, "no clusters to count", colour="quiet"),
    ]


def labeled(c: dict[str, str]) -> list[str]:
    """Draw the five labeled identities, which only the graph network sees."""
    x, y = 770, 266
    return [
        f'<path d="M {x} {y - 26} V {MIDDLE + 42}" stroke="{c["ink"]}" stroke-width="1.5" stroke-dasharray="5 4" '
        'fill="none"/>',
        head(c, x, MIDDLE + 38, "up"),
        f'<rect x="{x - 112}" y="{y - 26}" width="224" height="48" rx="8" fill="{c["box"]}" stroke="{c["edge"]}"/>',
        text(c, x, y - 6, "five labeled identities", weight=600),
        text(c, x, y + 13, "guide the GCN alone (Eq. 10)", colour="quiet"),
    ]


def feedback(c: dict[str, str]) -> list[str]:
    """Draw the way back from the labels to the CNN."""
    x, y = 955, 326
    return [
        f'<path d="M {x} 226 V {y - 12} Q {x} {y} {x - 12} {y} H 236 Q 224 {y} 224 {y - 12} V {MIDDLE + 44}" '
        f'fill="none" stroke="{c["pull"]}" stroke-width="2"/>',
        head(c, 224, MIDDLE + 38, "up", colour="pull"),
        text(c, 440, y - 54, "positives pulled together, negatives pushed apart", weight=600),
        text(c, 440, y - 34, "in the features of the CNN (Eq. 2)", colour="quiet"),
    ]


def around(center: tuple[float, float], degrees: float, radius: float) -> tuple[float, float]:
    """Return a point on a circle; 0 degrees is to the right, 90 up."""
    angle = math.radians(degrees)
    return center[0] + radius * math.cos(angle), center[1] - radius * math.sin(angle)


def node(c: dict[str, str], at: tuple[float, float], radius: float, colour: str) -> str:
    """Draw a node of a graph."""
    return f'<circle cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius}" fill="{c[colour]}"/>'


def arrow(c: dict[str, str], x1: float, y1: float, x2: float, y2: float) -> str:
    """Draw a short arrow to the right."""
    line = f'<line x1="{x1}" y1="{y1}" x2="{x2 - 6}" y2="{y2}" stroke="{c["ink"]}" stroke-width="2"/>'
    return line + head(c, x2, y2, "right")


def head(c: dict[str, str], x: float, y: float, direction: str, *, colour: str = "ink") -> str:
    """Draw the head of an arrow whose tip is at (x, y)."""
    points = {"right": ((0, 0), (-9, -5), (-9, 5)), "up": ((0, 0), (-5, 9), (5, 9))}[direction]
    corners = " ".join(f"{x + dx:g},{y + dy:g}" for dx, dy in points)
    return f'<polygon points="{corners}" fill="{c[colour]}"/>'


def text(
    c: dict[str, str],
    x: float,
    y: float,
    words: str,
    *,
    colour: str = "ink",
    size: int = 14,
    weight: int = 400,
    style: str = "normal",
) -> str:
    """Write a line centered at x."""
    size = 13 if colour == "quiet" else size
    look = f'font-size="{size}" font-weight="{weight}" font-style="{style}"'
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" fill="{c[colour]}" {look}>{words}</text>'


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name in THEMES:
        (FOLDER / f"method-{name}.svg").write_text(figure(name))
        print(f"written: {FOLDER / f'method-{name}.svg'}")
