from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mprd.errors import UserError
from mprd.neighbors.exact import find_neighbors, measure_density, rows_at_once
from tests.graphs import as_lists, unit_rows

METRICS = ["cosine", "csls", "camera"]


def at_degrees(*angles: float) -> Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles])


def mean_of_best(values: list[float], num: int) -> float:
    best = sorted(values, reverse=True)[:num]
    return sum(best) / len(best) if best else 0.0


def slow_scores(features: np.ndarray, metric: str, camids: list[int], near: int | None = None) -> np.ndarray:
    """Score all pairs one number at a time: s_ij, or 2 s_ij - m_i - m_j with mean cosines m to the nearest."""
    num_images = len(features)
    sim = features @ features.T
    if metric == "cosine":
        return sim
    near = near or (8 if metric == "csls" else 20)

    def share_of(image: int) -> int:
        """Return how many nearest of an image's camera count: `near` of one of average size."""
        size = sum(camid == camids[image] for camid in camids)
        return near if metric == "csls" else max(1, round(near * size / (num_images / len(set(camids)))))

    scores = np.zeros_like(sim)
    for i in range(num_images):
        for j in range(num_images):
            around_i = [n for n in range(num_images) if n != i and (metric == "csls" or camids[n] == camids[j])]
            around_j = [n for n in range(num_images) if n != j and (metric == "csls" or camids[n] == camids[i])]
            m_i, m_j = (
                mean_of_best([sim[i, n] for n in around_i], share_of(j)),
                mean_of_best([sim[j, n] for n in around_j], share_of(i)),
            )
            scores[i, j] = 2 * sim[i, j] - m_i - m_j
    return scores


def slow_lists(
    features: np.ndarray, scores: np.ndarray, k: int, similarity: float, k_max: int, metric: str = "cosine"
) -> list[list[int]]:
    """List neighbors; cosines above a threshold count where they order the lists."""
    lists = []
    for i in range(len(features)):
        others = [j for j in range(len(features)) if j != i]
        count = sum(float(features[i] @ features[j]) > similarity for j in others)
        others.sort(key=lambda j: -scores[i, j])
        lists.append(others[: min(max(k, count), k_max) if metric == "cosine" else k_max])
    return lists


def test_four_points_on_a_circle_list_their_nearest_first() -> None:
    features = at_degrees(0, 10, 30, 90)
    assert find_neighbors(features, k=2, similarity=0.99).ids.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    # cosines to 0 degrees: .985 at 10, .866 at 30, 0 at 90
    table = find_neighbors(features, k=1, similarity=0.6)
    assert table.ids.tolist() == [[1, 2], [0, 2], [1, 0], [2, -1]]
    assert table.counts.tolist() == [2, 2, 2, 1]
    assert (table.is_capped.any(), table.ids.dtype) == (False, torch.int64)


def test_a_cosine_equal_to_the_similarity_is_not_above_it() -> None:
    features = torch.eye(4, dtype=torch.float64)
    assert find_neighbors(features, k=1, similarity=0.0).counts.tolist() == [1, 1, 1, 1]
    assert find_neighbors(features, k=1, similarity=-0.1).counts.tolist() == [3, 3, 3, 3]


def test_the_cap_cuts_lists_and_is_counted() -> None:
    table = find_neighbors(at_degrees(0, 1, 2, 3, 4, 90), k=1, similarity=0.6, k_max=2)
    assert table.counts.tolist() == [2, 2, 2, 2, 2, 1]
    assert table.is_capped.tolist() == [True] * 5 + [False]
    assert as_lists(table.ids)[0] == [1, 2]


def test_an_image_is_not_its_own_neighbor_even_beside_a_copy_of_itself() -> None:
    lists = as_lists(find_neighbors(at_degrees(0, 0, 0, 50), k=2, similarity=0.9).ids)
    assert [sorted(ids) for ids in lists[:3]] == [[1, 2], [0, 2], [0, 1]]
    assert 3 not in lists[3]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("similarity", [0.3, 1.0])
def test_blocks_agree_with_a_slow_search(metric: Any, similarity: float) -> None:
    features = unit_rows(41)
    camids = [n % 4 if n < 38 else 4 + n % 2 for n in range(41)]  # two cameras of one and two images
    expected = slow_lists(features.numpy(), slow_scores(features.numpy(), metric, camids), 3, similarity, 9, metric)
    rule = {"k": 3, "similarity": similarity, "k_max": 9, "metric": metric, "camids": torch.tensor(camids)}
    assert as_lists(find_neighbors(features, **rule, block_rows=7).ids) == expected
    rows = torch.tensor([17, 0, 40, 17])
    some = find_neighbors(features, rows=rows, block_rows=3, **rule)
    assert as_lists(some.ids) == [expected[row] for row in rows]


