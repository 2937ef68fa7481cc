"""Pair graphs by a pool of Ray Data actors, and neighbor search by actors that hold a shard of the rows each.

Both give what one process gives, in the same order. What travels is integers: pairs in, leaves out, Arrow both ways.
"""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import torch
from ray.data import ActorPoolStrategy, ExecutionResources
from ray.exceptions import GetTimeoutError, RayActorError
from torch import Tensor

from mprd.errors import UserError
from mprd.neighbors.approximate import TopK, list_width, merge_shards, search_shard, to_table
from mprd.neighbors.exact import CPU_ROWS, NeighborTable, check_features
from mprd.runtime.device import num_cores
from mprd.subgraphs import SubgraphBatch, arrow_schema, build_subgraphs, check_integers, from_arrow, to_arrow

PAIRS_PER_BLOCK = 2**15
"""Pairs that an actor builds at a time: a few hundred ms of work, a few MB."""
BLOCKS_PER_ACTOR = 4
"""Least blocks an actor gets, so that the first batches come early and no actor waits long for the last one."""
STORE_BYTES = 2**28
"""Object store that graphs waiting to be read may take; actors pause beyond it."""
WAIT_SECONDS = 180
"""Longest wait for the actors to start."""
SETTLE_SECONDS = 15
"""Longest wait for CPUs that actors of an earlier call are giving back."""
BLOCKS_IN_FLIGHT = 4
"""Blocks of rows that are searched at a time."""
ITEMS_IN_FLIGHT = 2
"""Items that an actor has before it."""


# -- the cluster ----------------------------------------------------------------------------------


def join_ray(num_actors: int) -> None:
    """Use the Ray that runs here or that RAY_ADDRESS names; otherwise start one for this process."""
    if ray.is_initialized():
        return
    # Ray takes SIGTERM for itself, but the run has its own way to stop
    old = signal.getsignal(signal.SIGTERM)
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        # it would warn of actors that share an object, which lives as long as they do
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
        num_cpus = max(num_cores(), num_actors)
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, old)


def count_free() -> int:
    """Count the logical CPUs that nobody has taken yet."""
    return int(ray.available_resources().get("CPU", 0))


def count_spare(num_workers: int = 1) -> int:
    """Count the logical CPUs that each of so many workers can give to actors."""
    if not ray.is_initialized() and "RAY_ADDRESS" not in os.environ:
        # a Ray of this machine alone is still to be started: one core is this process's own
        return num_cores() - 1
    join_ray(0)
    return count_free() // num_workers


def check_budget(num_actors: int, *, setting: str, num_workers: int = 1) -> None:
    """Raise UserError where the actors of all workers would wait for CPUs for ever, with the number to ask for."""
    total, wanted = int(ray.cluster_resources().get("CPU", 0)), num_workers * num_actors
    until = time.monotonic() + SETTLE_SECONDS
    while (free := count_free()) < wanted <= total and time.monotonic() < until:
        time.sleep(0.2)
    if free < wanted:
        taken = total - free
        raise UserError(
            f"{setting}: {num_workers} x {num_actors} actors beside the {taken} logical CPUs that drivers and workers "
            f"have taken need {taken + wanted}, but Ray has {total}: start Ray with --num-cpus {taken + wanted}, or "
            "ask for fewer actors"
        )


def count_gpus(num_actors: int) -> int:
    """Join or start Ray for so many actors; count its GPUs."""
    join_ray(num_actors)
    return int(ray.cluster_resources().get("GPU", 0))


