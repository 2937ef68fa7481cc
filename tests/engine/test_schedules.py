"""Schedules against values worked out by hand."""

from __future__ import annotations

from itertools import pairwise

import pytest

from mprd.engine.schedules import eta, gamma, learning_rate


def test_gamma_falls_linearly_from_one_to_a_half() -> None:
    assert [gamma(e, 40) for e in (0, 39)] == [1.0, 0.5]
    assert gamma(13, 40) == pytest.approx(1 - 0.5 * 13 / 39)
    assert gamma(0, 1) == 1.0


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("linear", [1.0, 0.775, 0.55, 0.325, 0.1]),
        ("cosine", [1.0, 0.868198, 0.55, 0.231802, 0.1]),
        ("step", [1.0, 1.0, 1.0, 0.1, 0.1]),
        ("exponential", [1.0, 0.562341, 0.316228, 0.177828, 0.1]),
        ("constant", [1.0, 1.0, 1.0, 1.0, 1.0]),
    ],
)
def test_eta_takes_the_values_of_its_kind(kind: str, expected: list[float]) -> None:
    values = [eta(e, 5, kind=kind, end=0.1) for e in range(5)]  # type: ignore[arg-type]
    assert values == pytest.approx(expected, abs=1e-6)
    assert all(a >= b for a, b in pairwise(values))


def test_the_learning_rate_falls_tenfold_after_twenty_epochs() -> None:
    rates = [learning_rate(e, 0.01, step=20) for e in (0, 19, 20, 39, 40)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001, 0.0001])