@pytest.mark.parametrize("metric", ["csls", "camera"])
@pytest.mark.parametrize("near", [2, 3])
def test_local_density_is_the_mean_over_the_given_number_of_images(metric: Any, near: int) -> None:
    features, camids = unit_rows(41), [n % 4 for n in range(41)]
    expected = slow_lists(features.numpy(), slow_scores(features.numpy(), metric, camids, near), 6, 1.0, 6, metric)
    rule = {"k": 6, "similarity": 1.0, "k_max": 6, "metric": metric, "camids": torch.tensor(camids)}
    assert as_lists(find_neighbors(features, **rule, density_k=near, block_rows=7).ids) == expected
    assert as_lists(find_neighbors(features, **rule).ids) != expected


@pytest.mark.parametrize("metric", METRICS)
def test_a_query_from_outside_excludes_nothing(metric: Any) -> None:
    features, camids, rows = unit_rows(20), torch.arange(20) % 2, [4, 7]
    rule = {"k": 2, "similarity": 0.99, "k_max": 2, "metric": metric, "camids": camids}
    table = find_neighbors(features, queries=features[rows], query_camids=camids[rows], **rule)
    assert table.ids.shape == (2, 2)
    assert metric != "cosine" or table.ids[:, 0].tolist() == rows


def test_the_camera_score_of_a_query_subtracts_both_sides() -> None:
    features, query = at_degrees(0, 20, 40, 60), at_degrees(10)
    sim, within = (query @ features.T)[0], features @ features.T
    # cameras 0, 0, 1, 1; the query is of camera 1: d(q, 0), d(q, 1), and each image's mean to the others of camera 1
    d_query = [(sim[0] + sim[1]) / 2, (sim[2] + sim[3]) / 2]
    d_images = [(within[0, 2] + within[0, 3]) / 2, (within[1, 2] + within[1, 3]) / 2, within[2, 3], within[3, 2]]
    scores = [float(2 * sim[j] - d_query[j // 2] - d_images[j]) for j in range(4)]
    rule = {"k": 4, "similarity": 1.0, "metric": "camera", "camids": torch.tensor([0, 0, 1, 1])}
    table = find_neighbors(features, queries=query, query_camids=torch.tensor([1]), **rule)
    assert table.ids[0].tolist() == sorted(range(4), key=lambda j: -scores[j])


def test_the_density_of_an_image_alone_in_its_camera_is_zero_there() -> None:
    density = measure_density(at_degrees(0, 60, 90), metric="camera", camids=torch.tensor([0, 1, 1]))
    expected = [[0.0, (0.5 + 0.0) / 2], [0.5, math.cos(math.radians(30))], [0.0, math.cos(math.radians(30))]]
    torch.testing.assert_close(density.values, torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_fewest_images_and_rows() -> None:
    assert find_neighbors(unit_rows(2), k=1, similarity=0.6).ids.tolist() == [[1], [0]]
    table = find_neighbors(at_degrees(0, 1, 2), k=1, similarity=-1, k_max=64)
    assert (table.counts.tolist(), table.is_capped.any()) == ([2, 2, 2], False)
    nothing = torch.empty(0, dtype=torch.int64)
    assert find_neighbors(unit_rows(5), k=2, similarity=0.6, rows=nothing).ids.shape == (0, 2)
    for num_images in (0, 1, 3):
        with pytest.raises(UserError, match=r"neighbors\.k must not exceed"):
            find_neighbors(unit_rows(num_images), k=3, similarity=0.6)


@pytest.mark.parametrize(("device", "memory_mb", "rows"), [("cuda", 4, 1048), ("cpu", 4, 512), ("cpu", 1, 262)])
def test_a_block_fits_into_the_memory_and_holds_at_least_a_row(device: str, memory_mb: int, rows: int) -> None:
    assert rows_at_once(1000, torch.device(device), memory_mb=memory_mb) == rows
    assert rows_at_once(10**9, torch.device(device), memory_mb=memory_mb) == 1


REFUSED = [
    ({"metric": "camera"}, UserError, r"neighbors\.metric: camera needs camera ids"),
    ({"metric": "euclid"}, UserError, r"neighbors\.metric must be one of"),
    ({"k_max": 2}, UserError, r"neighbors\.k_max must be at least neighbors\.k = 3, but got 2"),
    ({"metric": "camera", "camids": torch.zeros(8)}, ValueError, "camids must be as many as the 9 images"),
    ({"queries": unit_rows(2, 7)}, ValueError, "queries must have 6 columns like the features, but got 7"),
    ({"queries": unit_rows(2), "rows": torch.arange(2)}, ValueError, "rows or queries, not both"),
    ({"queries": unit_rows(2), "metric": "camera", "camids": torch.arange(9) % 2}, UserError, "each query image"),
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
    assert not find_neighbors(features, k=3, similarity=0.6, metric="csls").ids.requires_grad
    assert torch.equal(features.detach(), before)
