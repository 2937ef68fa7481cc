"""Which identities and queries the report shows."""

from __future__ import annotations

import numpy as np
import pytest

from mprd.report.features import choose_changed, choose_shown, first_per_identity, has_match, rank_gallery


def test_a_query_is_valid_if_another_camera_has_its_identity() -> None:
    g_pids, g_camids = np.array([1, 1, 2]), np.array([0, 1, 0])
    found = has_match(np.array([1, 2, 2, 3]), g_pids, q_camids=np.array([0, 0, 1, 0]), g_camids=g_camids)
    assert found.tolist() == [True, False, True, False]


LONG = [0.95, *np.linspace(0.9, 0.2, 12), 0.1]


@pytest.mark.parametrize(
    ("cosines", "matches", "removed", "rows"),
    [
        # a late first match is appended
        (LONG, [12, 13], [0], [*range(1, 11), 12]),
        # a small gallery is shown whole, and a tie goes to the lower index
        ([0.5, 0.5, 0.9], [0], [], [2, 0, 1]),
    ],
)
def test_a_ranking_shows_the_nearest_images_and_the_first_match(
    cosines: list[float], matches: list[int], removed: list[int], rows: list[int]
) -> None:
    is_match, is_removed = (np.isin(np.arange(len(cosines)), ids) for ids in (matches, removed))
    ranking = rank_gallery(np.array(cosines), is_match, is_removed=is_removed, precision=0.1)
    assert [hit.row for hit in ranking.hits] == rows
    assert [hit.is_right for hit in ranking.hits] == [row in matches for row in rows]
    assert (ranking.first_match, ranking.num_matches) == (
        next(hit.rank for hit in ranking.hits if hit.is_right),
        len(matches),
    )


def test_one_query_per_identity_is_kept() -> None:
    assert first_per_identity([3, 0, 2, 1], np.array([5, 6, 6, 5])) == [3, 2]


def test_the_queries_that_changed_most_are_gains_first_then_losses() -> None:
    gains = np.array([0.1, -0.5, np.nan, 0.4, 0.0, -0.2, 0.3])
    assert choose_changed(gains, np.array([1, 2, 3, 4, 5, 6, 4])) == [3, 0, 1, 5]
    assert choose_changed(np.zeros(3), np.array([1, 2, 3])) == []


def test_identities_are_shown_until_their_images_are_too_many() -> None:
    pids = np.repeat([1, 2, 3], [1500, 400, 300])
    assert choose_shown([1, 2, 3], pids) == [1, 2]
    assert choose_shown([9], np.full(5000, 9)) == [9]
