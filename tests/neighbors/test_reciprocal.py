from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from mprd.neighbors import reciprocal
from mprd.neighbors.reciprocal import SimilarityTable, measure_similarities
from tests.graphs import groups, slow_jaccard, squared_distances


def test_a_table_holds_the_similarities_of_a_slow_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    # blocks of one row
    monkeypatch.setattr(reciprocal, "jaccard_distances", partial(reciprocal.jaccard_distances, memory_mb=0))
    features = groups(3, 5, loners=4, spread=0.4)
    expected = 1 - slow_jaccard(squared_distances(features.numpy()), 6, 3)
    everyone = torch.arange(len(features))
    table = measure_similarities(features, k1=6, k2=3)
    np.testing.assert_allclose(table.between(everyone[:, None], everyone), expected, atol=1e-6)
    assert 0 < (expected == 0).sum() == expected.size - len(table.keys)


def test_a_copy_has_the_similarities_of_its_original() -> None:
    features = groups(3, 5, loners=4, spread=0.4)
    table = measure_similarities(features, k1=6, k2=3)
    with_copies = table.with_copies(torch.tensor([4, 1]))
    first, second = torch.tensor([19, 0, 20, 19]), torch.tensor([0, 20, 1, 20])
    assert len(features) == 19
    assert torch.equal(with_copies.between(first, second), table.between(*torch.tensor([[4, 0, 1, 4], [0, 1, 1, 1]])))


def test_the_empty_table_has_nothing() -> None:
    nothing = torch.zeros(0, 2).long()
    assert SimilarityTable.empty().between(nothing, nothing[:, :1]).shape == (0, 2)
