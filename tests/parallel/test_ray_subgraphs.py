"""Graphs built on Ray equal those of one process, in the same order."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import Tensor

from mprd.gcn.network import PairGCN
from mprd.subgraphs import build_serially
from tests.graphs import graphs, padded, random_lists, slow_graphs, unit_rows

from .conftest import wait_for_cpus

ray = pytest.importorskip("ray")
from mprd.parallel.ray_subgraphs import RayBuilder  # noqa: E402

pytestmark = pytest.mark.ray

LISTS = random_lists(40, 6)


def random_pairs(num_pairs: int, num_images: int = 40) -> Tensor:
    draw = torch.Generator().manual_seed(0)
    first = torch.randint(num_images, (num_pairs,), generator=draw)
    return torch.stack([first, (first + torch.randint(1, num_images, (num_pairs,), generator=draw)) % num_images], 1)


def test_batches_hold_the_graphs_of_eq_4_in_order(cluster: None) -> None:
    table, pairs, sizes = padded(LISTS), random_pairs(700), [3, 0, 500, 1, 196]
    build = RayBuilder(2)
    batches = list(build(pairs, table, sizes))
    assert [len(batch) for batch in batches] == sizes
    assert [graph for batch in batches for graph in graphs(batch)] == slow_graphs(LISTS, pairs)
    nothing = torch.empty(0, 2, dtype=torch.int64)
    assert [len(batch) for batch in build(nothing, table, [0, 0])] == [0, 0]
    assert list(build(nothing, table, [])) == []
    with pytest.raises(TypeError, match="pairs must be int64"):
        list(build(torch.zeros(2, 2), table, [2]))
    with pytest.raises(ValueError, match="sizes must sum to the 700 pairs, but sum to 2"):
        list(build(pairs, table, [2]))


def test_logits_of_the_graphs_of_both_builders_are_equal_to_the_bit(cluster: None) -> None:
    pairs, memory = random_pairs(300), unit_rows(40, 8, dtype=torch.float32)
    gcn = PairGCN(8, hidden=8, mlp_hidden=8, generator=torch.Generator().manual_seed(0))
    builders = (build_serially, RayBuilder(1))
    one, other = (torch.cat([gcn(memory, b) for b in build(pairs, padded(LISTS), [150, 150])]) for build in builders)
    assert torch.equal(one, other)


def test_a_stream_that_is_left_early_gives_its_cpus_back(cluster: None) -> None:
    stream = RayBuilder(2)(random_pairs(5000), padded(LISTS), [100] * 50)
    next(stream)
    stream.close()
    wait_for_cpus()


def test_a_killed_actor_changes_nothing(cluster: None) -> None:
    pairs = random_pairs(40_000)
    stream = RayBuilder(1)(pairs, padded(LISTS), [10_000] * 4)
    batches = [next(stream)]
    actors = [actor for actor in ray._private.state.actors().values() if "MapWorker" in actor["ActorClassName"]]
    victims = [actor["Pid"] for actor in actors if actor["State"] == "ALIVE"]
    for pid in victims:
        os.kill(pid, signal.SIGKILL)
    batches += list(stream)
    assert victims
    assert [graph for batch in batches for graph in graphs(batch)] == slow_graphs(LISTS, pairs)