def map_on_actors(
    actor: Callable[..., Callable[[Any], Any]],
    job: Any,
    items: Iterable[Any],
    *,
    num_actors: int,
    num_gpus: float = 0,
    setting: str,
) -> Iterator[Any]:
    """Yield what `actor(job)` returns for each item, in order; each of so many actors makes its own and keeps it.

    Items go to the actors in turn, a few ahead of the reader, and the actors end with the last. A UserError that
    comes in place of a value is raised here: raised there, it would come with a traceback around it.

    Raises UserError naming `setting` where the actors do not fit or one of them dies.
    """
    join_ray(num_actors)
    check_budget(num_actors, setting=setting)
    remote: Any = ray.remote(num_cpus=1, num_gpus=num_gpus, scheduling_strategy="SPREAD")(actor)
    actors = [remote.remote(job) for _ in range(num_actors)]
    waiting: deque[Any] = deque()
    try:
        for number, item in enumerate(items):
            waiting.append(actors[number % num_actors].__call__.remote(item))
            if len(waiting) > ITEMS_IN_FLIGHT * num_actors:
                yield take(waiting.popleft(), setting)
        while waiting:
            yield take(waiting.popleft(), setting)
    finally:
        for one in actors:
            ray.kill(one)


def take(result: Any, setting: str) -> Any:
    """Wait for a value; raise the UserError that came in its place, or one that says that an actor has died."""
    try:
        value = ray.get(result)
    except RayActorError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{setting}: an actor died ({reason}); what is done is kept, give the command again") from None
    if isinstance(value, UserError):
        raise value
    return value


# -- pair graphs ----------------------------------------------------------------------------------


class RayBuilder:
    """Build pair graphs on a pool of actors: one streaming execution a call, whatever the number of batches."""

    def __init__(self, num_actors: int, *, num_workers: int = 1) -> None:
        """Check that the actors fit, beside those of all other workers that train this model."""
        join_ray(num_actors)
        check_budget(num_actors, setting="subgraphs.executor=ray", num_workers=num_workers)
        self.num_actors = num_actors
        self.start_seconds: float | None = None
        """What the last call took to its first graphs."""

    def __call__(self, pairs: Tensor, neighbor_ids: Tensor, sizes: Sequence[int]) -> Iterator[SubgraphBatch]:
        """Yield batches of the given sizes in order, leaves without holes, on the device of the pairs."""
        for table in self.stream(pairs, neighbor_ids, sizes):
            yield from_arrow(table).to(pairs.device)

    def stream(
        self,
        pairs: Tensor,
        neighbor_ids: Tensor,
        sizes: Sequence[int],
        *,
        label: np.ndarray | None = None,
        source: np.ndarray | None = None,
    ) -> Iterator[pa.Table]:
        """Yield the batches as Arrow tables (`mprd.subgraphs.SCHEMA`), with uint8 labels and sources [P] if given."""
        check_integers(pairs, neighbor_ids)
        if sum(sizes) != len(pairs):
            raise ValueError(f"sizes must sum to the {len(pairs)} pairs, but sum to {sum(sizes)}")
        tables = self.blocks(pairs, neighbor_ids, label, source) if len(pairs) else iter(())
        yield from rebatch(tables, sizes)

    def blocks(
        self, pairs: Tensor, neighbor_ids: Tensor, label: np.ndarray | None, source: np.ndarray | None
    ) -> Iterator[pa.Table]:
        """Yield the graphs in blocks as the actors cut them."""
        started, self.start_seconds = time.monotonic(), None
        lists = ray.put(neighbor_ids.int().numpy(force=True))
        rows = min(PAIRS_PER_BLOCK, math.ceil(len(pairs) / (BLOCKS_PER_ACTOR * self.num_actors)))
        dataset = ray.data.from_arrow(pair_tables(pairs.numpy(force=True), label, source, rows=rows))
        set_context(dataset.context, num_actors=self.num_actors, num_bytes=36 * len(pairs))
        graphs = dataset.map_batches(
            BlockBuilder,
            # in a list: bare references would be fetched and copied into the call
            fn_constructor_args=([lists],),
            batch_size=None,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(size=self.num_actors),
            num_cpus=1,
        )
        stream = iter(graphs.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=1))
        try:
            for block in stream:
                if self.start_seconds is None:
                    self.start_seconds = time.monotonic() - started
                yield block
        except GetTimeoutError:
            raise UserError(
                f"subgraphs.executor=ray: {self.num_actors} actors did not start within {WAIT_SECONDS} s; are all "
                "logical CPUs taken? Start Ray with more, or give subgraphs.executor=serial"
            ) from None


