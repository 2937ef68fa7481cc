from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from mprd.errors import UserError
from mprd.neighbors.exact import find_neighbors, measure_density


def unit_rows(num_images: int, num_features: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_images, num_features, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(features, dim=1)


def at_degrees(*angles: float) -> Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles])


def mean_of_best(values: list[float], num: int) -> float:
    best = sorted(values, reverse=True)[:num]
    return sum(best) / len(best) if best else 0.0


def slow_scores(features: np.ndarray, metric: str, camids: list[int] | None, *, near: int | None = None) -> np.ndarray:
    """Score all pairs as DESIGN section 9 words it, one number at a time."""
    num_images = len(features)
    sim = features @ features.T
    if metric == "cosine":
        return sim
    scores = np.zeros_like(sim)
    for i in range(num_images):
        for j in range(num_images):
            if metric == "csls":
                m_i = mean_of_best([sim[i, n] for n in range(num_images) if n != i], near or 8)
                m_j = mean_of_best([sim[j, n] for n in range(num_images) if n != j], near or 8)
            else:
                assert camids is not None
                like_j = [n for n in range(num_images) if n != i and camids[n] == camids[j]]
                like_i = [n for n in range(num_images) if n != j and camids[n] == camids[i]]
                m_i = mean_of_best([sim[i, n] for n in like_j], near or 5)
                m_j = mean_of_best([sim[j, n] for n in like_i], near or 5)
            scores[i, j] = 2 * sim[i, j] - m_i - m_j
    return scores


def slow_lists(features: np.ndarray, scores: np.ndarray, k: int, similarity: float, k_max: int) -> list[list[int]]:
    lists = []
    for i in range(len(features)):
        others = [j for j in range(len(features)) if j != i]
        count = sum(float(features[i] @ features[j]) > similarity for j in others)
        others.sort(key=lambda j: -scores[i, j])
        lists.append(others[: min(max(k, count), k_max)])
    return lists


def as_lists(ids: Tensor) -> list[list[int]]:
    return [[n for n in row if n >= 0] for row in ids.tolist()]


def test_four_points_on_a_circle_list_their_nearest_first() -> None:
    table = find_neighbors(at_degrees(0, 10, 30, 90), k=2, similarity=0.99)
    assert table.ids.tolist() == [[1, 2], [0, 2], [1, 0], [2, 1]]
    assert table.counts.tolist() == [2, 2, 2, 2]
    assert table.num_capped == 0
    assert table.ids.dtype == torch.int64


def test_images_above_the_similarity_are_listed_beyond_the_first_k() -> None:
    # cosines to 0 degrees: .985 at 10, .866 at 30, 0 at 90
    table = find_neighbors(at_degrees(0, 10, 30, 90), k=1, similarity=0.6)
    assert table.ids.tolist() == [[1, 2], [0, 2], [1, 0], [2, -1]]
    assert table.counts.tolist() == [2, 2, 2, 1]


def test_a_cosine_equal_to_the_similarity_is_not_above_it() -> None:
    features = torch.eye(4, dtype=torch.float64)
    assert find_neighbors(features, k=1, similarity=0.0).counts.tolist() == [1, 1, 1, 1]
    assert find_neighbors(features, k=1, similarity=-0.1).counts.tolist() == [3, 3, 3, 3]


def test_the_cap_cuts_lists_and_is_counted() -> None:
    table = find_neighbors(at_degrees(0, 1, 2, 3, 4, 90), k=1, similarity=0.6, k_max=2)
    assert table.counts.tolist() == [2, 2, 2, 2, 2, 1]
    assert table.num_capped == 5
    assert as_lists(table.ids)[0] == [1, 2]


def test_a_list_never_holds_more_than_all_other_images() -> None:
    table = find_neighbors(at_degrees(0, 1, 2), k=1, similarity=-1, k_max=64)
    assert table.counts.tolist() == [2, 2, 2]
    assert table.num_capped == 0


def test_an_image_is_not_its_own_neighbor_even_beside_a_copy_of_itself() -> None:
    features = at_degrees(0, 0, 0, 50)
    for row, ids in enumerate(as_lists(find_neighbors(features, k=2, similarity=0.9).ids)):
        assert row not in ids
    assert [sorted(ids) for ids in as_lists(find_neighbors(features, k=2, similarity=0.9).ids)[:3]] == [
        [1, 2],
        [0, 2],
        [0, 1],
    ]


@pytest.mark.parametrize("metric", ["cosine", "csls", "camera"])
@pytest.mark.parametrize("similarity", [0.3, 1.0])
def test_blocks_agree_with_a_slow_search(metric: str, similarity: float) -> None:
    features = unit_rows(41)
    camids = [n % 4 if n < 38 else 4 + n % 2 for n in range(41)]  # two cameras of one and two images
    scores = slow_scores(features.numpy(), metric, camids)
    expected = slow_lists(features.numpy(), scores, 3, similarity, 9)
    table = find_neighbors(
        features, k=3, similarity=similarity, k_max=9, metric=metric, camids=torch.tensor(camids), block_rows=7
    )
    assert as_lists(table.ids) == expected


