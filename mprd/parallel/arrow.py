"""Pair graphs as Arrow tables, the form in which they are sent between processes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import torch

from mprd.subgraphs import SubgraphBatch

SCHEMA = pa.schema(
    [
        ("i", pa.int64()),
        ("j", pa.int64()),
        ("nodes", pa.list_(pa.int32())),
        ("membership", pa.list_(pa.uint8())),
        ("link", pa.bool_()),
    ]
)
"""A row a pair. Lists hold its leaves; membership has bit 0 for NN(i) and bit 1 for NN(j)."""


def to_arrow(batch: SubgraphBatch) -> pa.Table:
    """Convert to columns of SCHEMA, without absent leaves."""
    pairs, nodes, in_i, in_j, link = (
        column.numpy(force=True) for column in (batch.pairs, batch.nodes, batch.in_i, batch.in_j, batch.link)
    )
    is_leaf = nodes >= 0
    starts = pa.array(np.concatenate([[0], is_leaf.sum(1).cumsum()]).astype(np.int32))
    membership = (in_i + 2 * in_j.astype(np.uint8))[is_leaf]
    columns = [
        pa.array(pairs[:, 0]),
        pa.array(pairs[:, 1]),
        pa.ListArray.from_arrays(starts, pa.array(nodes[is_leaf].astype(np.int32))),
        pa.ListArray.from_arrays(starts, pa.array(membership)),
        pa.array(link),
    ]
    return pa.table(columns, schema=SCHEMA)


def from_arrow(table: pa.Table) -> SubgraphBatch:
    """Convert from columns of SCHEMA; absent leaves are at the end of a row, and W is the largest number of leaves."""
    columns = {name: table.column(name).combine_chunks() for name in SCHEMA.names}
    counts = columns["nodes"].value_lengths().to_numpy(zero_copy_only=False)
    is_leaf = np.arange(counts.max(initial=0)) < counts[:, None]
    nodes = np.full(is_leaf.shape, -1, dtype=np.int64)
    nodes[is_leaf] = columns["nodes"].flatten().to_numpy()
    membership = np.zeros(is_leaf.shape, dtype=np.uint8)
    membership[is_leaf] = columns["membership"].flatten().to_numpy()
    pairs = np.stack([columns["i"].to_numpy(), columns["j"].to_numpy()], axis=1)
    link = columns["link"].to_numpy(zero_copy_only=False)
    return SubgraphBatch(
        *(torch.from_numpy(column) for column in (pairs, nodes, (membership & 1) > 0, (membership & 2) > 0, link))
    )


def rebatch(tables: Iterator[pa.Table], sizes: Sequence[int]) -> Iterator[pa.Table]:
    """Cut a stream of tables into tables of the given numbers of rows, which must sum to the rows of the stream."""
    held: deque[pa.Table] = deque()
    for size in sizes:
        while sum(map(len, held)) < size:
            held.append(next(tables))
        parts, missing = [SCHEMA.empty_table()], size
        while missing:
            head = held.popleft()
            parts.append(head.slice(0, missing))
            if len(head) > missing:
                held.appendleft(head.slice(missing))
            missing -= len(parts[-1])
        yield pa.concat_tables(parts)
    # exhaust the stream, which ends a Ray Data execution
    for rest in tables:
        assert len(rest) == 0, "the stream holds more rows than the sizes"
