from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mprd.errors import UserError
from mprd.neighbors.exact import find_neighbors, rows_at_once
from tests.graphs import as_lists, at_degrees, unit_rows


def slow_lists(features: np.ndarray, k: int, similarity: float, k_max: int) -> list[list[int]]:
    """Sort all others of each image by cosine, one number at a time."""
    lists = []
    for i in range(len(features)):
        others = [j for j in range(len(features)) if j != i]
        count = sum(float(features[i] @ features[j]) > similarity for j in others)
        others.sort(key=lambda j, i=i: -float(features[i] @ features[j]))
        lists.append(others[: min(max(k, count), k_max)])
    return lists


def test_four_points_on_a_circle_list_their_nearest_first() -> None:
    features = at_degrees(0, 10, 30, 90)
    assert find_neighbors(features, k=2, similarity=0.99).ids.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    # cosines to 0 degrees: .985 at 10, .866 at 30, 0 at 90
    table = find_neighbors(features, k=1, similarity=0.6)
    assert table.ids.tolist() == [[1, 2], [0, 2], [1, 0], [2, -1]]
    assert (table.is_capped.any(), table.ids.dtype) == (False, torch.int64)


def test_a_cosine_equal_to_the_similarity_is_not_above_it() -> None:
    features = torch.eye(4, dtype=torch.float64)
    assert find_neighbors(features, k=1, similarity=0.0).ids.shape == (4, 1)
    assert [*map(len, as_lists(find_neighbors(features, k=1, similarity=-0.1).ids))] == [3, 3, 3, 3]


def test_the_cap_cuts_lists_and_is_counted() -> None:
    table = find_neighbors(at_degrees(0, 1, 2, 3, 4, 90), k=1, similarity=0.6, k_max=2)
    assert [*map(len, as_lists(table.ids))] == [2, 2, 2, 2, 2, 1]
    assert table.is_capped.tolist() == [True] * 5 + [False]
    assert as_lists(table.ids)[0] == [1, 2]


def test_an_image_is_not_its_own_neighbor_even_beside_a_copy_of_itself() -> None:
    lists = as_lists(find_neighbors(at_degrees(0, 0, 0, 50), k=2, similarity=0.9).ids)
    assert [sorted(ids) for ids in lists[:3]] == [[1, 2], [0, 2], [0, 1]]
    assert 3 not in lists[3]


@pytest.mark.parametrize("similarity", [0.3, 1.0])
def test_blocks_agree_with_a_slow_search(similarity: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mprd.neighbors.exact.CPU_ROWS", 3)
    features = unit_rows(41)
    expected = slow_lists(features.numpy(), 3, similarity, 9)
    rule: dict[str, Any] = {"k": 3, "similarity": similarity, "k_max": 9}
    assert as_lists(find_neighbors(features, **rule).ids) == expected
    rows = torch.tensor([17, 0, 40, 17])
    some = find_neighbors(features, rows=rows, **rule)
    assert as_lists(some.ids) == [expected[row] for row in rows]


def test_a_query_from_outside_excludes_nothing() -> None:
    features, rows = unit_rows(20), [4, 7]
    table = find_neighbors(features, queries=features[rows], k=2, similarity=0.99, k_max=2)
    assert table.ids.shape == (2, 2)
    assert table.ids[:, 0].tolist() == rows


def test_the_fewest_images_and_rows() -> None:
    assert find_neighbors(unit_rows(2), k=1, similarity=0.6).ids.tolist() == [[1], [0]]
    table = find_neighbors(at_degrees(0, 1, 3), k=1, similarity=-1, k_max=64)
    assert (table.ids.tolist(), table.is_capped.any()) == ([[1, 2], [0, 2], [1, 0]], False)
    nothing = torch.empty(0, dtype=torch.int64)
    assert find_neighbors(unit_rows(5), k=2, similarity=0.6, rows=nothing).ids.shape == (0, 2)
    for num_images in (0, 1, 3):
        with pytest.raises(UserError, match=r"neighbors\.k must not exceed"):
            find_neighbors(unit_rows(num_images), k=3, similarity=0.6)


@pytest.mark.parametrize(("device", "memory_mb", "rows"), [("cuda", 4, 1048), ("cpu", 4, 512), ("cpu", 1, 262)])
def test_a_block_fits_into_the_memory_and_holds_at_least_a_row(
    device: str, memory_mb: int, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mprd.neighbors.exact.SIMILARITIES_MB", memory_mb)
    assert rows_at_once(1000, torch.device(device)) == rows
    assert rows_at_once(10**9, torch.device(device)) == 1


REFUSED = [
    ({"k_max": 2}, UserError, r"neighbors\.k_max must be at least neighbors\.k = 3, but got 2"),
    ({"queries": unit_rows(2, 7)}, ValueError, "queries must have 6 columns like the features, but got 7"),
    ({"queries": unit_rows(2), "rows": torch.arange(2)}, ValueError, "rows or queries, not both"),
]


@pytest.mark.parametrize(("arguments", "error", "words"), REFUSED)
def test_arguments_that_do_not_fit_are_refused(arguments: dict[str, Any], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        find_neighbors(unit_rows(9), **{"k": 3, "similarity": 0.6, **arguments})


def test_features_must_be_finite_unit_rows_of_floats() -> None:
    features = unit_rows(9)
    with pytest.raises(ValueError, match="unit rows"):
        find_neighbors(2 * features, k=3, similarity=0.6)
    with pytest.raises(TypeError, match="floating point"):
        find_neighbors(features.long(), k=3, similarity=0.6)
    features[4, 2] = torch.nan
    with pytest.raises(UserError, match="row 4"):
        find_neighbors(features, k=3, similarity=0.6)


def test_the_search_leaves_the_features_as_they_were() -> None:
    features = unit_rows(9).requires_grad_()
    before = features.detach().clone()
    assert not find_neighbors(features, k=3, similarity=0.6).ids.requires_grad
    assert torch.equal(features.detach(), before)
