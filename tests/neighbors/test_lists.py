"""Neighbor lists during an epoch: live around a batch, frozen for all images."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mprd.config.schema import NeighborsConfig
from mprd.neighbors.exact import PADDING, NeighborTable, find_neighbors
from mprd.neighbors.lists import FrozenLists, LiveLists
from mprd.neighbors.similarity import Similarity

NUM_IMAGES = 40
RULE = {"k": 2, "similarity": 0.6, "k_max": 12}


def crowded_rows() -> Tensor:
    """Draw unit rows of which some have many others near and some few."""
    draw = torch.Generator().manual_seed(0)
    shared = torch.linspace(0, 2, NUM_IMAGES)[:, None] * torch.ones(8)
    return normalize(shared + torch.randn(NUM_IMAGES, 8, generator=draw), dim=1)


def without_padding(ids: Tensor) -> list[int]:
    return ids[ids != PADDING].tolist()


def test_live_lists_hold_the_batch_and_its_neighbors_and_no_others() -> None:
    features, batch = crowded_rows(), torch.tensor([7, 0, 31])
    lists = LiveLists(features, NeighborsConfig(**RULE))
    expected = find_neighbors(features, **RULE)
    near, is_capped = lists.of_batch(batch)
    assert [without_padding(ids) for ids in near] == [without_padding(ids) for ids in expected.ids[batch]]
    assert torch.equal(is_capped, expected.is_capped[batch])
    searched = set(batch.tolist()) | set(without_padding(near))
    assert len(searched) < NUM_IMAGES
    for image in range(NUM_IMAGES):
        wanted = without_padding(expected.ids[image]) if image in searched else []
        assert without_padding(lists.ids[image]) == wanted


def test_live_lists_follow_the_memory() -> None:
    features, batch = crowded_rows(), torch.tensor([7, 0, 31])
    lists = LiveLists(features, NeighborsConfig(**RULE))
    lists.of_batch(batch)
    features[7] = features[0]
    assert lists.of_batch(torch.tensor([7]))[0][0, 0] == 0


@pytest.mark.parametrize("kind", ["live", "frozen"])
def test_lists_that_the_cap_cuts_are_marked(kind: str) -> None:
    config = NeighborsConfig(k=2, similarity=-1.0, k_max=5)
    frozen = FrozenLists(crowded_rows(), None, config, similarity=Similarity())
    lists = LiveLists(crowded_rows(), config) if kind == "live" else frozen
    near, is_capped = lists.of_batch(torch.tensor([3, 4]))
    assert near.shape == (2, 5)
    assert is_capped.tolist() == [True, True]


def test_frozen_lists_are_searched_once_and_when_first_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    def search_all(features: Tensor, **rule: Any) -> NeighborTable:
        calls.append(rule)
        return find_neighbors(features, **rule)

    features = crowded_rows()
    monkeypatch.setattr("mprd.neighbors.lists.find_neighbors", search_all)
    lists = FrozenLists(features, None, NeighborsConfig(**RULE), similarity=Similarity())
    assert calls == []
    everyone = torch.arange(NUM_IMAGES)
    assert torch.equal(lists.of_batch(everyone)[0], lists.ids)
    assert torch.equal(lists.ids, find_neighbors(features, **RULE).ids)
    assert len(calls) == 1


def test_frozen_lists_are_searched_as_the_settings_say(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mprd")
    features = crowded_rows()
    lists = FrozenLists(features, None, NeighborsConfig(**RULE, search="ivf"), similarity=Similarity())
    # the index of so few images has one cell
    assert torch.equal(lists.ids, find_neighbors(features, **RULE).ids)
    assert "neighbors.search = ivf: recall 1.000" in caplog.text


def test_the_nearest_of_a_copy_from_outside_is_its_image() -> None:
    lists = FrozenLists(crowded_rows(), None, NeighborsConfig(**RULE), similarity=Similarity())
    assert lists.search_outside(lists.features[[5]])[0, 0] == 5
