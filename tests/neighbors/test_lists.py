from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mprd.config.schema import NeighborsConfig
from mprd.neighbors.exact import NeighborTable, find_neighbors, rows_at_once
from mprd.neighbors.lists import NeighborLists
from mprd.pairs.rules import PADDING

NUM_IMAGES = 40


def crowded_rows() -> Tensor:
    """Draw unit rows of which some have many others near and some few."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.linspace(0, 2, NUM_IMAGES)[:, None] * torch.ones(8)
    return normalize(shared + torch.randn(NUM_IMAGES, 8, generator=draw), dim=1)


def test_around_a_batch_its_lists_and_those_of_its_neighbors_are_searched_and_no_others() -> None:
    features, batch = crowded_rows(), torch.tensor([7, 0, 31])
    lists = NeighborLists(features, None, NeighborsConfig(k=2, similarity=0.6, k_max=12))
    everyones = find_neighbors(features, k=2, similarity=0.6, k_max=12)
    near, num_entries, num_capped = lists.refresh_around(lists.search_batch(batch))
    expected = [ids[ids != PADDING].tolist() for ids in everyones.ids[batch]]
    assert [ids[ids != PADDING].tolist() for ids in near] == expected
    assert near.shape[1] == max(map(len, expected)) > min(map(len, expected))
    assert (num_entries, num_capped) == (sum(map(len, expected)), int(everyones.is_capped[batch].sum()))
    searched = set(batch.tolist()).union(*expected)
    assert len(searched) < NUM_IMAGES
    for image in range(NUM_IMAGES):
        found = lists.ids[image][lists.ids[image] != PADDING].tolist()
        assert found == (everyones.ids[image][everyones.ids[image] != PADDING].tolist() if image in searched else [])


def test_lists_that_the_cap_cuts_are_told_of() -> None:
    lists = NeighborLists(crowded_rows(), None, NeighborsConfig(k=2, similarity=-1.0, k_max=5))
    near, num_entries, num_capped = lists.refresh_around(lists.search_batch(torch.tensor([3, 4])))
    assert near.shape == (2, 5)
    assert (num_entries, num_capped) == (10, 2)


@pytest.mark.parametrize(
    ("device", "memory_mb", "rows"), [("cuda", 4, 1048), ("cpu", 4, 512), ("cpu", 1, 262), ("cuda", 1, 262)]
)
def test_a_budget_says_how_many_rows_are_searched_at_a_time(device: str, memory_mb: int, rows: int) -> None:
    assert rows_at_once(1000, torch.device(device), memory_mb=memory_mb) == rows
    assert rows_at_once(10**9, torch.device(device), memory_mb=memory_mb) == 1


def test_the_budget_reaches_every_search() -> None:
    seen: list[Any] = []

    def search_all(features: Tensor, **rule: Any) -> NeighborTable:
        seen.append(rule["block_rows"])
        return find_neighbors(features, **rule)

    features = torch.eye(2000)
    NeighborLists(features, None, NeighborsConfig(k=2, memory_mb=1), search_all).refresh()
    assert seen == [131]
