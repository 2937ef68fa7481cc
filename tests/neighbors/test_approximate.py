from __future__ import annotations

import logging
import sys

import pytest
import torch
from torch import Tensor

from mprd.config.loading import load_config
from mprd.errors import UserError
from mprd.neighbors.approximate import (
    Best,
    best_in_shard,
    find_by_index,
    list_width,
    merge_best,
    to_table,
    without_self,
)
from mprd.neighbors.exact import find_neighbors


def unit_rows(num_images: int, num_features: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(num_images, num_features, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(features, dim=1)


def clusters(num_clusters: int, size: int, num_features: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(num_clusters, num_features, generator=generator)
    noise = torch.randn(num_clusters * size, num_features, generator=generator)
    return torch.nn.functional.normalize(centers.repeat_interleave(size, 0) + 0.2 * noise, dim=1)


def by_shards(features: Tensor, cuts: list[int], *, k: int, similarity: float, k_max: int) -> Tensor:
    width = list_width(len(features), k=k, k_max=k_max)
    parts = [
        best_in_shard(features, features[a:b], first_id=a, self_ids=torch.arange(len(features)), width=width)
        for a, b in zip([0, *cuts], [*cuts, len(features)], strict=True)
    ]
    return to_table(merge_best(parts, width=width), similarity=similarity, k=k, k_max=k_max).ids


@pytest.mark.parametrize("similarity", [-1.0, 0.3, 1.0])
@pytest.mark.parametrize("cuts", [[], [20], [1, 39], [3, 4, 30]])
def test_shards_of_any_size_merge_to_the_exact_lists(cuts: list[int], similarity: float) -> None:
    features = unit_rows(40)
    rule = {"k": 3, "similarity": similarity, "k_max": 9}
    assert torch.equal(by_shards(features, cuts, **rule), find_neighbors(features, **rule).ids)


def test_the_best_of_two_shards_by_hand() -> None:
    left = Best(torch.tensor([[0.9, 0.2]]), torch.tensor([[4, 1]]))
    right = Best(torch.tensor([[0.5, 0.4]]), torch.tensor([[7, 6]]))
    best = merge_best([left, right], width=3)
    assert best.ids.tolist() == [[4, 7, 6]]
    assert to_table(best, similarity=0.45, k=1, k_max=2).ids.tolist() == [[4, 7]]


def test_a_shard_that_is_smaller_than_the_list_gives_all_it_has() -> None:
    features = torch.eye(3)
    best = best_in_shard(features, features[:1], first_id=0, self_ids=torch.arange(3), width=2)
    assert best.values.tolist() == [[-torch.inf], [0.0], [0.0]]


def test_more_neighbors_than_images_are_refused() -> None:
    with pytest.raises(UserError, match=r"neighbors\.k"):
        list_width(3, k=3, k_max=5)


def test_the_own_image_is_taken_out_wherever_it_stands() -> None:
    best = Best(torch.tensor([[1.0, 0.9, 0.8], [1.0, 1.0, 0.7], [0.6, 0.5, 0.4]]), torch.tensor([[0, 1, 2]] * 3))
    # of row 2 the index missed nothing, of the others it is first and second
    assert without_self(best, 2).ids.tolist() == [[1, 2], [0, 2], [0, 1]]


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_an_index_finds_most_neighbors_and_logs_its_recall(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    features = clusters(30, 12)
    rule = {"k": 4, "similarity": 0.8, "k_max": 20}
    with caplog.at_level(logging.INFO, logger="mprd"):
        table = find_by_index(features, kind=kind, **rule)  # type: ignore[arg-type]
    exact = find_neighbors(features, **rule)
    hits = sum(len({*a} & {*b} - {-1}) for a, b in zip(table.ids.tolist(), exact.ids.tolist(), strict=True))
    assert hits / int(exact.counts.sum()) > 0.9
    assert f"neighbors.search = {kind}: recall" in caplog.text
    assert not (table.ids == torch.arange(len(features))[:, None]).any()
    assert table.counts.tolist() == [sum(n >= 0 for n in row) for row in table.ids.tolist()]
    assert (table.ids[:, 1:] >= 0).le(table.ids[:, :-1] >= 0).all()  # padding stands at the end


def test_lists_that_an_index_fills_exactly_are_the_exact_ones() -> None:
    # so few images that the inverted file has one cell and the graph is complete
    features = clusters(4, 5)
    rule = {"k": 3, "similarity": 0.9, "k_max": 8}
    expected = find_neighbors(features, **rule)
    for kind in ("ivf", "hnsw"):
        table = find_by_index(features, kind=kind, **rule)  # type: ignore[arg-type]
        assert torch.equal(table.counts, expected.counts)
        assert torch.equal(table.ids, expected.ids)


def test_an_index_without_faiss_is_an_error_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(UserError, match="pip install faiss-cpu"):
        find_by_index(unit_rows(9), kind="ivf", k=2, similarity=0.6)


def test_only_the_cosine_goes_through_shards_or_an_index() -> None:
    for setting in ("search=ivf", "num_shards=2"):
        with pytest.raises(UserError, match=r"neighbors\.metric: csls needs"):
            load_config("market1501", overrides=(*MARKET, "neighbors.metric=csls", f"neighbors.{setting}"))
    with pytest.raises(UserError, match=r"neighbors\.num_shards"):
        load_config("market1501", overrides=(*MARKET, "neighbors.search=hnsw", "neighbors.num_shards=2"))


MARKET = ("data.root=.", "pairs.refresh=epoch")
