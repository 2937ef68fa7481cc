"""Build pair graphs on a pool of Ray Data actors: the same graphs in the same order as in one process."""

from __future__ import annotations

import logging
import math
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, ExecutionResources
from ray.exceptions import GetTimeoutError
from torch import Tensor

from mprd.errors import UserError
from mprd.parallel.arrow import from_arrow, rebatch, to_arrow
from mprd.parallel.ray_actors import actor_options, check_budget, join_ray
from mprd.parallel.resources import Waiting
from mprd.subgraphs import SubgraphBatch, build_subgraphs, check_integers

PAIRS_PER_BLOCK = 2**15
"""Most pairs that an actor builds at a time: a few hundred ms of work, a few MB."""
BLOCKS_PER_ACTOR = 4
"""Least blocks per actor, so that the first batches are early and actors finish at about the same time."""
BYTES_PER_PAIR = 36
"""Size of an input row in the object store."""
STORE_BYTES = 2**28
"""Object store for graphs that wait to be read; actors pause when it is full."""
WAIT_SECONDS = 180
"""Timeout for the start of the actors."""


class RayBuilder:
    """Build pair graphs on a pool of actors; each call is one streaming execution."""

    def __init__(self, num_actors: int, *, num_workers: int = 1, wait_seconds: int = WAIT_SECONDS) -> None:
        """Raise UserError unless Ray has CPUs for the actors of all `num_workers` training workers.

        Args:
            wait_seconds: limit for the start of the actors.
        """
        join_ray(num_actors)
        check_budget(num_actors, setting="subgraphs.executor=ray", num_workers=num_workers)
        self.num_actors, self.wait_seconds = num_actors, wait_seconds
        self.start_seconds: float | None = None
        """Time of the last call until its first graphs."""

    def __call__(self, pairs: Tensor, neighbor_ids: Tensor, sizes: Sequence[int]) -> Iterator[SubgraphBatch]:
        """Yield batches of the given sizes in order, absent leaves last, on the device of the pairs."""
        check_integers(pairs, neighbor_ids)
        if sum(sizes) != len(pairs):
            raise ValueError(f"sizes must sum to the {len(pairs)} pairs, but sum to {sum(sizes)}")
        tables = self.blocks(pairs, neighbor_ids) if len(pairs) else iter(())
        for table in rebatch(tables, sizes):
            yield from_arrow(table).to(pairs.device)

    def blocks(self, pairs: Tensor, neighbor_ids: Tensor) -> Iterator[pa.Table]:
        """Yield the graphs in order, in blocks of the actors' size."""
        started, self.start_seconds = time.monotonic(), None
        lists = ray.put(neighbor_ids.int().numpy(force=True))
        rows = min(PAIRS_PER_BLOCK, math.ceil(len(pairs) / (BLOCKS_PER_ACTOR * self.num_actors)))
        dataset = ray.data.from_arrow(pair_tables(pairs.numpy(force=True), rows=rows))
        num_bytes = BYTES_PER_PAIR * len(pairs)
        set_context(dataset.context, num_actors=self.num_actors, num_bytes=num_bytes, wait_seconds=self.wait_seconds)
        graphs = dataset.map_batches(
            BlockBuilder,
            # in a list: a bare reference would be fetched and copied into the call
            fn_constructor_args=([lists],),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=self.num_actors),
            **actor_options(self.num_actors),
        )
        stream = iter(graphs.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        try:
            with Waiting("subgraphs.executor=ray", {"CPU": self.num_actors}).said_aside():
                first = next(stream, None)
            self.start_seconds = time.monotonic() - started
            if first is not None:
                yield first
            yield from stream
        except GetTimeoutError:
            raise UserError(
                f"subgraphs.executor=ray: {self.num_actors} actors did not start within {self.wait_seconds} s; are all "
                "logical CPUs taken? Start Ray with more, or give subgraphs.executor=serial"
            ) from None


class BlockBuilder:
    """An actor that builds blocks of pairs; the neighbor table is in memory shared by the actors of a machine."""

    def __init__(self, lists: list[Any]) -> None:
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the shared table is read-only, and is only read
            self.neighbor_ids = torch.from_numpy(ray.get(lists[0]))

    def __call__(self, block: pa.Table) -> pa.Table:
        """Build the graphs of the pairs `i`, `j`."""
        pairs = np.stack([block.column(name).to_numpy() for name in ("i", "j")], axis=1)
        return to_arrow(build_subgraphs(torch.from_numpy(pairs), self.neighbor_ids))


def pair_tables(pairs: np.ndarray, *, rows: int) -> list[pa.Table]:
    """Cut pairs [P, 2] into Arrow tables of at most `rows` rows."""
    whole = pa.table({"i": pa.array(pairs[:, 0]), "j": pa.array(pairs[:, 1])})
    return [whole.slice(start, rows) for start in range(0, len(pairs), rows)]


def set_context(context: Any, *, num_actors: int, num_bytes: int, wait_seconds: int) -> None:
    """Make an execution keep the order, print nothing, bound its memory, and time out if its actors do not start."""
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(cpu=num_actors, object_store_memory=num_bytes + STORE_BYTES)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.wait_for_min_actors_s = wait_seconds
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)