@pytest.mark.parametrize("metric", ["csls", "camera"])
@pytest.mark.parametrize("near", [2, 3, 50])
def test_local_density_is_taken_of_as_many_images_as_asked_for(metric: str, near: int) -> None:
    features, camids = unit_rows(41), [n % 4 for n in range(41)]
    scores = slow_scores(features.numpy(), metric, camids, near=near)
    rule = {"k": 6, "similarity": 1.0, "metric": metric, "camids": torch.tensor(camids)}
    table = find_neighbors(features, **rule, density_k=near, block_rows=7)
    assert as_lists(table.ids) == slow_lists(features.numpy(), scores, 6, 1.0, 64)
    assert as_lists(table.ids) != as_lists(find_neighbors(features, **rule).ids)


@pytest.mark.parametrize("metric", ["cosine", "csls", "camera"])
def test_searching_some_rows_gives_these_rows_of_the_full_table(metric: str) -> None:
    features, camids = unit_rows(30), torch.arange(30) % 3
    options = {"k": 3, "similarity": 0.4, "metric": metric, "camids": camids}
    full = as_lists(find_neighbors(features, **options).ids)
    rows = torch.tensor([17, 0, 29, 17])
    density = None if metric == "cosine" else measure_density(features, metric=metric, camids=camids, block_rows=4)
    for given in (None, density):
        table = find_neighbors(features, rows=rows, density=given, block_rows=3, **options)
        assert as_lists(table.ids) == [full[row] for row in rows]


@pytest.mark.parametrize("metric", ["cosine", "csls", "camera"])
def test_a_query_from_outside_excludes_nothing(metric: str) -> None:
    features, camids = unit_rows(20), torch.arange(20) % 2
    table = find_neighbors(
        features,
        k=2,
        similarity=0.99,
        metric=metric,
        camids=camids,
        queries=features[[4, 7]],
        query_camids=camids[[4, 7]],
    )
    assert table.ids.shape == (2, 2)
    if metric == "cosine":
        assert table.ids[:, 0].tolist() == [4, 7]


def test_the_camera_score_of_a_query_subtracts_both_sides() -> None:
    features = at_degrees(0, 20, 40, 60)
    query = at_degrees(10)
    sim = (query @ features.T)[0]
    within = features @ features.T
    # cameras 0, 0, 1, 1; the query is of camera 1: d(q, 0), d(q, 1), and each image's mean to the others of camera 1
    d_query = [(sim[0] + sim[1]) / 2, (sim[2] + sim[3]) / 2]
    d_images = [(within[0, 2] + within[0, 3]) / 2, (within[1, 2] + within[1, 3]) / 2, within[2, 3], within[3, 2]]
    scores = [float(2 * sim[j] - d_query[j // 2] - d_images[j]) for j in range(4)]
    table = find_neighbors(
        features,
        k=4,
        similarity=1.0,
        metric="camera",
        camids=torch.tensor([0, 0, 1, 1]),
        queries=query,
        query_camids=torch.tensor([1]),
    )
    assert table.ids[0].tolist() == sorted(range(4), key=lambda j: -scores[j])


def test_the_density_of_an_image_alone_in_its_camera_is_zero_there() -> None:
    density = measure_density(at_degrees(0, 60, 90), metric="camera", camids=torch.tensor([0, 1, 1]))
    expected = [[0.0, (0.5 + 0.0) / 2], [0.5, math.cos(math.radians(30))], [0.0, math.cos(math.radians(30))]]
    torch.testing.assert_close(density.values, torch.tensor(expected), atol=1e-6, rtol=0)


def test_the_table_reads_as_csr() -> None:
    table = find_neighbors(at_degrees(0, 10, 30, 90), k=1, similarity=0.6)
    assert table.indptr.tolist() == [0, 2, 4, 6, 7]
    assert table.indices.tolist() == [1, 2, 0, 2, 1, 0, 2]


def test_a_table_keeps_no_more_than_its_longest_list_is_wide() -> None:
    table = find_neighbors(at_degrees(0, 10, 30, 90), k=1, similarity=0.6, k_max=3)
    assert table.ids.untyped_storage().nbytes() == 8 * table.ids.numel() == 8 * 4 * 2


def test_no_rows_give_an_empty_table() -> None:
    table = find_neighbors(unit_rows(5), k=2, similarity=0.6, rows=torch.empty(0, dtype=torch.int64))
    assert table.ids.shape == (0, 2)
    assert table.indptr.tolist() == [0]
    assert table.indices.tolist() == []


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_too_few_images_are_an_error_that_names_the_setting(num_images: int) -> None:
    with pytest.raises(UserError, match=r"neighbors\.k must not exceed"):
        find_neighbors(unit_rows(num_images), k=3, similarity=0.6)


def test_two_images_have_one_neighbor_each() -> None:
    assert find_neighbors(unit_rows(2), k=1, similarity=0.6).ids.tolist() == [[1], [0]]


def test_camera_without_camera_ids_is_an_error_that_names_the_setting() -> None:
    with pytest.raises(UserError, match=r"neighbors\.metric"):
        find_neighbors(unit_rows(9), k=3, similarity=0.6, metric="camera")
    with pytest.raises(UserError, match=r"neighbors\.metric"):
        find_neighbors(unit_rows(9), k=3, similarity=0.6, metric="euclid")  # type: ignore[arg-type]


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
    table = find_neighbors(features, k=3, similarity=0.6, metric="csls")
    assert not table.ids.requires_grad
    assert torch.equal(features.detach(), before)
