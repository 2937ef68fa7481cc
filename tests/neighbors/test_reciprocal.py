"""J on the camera-corrected similarity equals a slow loop, and its table answers for any pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mprd.neighbors import graph as graph_module
from mprd.neighbors import jaccard
from mprd.neighbors.graph import SimilarityGraph, find_graph
from mprd.neighbors.reciprocal import LEAST, measure_similarities
from tests.graphs import slow_jaccard
from tests.neighbors.test_graph import drawn, slow_corrected


@pytest.fixture(scope="module")
def graph() -> SimilarityGraph:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(graph_module, "DENSITY_K", 4)
        return find_graph(*drawn(), width=10)


@pytest.fixture(scope="module")
def similarities() -> np.ndarray:
    """J of all pairs by slow loops; 0 where a table leaves it out."""
    features, camids = drawn()
    c = slow_corrected(features.double().numpy(), camids.numpy(), 4)
    # the loop weighs by exp(-distance), and an image by that of the nearest pair of all
    np.fill_diagonal(c, c[np.isfinite(c)].max())
    found = 1 - slow_jaccard(-c, 6, 3)
    return np.where(found > LEAST, found, 0)


@pytest.mark.parametrize("at_once", [2**22, 1])
def test_a_table_holds_the_similarities_of_a_slow_loop(
    at_once: int, graph: SimilarityGraph, similarities: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jaccard, "TERMS_AT_ONCE", at_once)
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
