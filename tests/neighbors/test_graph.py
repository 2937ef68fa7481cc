"""Lists by the camera-corrected similarity c equal a slow loop, in whatever blocks; an index finds most of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mprd.neighbors import graph as graph_module
from mprd.neighbors import graph_index
from mprd.neighbors.graph import CosineBlocks, Density, SimilarityGraph, find_graph, group_images, measure_density
from mprd.neighbors.graph_index import find_graph_by_index
from tests.graphs import at_degrees, groups, unit_rows


def slow_corrected(features: np.ndarray, camids: np.ndarray, density_k: int) -> np.ndarray:
    """Write c out: 2 s_ij - (mean of i's best in j's camera) - (mean of j's best in i's); inf for an image itself."""
    images = range(len(features))
    cameras = sorted(set(camids.tolist()))
    mean_size = len(features) / len(cameras)

    def density(i: int, camera: int) -> float:
        best = sorted(
            (float(features[i] @ features[j]) for j in images if camids[j] == camera and j != i), reverse=True
        )
        best = best[: max(1, round(density_k * sum(camids == camera) / mean_size))]
        return sum(best) / len(best)

    c = np.full((len(features), len(features)), np.inf)
    for i in images:
        for j in images:
            if i != j:
                c[i, j] = 2 * features[i] @ features[j] - density(i, camids[j]) - density(j, camids[i])
    return c


def drawn() -> tuple[Tensor, Tensor]:
    """Draw 20 unit features in 4 groups, under cameras of 11, 7 and 2 images."""
    return groups(4, 5, spread=0.4), torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 1, 2, 0, 0, 2, 1])


@pytest.fixture(autouse=True)
def few_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the density of four images, for sets of twenty."""
    monkeypatch.setattr(graph_module, "DENSITY_K", 4)


def in_blocks(monkeypatch: pytest.MonkeyPatch, *, rows: int, num_kept: int) -> None:
    """Search in blocks of so many rows, the first of which are kept from the densities to the lists."""
    bytes_per_block = rows * 20 * 4
    monkeypatch.setattr(graph_module, "rows_at_once", lambda *_: rows)
    monkeypatch.setattr(graph_module, "KEPT_MB", num_kept * bytes_per_block / 2**20)


@pytest.mark.parametrize(("rows", "num_kept"), [(20, 1), (7, 0), (7, 2), (7, 3)])
def test_lists_are_ordered_by_c_with_a_share_of_each_camera(
    rows: int, num_kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_blocks(monkeypatch, rows=rows, num_kept=num_kept)
    features, camids = drawn()
    graph = find_graph(features, camids, width=10)
    c = slow_corrected(features.double().numpy(), camids.numpy(), 4)
    np.fill_diagonal(c, -np.inf)
    assert np.array_equal(graph.ids.numpy(), np.argsort(-c, axis=1)[:, :10])
    np.testing.assert_allclose(graph.scores.numpy(), -np.sort(-c, axis=1)[:, :10], atol=1e-5)
    first, second = torch.tensor([0, 3, 18]), torch.tensor([18, 15, 4])
    np.testing.assert_allclose(graph.between(first, second).numpy(), c[first, second], atol=1e-5)


def test_without_cameras_all_images_are_one_group() -> None:
    features = unit_rows(20, dtype=torch.float32)
    c = slow_corrected(features.double().numpy(), np.zeros(20, int), 4)
    np.fill_diagonal(c, -np.inf)
    graph = find_graph(features, None, width=6)
    assert np.array_equal(graph.ids.numpy(), np.argsort(-c, axis=1)[:, :6])


def test_a_pair_that_no_list_holds_is_measured_beside_a_list_with_padding() -> None:
    density = Density(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64), [1])
    ids, scores = torch.tensor([[1], [-1], [0]]), torch.tensor([[0.7], [-torch.inf], [0.2]])
    graph = SimilarityGraph(at_degrees(0, 60, 90), density, ids, scores, reads_lists=True)
    found = graph.between(torch.tensor([0, 0, 1, 2]), torch.tensor([1, 2, 2, 0]))
    torch.testing.assert_close(found, torch.tensor([0.7, 0, 2 * math.cos(math.radians(30)), 0.2]), atol=1e-6, rtol=0)


def test_the_density_of_an_image_alone_in_its_camera_is_zero_there() -> None:
    features = at_degrees(0, 60, 90)
    blocks = CosineBlocks(features, block_rows=2)
    density = measure_density(blocks, group_images(features, torch.tensor([0, 1, 1])))
    expected = [[0.0, (0.5 + 0.0) / 2], [0.5, math.cos(math.radians(30))], [0.0, math.cos(math.radians(30))]]
    torch.testing.assert_close(density.values, torch.tensor(expected), atol=1e-6, rtol=0)


def test_cameras_must_be_as_many_as_the_images() -> None:
    with pytest.raises(ValueError, match="camids must be as many as the 9 images, but got 8"):
        find_graph(unit_rows(9), torch.zeros(8), width=3)


def test_an_index_that_misses_nothing_gives_the_exact_graph() -> None:
    """A camera with few images is searched whole, and as candidates all of them are taken."""
    pytest.importorskip("faiss")
    features, camids = drawn()
    exact = find_graph(features, camids, width=18)
    # the index of so few images has one cell; half of the width is more than any camera holds
    found = find_graph_by_index(features, camids, width=36)
    torch.testing.assert_close(found.density.values, exact.density.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.scores[:, :18], exact.scores, atol=1e-5, rtol=0)
    assert torch.equal(found.ids[:, :10], exact.ids[:, :10])
    assert not (found.ids == torch.arange(20)[:, None]).any()


def test_an_index_holds_of_a_camera_no_more_candidates_than_it_has_images(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    features, camids = unit_rows(40, dtype=torch.float32), torch.arange(40) // 2
    widths, rank = [], graph_index.rank_candidates

    def watch(ids: Tensor, *rest: Any, **width: int) -> tuple[Tensor, Tensor]:
        widths.append(ids.shape[1])
        return rank(ids, *rest, **width)

    monkeypatch.setattr(graph_index, "rank_candidates", watch)
    find_graph_by_index(features, camids, width=32)
    assert widths == [40]


def test_an_index_finds_most_neighbors_of_a_crowd(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(graph_module, "DENSITY_K", 20)
    features, camids = groups(60, 8, spread=0.2), torch.arange(480) % 3
    exact = find_graph(features, camids, width=6)
    found = find_graph_by_index(features, camids, width=6)
    assert float((exact.ids[:, :, None] == found.ids[:, None]).any(2).float().mean()) > 0.9
