from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import Tensor

from mprd.errors import UserError
from mprd.neighbors.approximate import (
    TopK,
    find_by_index,
    list_width,
    merge_shards,
    search_shard,
    to_table,
    without_self,
)
from mprd.neighbors.exact import find_neighbors
from tests.graphs import as_lists, unit_rows


def clusters(num_clusters: int, size: int, num_features: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num_clusters, num_features, generator=generator)
    noise = torch.randn(num_clusters * size, num_features, generator=generator)
    return torch.nn.functional.normalize(centers.repeat_interleave(size, 0) + 0.2 * noise, dim=1)


def by_shards(features: Tensor, cuts: list[int], *, k: int, similarity: float, k_max: int) -> Tensor:
    width = list_width(len(features), k=k, k_max=k_max)
    parts = [
        search_shard(features, features[a:b], first_id=a, self_ids=torch.arange(len(features)), width=width)
        for a, b in zip([0, *cuts], [*cuts, len(features)], strict=True)
    ]
    return to_table(merge_shards(parts, width=width), similarity=similarity, k=k, k_max=k_max).ids


@pytest.mark.parametrize("similarity", [-1.0, 0.3, 1.0])
@pytest.mark.parametrize("cuts", [[], [20], [1, 39], [3, 4, 30]])
def test_shards_of_any_size_merge_to_the_exact_lists(cuts: list[int], similarity: float) -> None:
    features = unit_rows(40)
    rule = {"k": 3, "similarity": similarity, "k_max": 9}
    assert torch.equal(by_shards(features, cuts, **rule), find_neighbors(features, **rule).ids)


def test_two_shards_by_hand() -> None:
    left = TopK(torch.tensor([[0.9, 0.2]]), torch.tensor([[4, 1]]))
    right = TopK(torch.tensor([[0.5, 0.4]]), torch.tensor([[7, 6]]))
    found = merge_shards([left, right], width=3)
    assert found.ids.tolist() == [[4, 7, 6]]
    assert to_table(found, similarity=0.45, k=1, k_max=2).ids.tolist() == [[4, 7]]


def test_the_own_image_is_removed_wherever_it_is() -> None:
    found = TopK(torch.tensor([[1.0, 0.9, 0.8], [1.0, 1.0, 0.7], [0.6, 0.5, 0.4]]), torch.tensor([[0, 1, 2]] * 3))
    assert without_self(found, 2).ids.tolist() == [[1, 2], [0, 2], [0, 1]]


def test_an_index_finds_most_neighbors_and_logs_its_recall(caplog: pytest.LogCaptureFixture) -> None:
    features = clusters(30, 12)
    rule = {"k": 4, "similarity": 0.8, "k_max": 20}
    with caplog.at_level(logging.INFO, logger="mprd"):
        table = find_by_index(features, **rule)
    exact, lists = find_neighbors(features, **rule), as_lists(table.ids)
    hits = sum(len({*a} & {*b}) for a, b in zip(lists, as_lists(exact.ids), strict=True))
    assert hits / int(exact.counts.sum()) > 0.9
    assert "neighbors.search = ivf: recall" in caplog.text
    assert not any(image in ids for image, ids in enumerate(lists))
    assert table.counts.tolist() == [*map(len, lists)]
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
