"""Figures averaged over seeds, and how points are compared."""

from __future__ import annotations

import pytest

from mprd.tune.results import NAMES, MeanStd, PointResult, averages, choose_best, order_agreement


def point(name: str, mean: float, *seeds: int, **figures: float) -> PointResult:
    return PointResult(name, {}, seeds or (0,), {k: MeanStd(v, None) for k, v in {"mAP": mean, **figures}.items()})


def row(**figures: float) -> dict[str, float | None]:
    return {**dict.fromkeys(NAMES), **figures}


def test_seeds_are_averaged_and_their_spread_is_the_sample_deviation() -> None:
    rows = [row(mAP=value, rank1=0.5) for value in (0.2, 0.3, 0.7)]
    figures = averages(rows)
    assert figures["mAP"].mean == pytest.approx(0.4, abs=1e-12)
    assert figures["mAP"].std == pytest.approx(0.07**0.5, abs=1e-12)
    assert figures.keys() == {"mAP", "rank1"}
    assert str(figures["mAP"]) == "40.0 ± 26.5"
    assert str(averages(rows[:1])["mAP"]) == "20.0"


def test_one_lucky_seed_does_not_make_the_best_point() -> None:
    best = choose_best([point("lucky", 0.9, 0), point("fair", 0.5, 0, 1), point("better", 0.6, 0, 1)], "mAP")
    assert best is not None
    assert best.name == "better"
    assert choose_best([], "mAP") is None


@pytest.mark.parametrize(
    ("silhouettes", "expected"),
    [
        ((0.9, 0.8, 0.7, 0.6), -1),
        # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5 over sqrt(4.5 * 5)
        ((0.1, 0.2, 0.2, 0.5), 4.5 / (4.5 * 5) ** 0.5),
        ((0.5, 0.5, 0.5, 0.5), None),
        ((0.1, 0.2, 0.3), None),
    ],
)
def test_the_order_of_a_figure_is_compared_with_that_of_map(
    silhouettes: tuple[float, ...], expected: float | None
) -> None:
    points = [point("x", 0.1 * number, silhouette=value) for number, value in enumerate(silhouettes)]
    found = order_agreement([*points, point("without", 0.9)], "silhouette")
    assert found == (None if expected is None else pytest.approx(expected))
