from __future__ import annotations

import pytest
import torch

from mprd.neighbors.exact import find_neighbors
from tests.graphs import unit_rows

pytest.importorskip("ray")
from mprd.parallel.ray_neighbors import find_in_shards


@pytest.mark.ray
@pytest.mark.parametrize(("num_shards", "similarity"), [(1, 0.4), (3, -1.0)])
def test_shards_on_actors_find_what_one_process_finds(cluster: None, num_shards: int, similarity: float) -> None:
    features = unit_rows(53)
    rule = {"k": 3, "similarity": similarity, "k_max": 9}
    table = find_in_shards(features, num_shards=num_shards, block_rows=7, **rule)
    expected = find_neighbors(features, **rule)
    assert torch.equal(table.ids, expected.ids)
    assert torch.equal(table.counts, expected.counts)
    assert torch.equal(table.is_capped, expected.is_capped)
