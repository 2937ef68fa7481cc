"""Search neighbors exactly on Ray actors that hold a shard of the rows each."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from mprd.neighbors.approximate import TopK, list_width, merge_shards, search_shard, to_table
from mprd.neighbors.exact import CPU_ROWS, NeighborTable, check_features
from mprd.parallel.ray_actors import actor_options, check_budget, join_ray, wait_for

BLOCKS_IN_FLIGHT = 4
"""Blocks of rows that are searched at a time."""


@torch.no_grad()
def find_in_shards(
    features: Tensor,
    *,
    num_shards: int,
    num_workers: int = 1,
    k: int,
    similarity: float,
    k_max: int = 64,
    block_rows: int = CPU_ROWS,
) -> NeighborTable:
    """List the neighbors of all images on `num_shards` actors for each of `num_workers` training workers.

    Takes the arguments of `find_neighbors`. Raises UserError unless Ray has CPUs for the actors.
    """
    check_features(features, "features")
    width = list_width(len(features), k=k, k_max=k_max)
    shards = ShardedRows(
        features, num_shards=min(num_shards, len(features)), num_workers=num_workers, block_rows=block_rows
    )
    try:
        found = [merge_shards(parts, width=width) for parts in shards.search(width)]
    finally:
        shards.close()
    whole = TopK(*(torch.cat(columns).to(features.device) for columns in zip(*found, strict=True)))
    return to_table(whole, similarity=similarity, k=k, k_max=k_max)


class Shard:
    """An actor that holds the rows of consecutive images, and searches them."""

    def __init__(self, first_id: int) -> None:
        torch.set_num_threads(1)
        self.first_id = first_id
        self.parts: list[Tensor] = []
        self.rows = torch.empty(0)

    def add(self, rows: np.ndarray) -> None:
        """Append rows."""
        self.parts.append(torch.tensor(rows))

    def seal(self) -> None:
        """Join the appended rows."""
        self.rows, self.parts = torch.cat(self.parts), []

    def take(self, start: int, stop: int) -> np.ndarray:
        """Return the rows of the images from `start` to `stop`."""
        return self.rows[start - self.first_id : stop - self.first_id].numpy()

    def search(self, rows: np.ndarray, start: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Search this shard for the rows of the images from `start` on; return cosines and ids [B, W]."""
        self_ids = torch.arange(start, start + len(rows))
        found = search_shard(torch.tensor(rows), self.rows, first_id=self.first_id, self_ids=self_ids, width=width)
        return found.values.numpy(), found.ids.numpy()


class ShardedRows:
    """Rows [N, D] spread over actors; rows are sent from shard to shard, and only results come back."""

    def __init__(self, features: Tensor, *, num_shards: int, num_workers: int, block_rows: int) -> None:
        join_ray(num_shards)
        check_budget(num_shards, setting="subgraphs.num_actors", num_workers=num_workers)
        self.block_rows = block_rows
        self.firsts = [len(features) * shard // num_shards for shard in range(num_shards + 1)]
        # as Ray Data spreads its own
        remote: Any = ray.remote(scheduling_strategy="SPREAD", **actor_options(num_shards))(Shard)
        self.shards = [remote.remote(first) for first in self.firsts[:-1]]
        wait_for(self.shards, "subgraphs.num_actors")
        for pieces in self.blocks():
            # wait for each block, or the object store of this machine would have to hold them all
            ray.get([self.shards[shard].add.remote(features[a:b].numpy(force=True)) for shard, a, b in pieces])
        ray.get([shard.seal.remote() for shard in self.shards])

    def blocks(self) -> Iterator[list[tuple[int, int, int]]]:
        """Yield blocks of rows as pieces of one shard each: shard, first row, last row + 1."""
        for start in range(0, self.firsts[-1], self.block_rows):
            stop = min(start + self.block_rows, self.firsts[-1])
            pieces = [(s, max(start, first), min(stop, last)) for s, (first, last) in enumerate(pairwise(self.firsts))]
            yield [(shard, a, b) for shard, a, b in pieces if a < b]

    def search(self, width: int) -> Iterator[list[TopK]]:
        """Yield the results of all shards for each piece in order, searching a few ahead of the reader."""
        waiting: deque[list[Any]] = deque()
        for owner, start, stop in (piece for pieces in self.blocks() for piece in pieces):
            rows = self.shards[owner].take.remote(start, stop)
            waiting.append([shard.search.remote(rows, start, width) for shard in self.shards])
            if len(waiting) > BLOCKS_IN_FLIGHT:
                yield receive(waiting.popleft())
        while waiting:
            yield receive(waiting.popleft())

    def close(self) -> None:
        """Stop the actors."""
        for shard in self.shards:
            ray.kill(shard)


def receive(parts: list[Any]) -> list[TopK]:
    """Wait for the results of all shards."""
    return [TopK(torch.tensor(values), torch.tensor(ids)) for values, ids in ray.get(parts)]
