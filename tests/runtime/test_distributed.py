"""Shards of a batch, and collectives between two workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mprd.runtime.distributed import WorkerGroup, batch_groups, split_evenly
from tests.workers import on_workers


def test_rows_are_divided_evenly_and_in_order() -> None:
    assert split_evenly(7, 3) == [3, 2, 2]
    assert [WorkerGroup(rank, 3).shard(7).own for rank in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert WorkerGroup(1, 3).shard(7).weight == 2 / 7
    assert WorkerGroup(2, 3).shard(2).own == slice(2, 2)
    assert WorkerGroup(0, 2).shard(0).weight == 0


def test_groups_are_nearly_equal_and_never_smaller_than_asked() -> None:
    assert batch_groups(32, 0) == [32]
    assert batch_groups(32, 8) == [8, 8, 8, 8]
    assert batch_groups(31, 8) == [11, 10, 10]
    assert batch_groups(5, 8) == [5]


def test_a_group_stays_with_one_worker_where_there_are_enough_groups() -> None:
    assert WorkerGroup(0, 2).shard(31, groups=[11, 10, 10]).edges == (0, 21, 31)
    assert WorkerGroup(0, 4).shard(31, groups=[11, 10, 10]).edges == (0, 8, 16, 24, 31)


def test_a_single_worker_returns_its_arguments_and_gathers_without_gradients() -> None:
    workers, rows = WorkerGroup(), torch.rand(3, 2, requires_grad=True)
    gathered = workers.gather(rows, [3])
    assert torch.equal(gathered, rows)
    assert not gathered.requires_grad
    assert workers.join(rows, [3]) is rows
    assert workers.sum(rows) is rows
    assert workers.any(True) is True


def collect(workers: WorkerGroup) -> dict[str, Any]:
    rank = workers.rank
    rows = torch.arange(6.0).view(3, 2)[workers.shard(3).own].requires_grad_()
    joined = workers.join(rows, [2, 1])
    (joined * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    weight = torch.zeros(2, 2, requires_grad=True)
    unused, frozen = torch.zeros(1, requires_grad=True), torch.zeros(1)
    weight.grad = torch.full((2, 2), float(rank + 1))
    loss = workers.sum_gradients([weight, unused, frozen], torch.tensor(rank + 0.25))
    return {
        "gathered": workers.gather(rows, [2, 1]).tolist(),
        "joined": joined.tolist(),
        "own gradient": rows.grad.tolist(),
        "empty": workers.gather(torch.ones(1 - rank, 2), [1, 0]).tolist(),
        "large sum": float(workers.sum(torch.full((2**18 + 1,), rank + 1.0)).mean()),
        "any": (workers.any(rank == 1), workers.any(False)),
        "gradients": (weight.grad.tolist(), unused.grad.tolist(), frozen.grad),
        "loss": float(loss),
    }


def test_two_workers_gather_join_and_sum(tmp_path: Path) -> None:
    results = on_workers(2, collect, folder=tmp_path)
    assert [result.pop("own gradient") for result in results] == [[[1, 1], [10, 10]], [[100, 100]]]
    for result in results:
        assert result == {
            "gathered": [[0, 1], [2, 3], [4, 5]],
            "joined": [[0, 1], [2, 3], [4, 5]],
            "empty": [[1, 1]],
            "large sum": 3.0,
            "any": (True, False),
            "gradients": ([[3, 3], [3, 3]], [0], None),
            "loss": 1.5,
        }
