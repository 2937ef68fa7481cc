from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import Tensor

from mprd.errors import UserError
from mprd.neighbors.approximate import find_by_index, without_self
from mprd.neighbors.exact import find_neighbors
from tests.graphs import as_lists, unit_rows


def clusters(num_clusters: int, size: int, num_features: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num_clusters, num_features, generator=generator)
    noise = torch.randn(num_clusters * size, num_features, generator=generator)
    return torch.nn.functional.normalize(centers.repeat_interleave(size, 0) + 0.2 * noise, dim=1)


def test_the_own_image_is_removed_wherever_it_is() -> None:
    values, ids = without_self(torch.tensor([[9, 5, 1]] * 3), torch.tensor([[0, 1, 2]] * 3))
    assert ids.tolist() == [[1, 2], [0, 2], [0, 1]]
    assert values.tolist() == [[5, 1], [9, 1], [9, 5]]


def test_an_index_finds_most_neighbors_and_logs_its_recall(caplog: pytest.LogCaptureFixture) -> None:
    features = clusters(30, 12)
    rule = {"k": 4, "similarity": 0.8, "k_max": 20}
    with caplog.at_level(logging.INFO, logger="mprd"):
        table = find_by_index(features, **rule)
    exact, lists = find_neighbors(features, **rule), as_lists(table.ids)
    hits = sum(len({*a} & {*b}) for a, b in zip(lists, as_lists(exact.ids), strict=True))
    assert hits / int((exact.ids >= 0).sum()) > 0.9
    assert "neighbors.search = ivf: recall" in caplog.text
    assert not any(image in ids for image, ids in enumerate(lists))
    assert (table.ids[:, 1:] >= 0).le(table.ids[:, :-1] >= 0).all()  # padding is at the end


def test_an_index_that_searches_everything_gives_the_exact_lists() -> None:
    # so few images that the inverted file has one cell
    features = clusters(4, 5)
    rule = {"k": 3, "similarity": 0.9, "k_max": 8}
    assert torch.equal(find_by_index(features, **rule).ids, find_neighbors(features, **rule).ids)


def test_an_index_needs_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        find_by_index(unit_rows(9), k=2, similarity=0.6)