class BlockBuilder:
    """An actor: holds the neighbor table, shared with all actors of its machine, and builds block after block."""

    def __init__(self, lists: list[Any]) -> None:
        torch.set_num_threads(1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # the table lies in shared memory and is only read
            self.neighbor_ids = torch.from_numpy(ray.get(lists[0]))

    def __call__(self, block: pa.Table) -> pa.Table:
        """Turn pairs into graphs; labels and sources are handed through."""
        pairs = np.stack([block.column(name).to_numpy() for name in ("i", "j")], axis=1)
        record = to_arrow(build_subgraphs(torch.from_numpy(pairs), self.neighbor_ids))
        graphs = pa.Table.from_batches([record])
        for name in ("label", "source"):
            graphs = graphs.set_column(graphs.schema.get_field_index(name), name, block.column(name))
        return graphs


def pair_tables(pairs: np.ndarray, label: np.ndarray | None, source: np.ndarray | None, *, rows: int) -> list[pa.Table]:
    """Cut pairs with their labels and sources into Arrow tables of so many rows."""
    columns = {"i": pa.array(pairs[:, 0]), "j": pa.array(pairs[:, 1])}
    for name, values in (("label", label), ("source", source)):
        columns[name] = pa.nulls(len(pairs), pa.uint8()) if values is None else pa.array(values, pa.uint8())
    whole = pa.table(columns)
    return [whole.slice(start, rows) for start in range(0, len(pairs), rows)]


def set_context(context: Any, *, num_actors: int, num_bytes: int) -> None:
    """Keep the order, the screen quiet, and the memory bounded; never wait for actors without an end."""
    options = context.execution_options
    options.preserve_order = True
    options.resource_limits = ExecutionResources.for_limits(cpu=num_actors, object_store_memory=num_bytes + STORE_BYTES)
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.wait_for_min_actors_s = WAIT_SECONDS
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)


def rebatch(tables: Iterator[pa.Table], sizes: Sequence[int]) -> Iterator[pa.Table]:
    """Cut a stream of tables anew, into tables of the given numbers of rows."""
    held: deque[pa.Table] = deque()
    for size in sizes:
        while sum(map(len, held)) < size:
            held.append(next(tables))
        parts, missing = [arrow_schema().empty_table()], size
        while missing:
            head = held.popleft()
            parts.append(head.slice(0, missing))
            if len(head) > missing:
                held.appendleft(head.slice(missing))
            missing -= len(parts[-1])
        yield pa.concat_tables(parts)
    # closes the execution where it has not ended by itself
    for rest in tables:
        assert len(rest) == 0, "the actors built more pairs than they were given"


# -- neighbor search -----------------------------------------------------------------------------


