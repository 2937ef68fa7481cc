"""J on the camera-corrected similarity equals a slow loop, and its table answers for any pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from mprd.neighbors import reciprocal
from mprd.neighbors.approximate import Index
from mprd.neighbors.graph import SimilarityGraph, find_graph
from mprd.neighbors.graph_index import find_graph_by_index
from mprd.neighbors.reciprocal import LEAST, SimilarityTable, measure_similarities
from tests.graphs import groups, slow_jaccard


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


@pytest.fixture(scope="module")
def graph() -> SimilarityGraph:
    return find_graph(*drawn(), width=10, density_k=4)


@pytest.fixture(scope="module")
def similarities() -> np.ndarray:
    """J of all pairs by slow loops; 0 where a table leaves it out."""
    features, camids = drawn()
    c = slow_corrected(features.double().numpy(), camids.numpy(), 4)
    # the loop weighs by exp(-distance), and an image by that of the nearest pair of all
    np.fill_diagonal(c, c[np.isfinite(c)].max())
    found = 1 - slow_jaccard(-c, 6, 3)
    return np.where(found > LEAST, found, 0)


def test_lists_are_ordered_by_c_with_a_share_of_each_camera(graph: SimilarityGraph) -> None:
    features, camids = drawn()
    c = slow_corrected(features.double().numpy(), camids.numpy(), 4)
    np.fill_diagonal(c, -np.inf)
    assert np.array_equal(graph.ids.numpy(), np.argsort(-c, axis=1)[:, :10])
    np.testing.assert_allclose(graph.scores.numpy(), -np.sort(-c, axis=1)[:, :10], atol=1e-5)
    first, second = torch.tensor([0, 3, 18]), torch.tensor([18, 15, 4])
    np.testing.assert_allclose(graph.between(first, second).numpy(), c[first, second], atol=1e-5)


@pytest.mark.parametrize("at_once", [2**22, 1])
def test_a_table_holds_the_similarities_of_a_slow_loop(
    at_once: int, graph: SimilarityGraph, similarities: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reciprocal, "TERMS_AT_ONCE", at_once)
    table = measure_similarities(graph, k1=6, k2=3)
    everyone = torch.arange(len(graph))
    np.testing.assert_allclose(table.between(everyone[:, None], everyone), similarities, atol=1e-6)
    assert 2 * len(table.keys) == (similarities > 0).sum() - len(graph)


def test_pairs_above_a_threshold_are_listed_for_both_images(graph: SimilarityGraph, similarities: np.ndarray) -> None:
    ids, values = measure_similarities(graph, k1=6, k2=3).above(0.4)
    for image, (row, scores) in enumerate(zip(ids, values, strict=True)):
        expected = np.flatnonzero(similarities[image] > 0.4)
        assert row[row >= 0].tolist() == expected.tolist()
        np.testing.assert_allclose(scores[row >= 0], similarities[image, expected], atol=1e-6)


def test_the_surest_pairs_are_those_of_highest_similarity(graph: SimilarityGraph, similarities: np.ndarray) -> None:
    table = measure_similarities(graph, k1=6, k2=3)
    upper = np.sort(np.triu(similarities, 1).ravel())[::-1]
    np.testing.assert_allclose(table.values[table.surest(5)], upper[:5], atol=1e-6)
    assert len(table.surest(1000)) == len(table.keys)


def test_a_copy_has_the_similarities_of_its_original(graph: SimilarityGraph) -> None:
    table = measure_similarities(graph, k1=6, k2=3)
    with_copies = table.with_copies(torch.tensor([4, 1]))
    first, second = torch.tensor([20, 0, 21, 20]), torch.tensor([0, 21, 1, 21])
    assert torch.equal(with_copies.between(first, second), table.between(*torch.tensor([[4, 0, 1, 4], [0, 1, 1, 1]])))


def test_the_empty_table_has_nothing() -> None:
    nothing = torch.zeros(0, 2).long()
    assert SimilarityTable.empty().between(nothing, nothing[:, :1]).shape == (0, 2)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_that_misses_nothing_gives_the_exact_graph(kind: Index) -> None:
    """A camera with few images is searched whole, and as candidates all of them are taken."""
    pytest.importorskip("faiss")
    features, camids = drawn()
    exact = find_graph(features, camids, width=18, density_k=4)
    # the index of so few images has one cell; half of the width is more than any camera holds
    found = find_graph_by_index(features, camids, width=36, density_k=4, kind=kind)
    torch.testing.assert_close(found.density.values, exact.density.values, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.scores[:, :18], exact.scores, atol=1e-5, rtol=0)
    assert torch.equal(found.ids[:, :10], exact.ids[:, :10])
    assert not (found.ids == torch.arange(20)[:, None]).any()


def test_an_index_finds_most_neighbors_of_a_crowd() -> None:
    pytest.importorskip("faiss")
    features, camids = groups(60, 8, spread=0.2), torch.arange(480) % 3
    exact = find_graph(features, camids, width=6)
    found = find_graph_by_index(features, camids, width=6, kind="ivf")
    assert float((exact.ids[:, :, None] == found.ids[:, None]).any(2).float().mean()) > 0.9
