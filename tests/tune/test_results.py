"""Figures averaged over seeds, and how points are compared."""

from __future__ import annotations

import pytest

from mprd.tune.results import NAMES, MeanStd, PointResult, averages, choose_best, order_agreement, rank_correlation


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


def test_an_order_needs_four_points() -> None:
    points = [point("x", 0.1 * n, silhouette=0.9 - 0.1 * n) for n in range(4)]
    assert order_agreement(points, "silhouette") == pytest.approx(-1)
    assert order_agreement([*points[:3], point("x", 0.4)], "silhouette") is None


def test_the_rank_correlation_gives_ties_their_mean_rank() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5 over sqrt(4.5 * 5)
    assert rank_correlation([1, 2, 2, 5], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation([1, 1], [1, 2]) is None