class Shard:
    """An actor that holds some images' rows, and searches them."""

    def __init__(self, first_id: int) -> None:
        torch.set_num_threads(1)
        self.first_id = first_id
        self.parts: list[Tensor] = []
        self.rows = torch.empty(0)

    def add(self, rows: np.ndarray) -> None:
        """Take rows behind those that are held."""
        self.parts.append(torch.tensor(rows))

    def seal(self) -> None:
        """End the adding."""
        self.rows, self.parts = torch.cat(self.parts), []

    def take(self, start: int, stop: int) -> np.ndarray:
        """Give the rows of the images from `start` to `stop`."""
        return self.rows[start - self.first_id : stop - self.first_id].numpy()

    def search(self, rows: np.ndarray, start: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the best in this shard for the images from `start` on, whose rows are given."""
        self_ids = torch.arange(start, start + len(rows))
        best = search_shard(torch.tensor(rows), self.rows, first_id=self.first_id, self_ids=self_ids, width=width)
        return best.values.numpy(), best.ids.numpy()


class ShardedRows:
    """Rows [N, D] spread over actors; rows travel from shard to shard, and only lists come back here."""

    def __init__(self, blocks: Iterator[Tensor], num_rows: int, *, num_shards: int, num_workers: int = 1) -> None:
        """Hand out rows as they come, so that no process needs to hold all of them."""
        join_ray(num_shards)
        check_budget(num_shards, setting="neighbors.num_shards", num_workers=num_workers)
        self.num_rows = num_rows
        self.firsts = [num_rows * shard // num_shards for shard in range(num_shards + 1)]
        remote: Any = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(Shard)
        self.shards = [remote.remote(first) for first in self.firsts[:-1]]
        start = 0
        for block in blocks:
            # one block at a time, or all of them would wait in this machine's object store
            ray.get(
                [
                    self.shards[s].add.remote(block[a - start : b - start].numpy(force=True))
                    for s, a, b in self.pieces(start, start + len(block))
                ]
            )
            start += len(block)
        assert start == num_rows, "as many rows must come as were announced"
        ray.get([shard.seal.remote() for shard in self.shards])

    def pieces(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut the rows from `start` to `stop` where the shard changes: shard, first row, behind the last row."""
        for shard, (first, last) in enumerate(pairwise(self.firsts)):
            if max(start, first) < min(stop, last):
                yield shard, max(start, first), min(stop, last)

    def search(self, *, k: int, similarity: float, k_max: int, block_rows: int = CPU_ROWS) -> NeighborTable:
        """List the neighbors of all rows, as `find_neighbors` does."""
        width = list_width(self.num_rows, k=k, k_max=k_max)
        found = [merge_shards(parts, width=width) for parts in self.parts(width, block_rows)]
        best = TopK(torch.cat([block.values for block in found]), torch.cat([block.ids for block in found]))
        return to_table(best, similarity=similarity, k=k, k_max=k_max)

    def parts(self, width: int, block_rows: int) -> Iterator[list[TopK]]:
        """Yield what all shards found for block after block of rows, a few blocks ahead of the reader."""
        waiting: deque[list[Any]] = deque()
        for start in range(0, self.num_rows, block_rows):
            for owner, a, b in self.pieces(start, min(start + block_rows, self.num_rows)):
                rows = self.shards[owner].take.remote(a, b)
                waiting.append([shard.search.remote(rows, a, width) for shard in self.shards])
                if len(waiting) > BLOCKS_IN_FLIGHT:
                    yield as_best(ray.get(waiting.popleft()))
        while waiting:
            yield as_best(ray.get(waiting.popleft()))

    def close(self) -> None:
        """End the actors."""
        for shard in self.shards:
            ray.kill(shard)


def as_best(parts: list[tuple[np.ndarray, np.ndarray]]) -> list[TopK]:
    """Turn the shards' answers into tensors."""
    return [TopK(torch.tensor(values), torch.tensor(ids)) for values, ids in parts]


@torch.no_grad()
def find_in_shards(
    features: Tensor,
    *,
    num_shards: int,
    num_workers: int = 1,
    k: int,
    similarity: float,
    k_max: int = 64,
    metric: str = "cosine",
    camids: Tensor | None = None,
    block_rows: int = CPU_ROWS,
) -> NeighborTable:
    """List the neighbors of all images as `find_neighbors` does, by actors that hold a shard of the rows each.

    `features` [N, D] are unit rows; `camids` are for the other metrics, which shards do not serve.
    """
    check_features(features, "features")
    if metric != "cosine":
        raise UserError(f"neighbors.metric: {metric} needs neighbors.num_shards=0")
    list_width(len(features), k=k, k_max=k_max)
    blocks = iter(features.split(block_rows))
    rows = ShardedRows(blocks, len(features), num_shards=min(num_shards, len(features)), num_workers=num_workers)
    try:
        table = rows.search(k=k, similarity=similarity, k_max=k_max, block_rows=block_rows)
    finally:
        rows.close()
    device = features.device
    return NeighborTable(table.ids.to(device), table.counts.to(device), table.is_capped.to(device))
