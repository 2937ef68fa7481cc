"""The neighborhood of a pair (Eq. 4) as a row of integers: two stars, and which star each leaf belongs to.

A batch holds no features: about 100 bytes a pair, cheap to build on one core and to ship between processes.
"""

# P pairs, K list width, W = 2 K leaves a pair, V nodes of one graph (V - 2 leaves)
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mprd.runtime.device import send

if TYPE_CHECKING:
    import pyarrow as pa

Link = Literal["keep", "drop"]
END_LABEL, SHARED_LABEL = 1, 2
NUM_LABELS = 3
"""DRNL labels that occur on two stars: 1 for the pair, 2 for a shared neighbor, 0 for the other leaves."""
CELLS_PER_CHUNK = 2**18
"""List entries that are compared at a time, so that they stay in the cache."""
PAIRS_AT_ONCE = 4096
"""Pairs of small batches that are built in one go."""
SCHEMA = {
    "i": "int64",
    "j": "int64",
    "nodes": "list<int32>",
    "membership": "list<uint8>",
    "link": "bool",
    "drnl": "list<uint8>",
    "label": "uint8",
    "source": "uint8",
}
"""Arrow columns, a row a pair. The lists run over the leaves; membership has bit 0 for NN(i) and bit 1 for NN(j)."""


@dataclass(frozen=True, eq=False)
class SubgraphBatch:
    """Hold the graphs of P pairs (i, j), i != j.

    `pairs` int64 [P, 2]; `nodes` int64 [P, W], the leaves: NN(i) without j in list order, then what NN(j) adds to it,
    -1 where there is none; `in_i`, `in_j` bool [P, W], whose star a leaf is in; `link` bool [P], whether j is in
    NN(i) or i in NN(j). A dropped leaf leaves a hole in its row.
    """

    pairs: Tensor
    nodes: Tensor
    in_i: Tensor
    in_j: Tensor
    link: Tensor

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def labels(self) -> Tensor:
        """Give the DRNL labels of the leaves, int64 [P, W]; absent ones have 0."""
        return SHARED_LABEL * (self.in_i & self.in_j).long()

    def rows(self, start: int, stop: int, *, num_leaves: int | None = None) -> SubgraphBatch:
        """Take the pairs from `start` to `stop`, with all their leaves or the first `num_leaves` columns of them."""
        part = slice(start, stop)
        nodes, in_i, in_j = (column[part, :num_leaves] for column in (self.nodes, self.in_i, self.in_j))
        return SubgraphBatch(self.pairs[part], nodes, in_i, in_j, self.link[part])

    def to(self, device: torch.device) -> SubgraphBatch:
        """Copy to a device, which is not waited for."""
        columns = (self.pairs, self.nodes, self.in_i, self.in_j, self.link)
        return SubgraphBatch(*(send(column, device) for column in columns))


def overlap(batch: SubgraphBatch) -> Tensor:
    """Return the Jaccard index of NN(i) and NN(j) without i and j themselves, float32 [P]; 0 where both are empty."""
    num_shared = (batch.in_i & batch.in_j).sum(1)
    return num_shared / (batch.in_i | batch.in_j).sum(1).clamp(min=1)


def pack(batch: SubgraphBatch) -> tuple[SubgraphBatch, Tensor, Tensor]:
    """Close the holes and sort the pairs by their number of leaves, so that a chunk of them needs no wide padding.

    Returns the batch, the sorted numbers of leaves int64 [P] on the CPU, and where each pair stood before, int64 [P].
    """
    is_leaf = batch.nodes >= 0
    position = is_leaf.cumsum(1) - 1
    num_leaves, order = is_leaf.sum(1).sort(stable=True)
    width = batch.nodes.shape[1]
    # one number a leaf, scattered once; what is absent goes to a column behind the last
    code = 4 * batch.nodes + batch.in_i + 2 * batch.in_j.long()
    packed = code.new_full((len(batch), width + 1), -4).scatter_(1, position.where(is_leaf, width), code)
    num_leaves = num_leaves.cpu()
    packed = packed[order, : int(num_leaves[-1]) if len(batch) else 0]
    in_i, in_j = (packed & 1).bool(), (packed & 2).bool()
    return SubgraphBatch(batch.pairs[order], packed >> 2, in_i, in_j, batch.link[order]), num_leaves, order


class PairGraph(NamedTuple):
    """One pair's graph: `adjacency` bool [V, V] without self loops, `node_ids` int64 [V], the pair first."""

    adjacency: np.ndarray
    node_ids: np.ndarray


SubgraphBuilder = Callable[[Tensor, Tensor, Sequence[int]], Iterator[SubgraphBatch]]
"""Whoever turns pairs [P, 2] and neighbor ids [N, K] into batches of the given sizes, in order."""


def build_serially(pairs: Tensor, neighbor_ids: Tensor, sizes: Sequence[int]) -> Iterator[SubgraphBatch]:
    """Build batch after batch in this process; small ones several at once, so that few operators are launched."""
    groups = list(grouped(sizes, PAIRS_AT_ONCE))
    for part, group in zip(pairs.split([*map(sum, groups)]), groups, strict=True):
        together = build_subgraphs(part, neighbor_ids)
        for stop, size in zip(accumulate(group), group, strict=True):
            yield together.rows(stop - size, stop)


def grouped(sizes: Sequence[int], num_pairs: int) -> Iterator[list[int]]:
    """Part the sizes into groups of batches that follow each other: each as few as hold so many pairs together."""
    group: list[int] = []
    for size in sizes:
        group.append(size)
        if sum(group) >= num_pairs:
            yield group
            group = []
    if group:
        yield group


@torch.no_grad()
def build_subgraphs(pairs: Tensor, neighbor_ids: Tensor, *, is_trimmed: bool = True) -> SubgraphBatch:
    """Build the two stars of each pair (Eq. 4) by integer comparisons.

    `pairs` int64 [P, 2]; `neighbor_ids` int [N, K], distinct ids a row, padded with -1 at the end, own id excluded.
    Columns of the table that are empty for all of these pairs are left out, so K here is the longest list; unless
    not trimmed, for which an accelerator need not be waited for.
    """
    check_integers(pairs, neighbor_ids)
    width = longest_list(pairs, neighbor_ids) if is_trimmed else neighbor_ids.shape[1]
    num_pairs, device = len(pairs), pairs.device
    nodes = torch.empty((num_pairs, 2 * width), dtype=torch.int64, device=device)
    in_i = torch.empty((num_pairs, 2 * width), dtype=torch.bool, device=device)
    in_j, link = torch.empty_like(in_i), torch.empty(num_pairs, dtype=torch.bool, device=device)
    chunk = max(1, CELLS_PER_CHUNK // max(1, width))
    for start in range(0, num_pairs, chunk):
        part = slice(start, start + chunk)
        stars = compare_lists(pairs[part], neighbor_ids[:, :width])
        for column, rows in zip((nodes, in_i, in_j), stars[:3], strict=True):
            column[part] = rows.T
        link[part] = stars.link
    return SubgraphBatch(pairs, nodes, in_i, in_j, link)


class Stars(NamedTuple):
    """Some pairs' leaves, a row a slot: `nodes` int [2 K, P], `in_i`, `in_j` bool [2 K, P], `link` bool [P]."""

    nodes: Tensor
    in_i: Tensor
    in_j: Tensor
    link: Tensor


def compare_lists(pairs: Tensor, neighbor_ids: Tensor) -> Stars:
    """Compare the two lists of each pair slot by slot.

    Pairs run along the last axis: whole rows are compared at once, which the processor's vector units like.
    """
    i, j = pairs.int().T.contiguous()
    list_i, list_j = (neighbor_ids.index_select(0, ends).int().T.contiguous() for ends in pairs.unbind(1))
    if list_i.device.type == "cpu":
        # K passes over [K, P] rather than one over [K, K, P], which would leave the cache
        is_shared_i, is_shared_j = (torch.zeros_like(ids, dtype=torch.bool) for ids in (list_i, list_j))
        for slot in range(len(list_i)):
            is_shared_i |= list_i == list_j[slot]
            is_shared_j |= list_j == list_i[slot]
    else:
        # an accelerator spends its time on launching passes
        is_same = list_i[:, None] == list_j
        is_shared_i, is_shared_j = is_same.any(1), is_same.any(0)
    is_j, is_i = list_i == j, list_j == i
    keep_i = (list_i >= 0) & ~is_j
    keep_j = (list_j >= 0) & ~is_i & ~is_shared_j
    return Stars(
        nodes=torch.cat([list_i.where(keep_i, -1), list_j.where(keep_j, -1)]),
        in_i=torch.cat([keep_i, torch.zeros_like(keep_j)]),
        in_j=torch.cat([is_shared_i & keep_i, keep_j]),
        link=is_j.any(0) | is_i.any(0),
    )


def longest_list(pairs: Tensor, neighbor_ids: Tensor) -> int:
    """Count the columns that the lists of these pairs fill."""
    ends = pairs.flatten()
    if len(ends) <= len(neighbor_ids):
        return int((neighbor_ids[ends] >= 0).any(0).sum())
    # each row once, so that no more is read than the table
    is_used = torch.zeros(len(neighbor_ids), dtype=torch.bool, device=neighbor_ids.device)
    is_used[ends] = True
    return int(((neighbor_ids >= 0) & is_used[:, None]).any(0).sum())


def check_integers(pairs: Tensor, neighbor_ids: Tensor) -> None:
    """Refuse pairs or lists of the wrong kind."""
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise TypeError(f"pairs must be int64 [P, 2], but got {pairs.dtype} {tuple(pairs.shape)}")
    if neighbor_ids.dim() != 2 or neighbor_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"neighbor_ids must be int [N, K], but got {neighbor_ids.dtype} {tuple(neighbor_ids.shape)}")


def to_graph(batch: SubgraphBatch, index: int, *, link: Link = "keep") -> PairGraph:
    """Write out one pair's graph (Eq. 4); `link` says whether the direct edge i-j stays (Eq. 4) or goes (SEAL)."""
    nodes = batch.nodes[index].numpy(force=True)
    is_leaf = nodes >= 0
    node_ids = np.concatenate([batch.pairs[index].numpy(force=True), nodes[is_leaf]])
    adjacency = np.zeros((len(node_ids), len(node_ids)), dtype=bool)
    adjacency[0, 2:] = batch.in_i[index].numpy(force=True)[is_leaf]
    adjacency[1, 2:] = batch.in_j[index].numpy(force=True)[is_leaf]
    adjacency[0, 1] = link == "keep" and bool(batch.link[index])
    return PairGraph(adjacency | adjacency.T, node_ids)


def drnl(adjacency: Any) -> np.ndarray:
    """Label the nodes of any graph by double radius, int64 [V]; the pair is nodes 0 and 1 (Sec. 3.2, SEAL [32]).

    With d_i the distance to i while j is removed, d_j the other way round and d = d_i + d_j:
    1 + min(d_i, d_j) + (d // 2) (d // 2 + d % 2 - 1); 1 for the pair, 0 for what reaches only one end or none.
    """
    edges = np.asarray(adjacency) != 0
    if edges.ndim != 2 or edges.shape[0] != edges.shape[1] or len(edges) < 2:
        raise ValueError(f"adjacency must be [V, V] with the pair as nodes 0 and 1, but got {edges.shape}")
    d_i, d_j = distances(edges, 0, without=1), distances(edges, 1, without=0)
    half, odd = np.divmod(d_i + d_j, 2)
    labels = 1 + np.minimum(d_i, d_j) + half * (half + odd - 1)
    labels[(d_i < 0) | (d_j < 0)] = 0
    labels[:2] = 1
    return labels


def distances(edges: np.ndarray, start: int, *, without: int) -> np.ndarray:
    """Count the edges from `start` to each node while one node is removed, int64 [V]; -1 where no path leads."""
    steps = np.full(len(edges), -1, dtype=np.int64)
    frontier = np.arange(len(edges)) == start
    is_open = np.arange(len(edges)) != without
    distance = 0
    while frontier.any():
        steps[frontier] = distance
        is_open &= ~frontier
        frontier = edges[frontier].any(0) & is_open
        distance += 1
    return steps


def arrow_schema() -> pa.Schema:
    """Give SCHEMA as an Arrow schema; `label` and `source` may be null."""
    import pyarrow as pa

    kinds = {
        "int64": pa.int64(),
        "uint8": pa.uint8(),
        "bool": pa.bool_(),
        "list<int32>": pa.list_(pa.int32()),
        "list<uint8>": pa.list_(pa.uint8()),
    }
    return pa.schema([(name, kinds[kind]) for name, kind in SCHEMA.items()])


def to_arrow(
    batch: SubgraphBatch, *, label: np.ndarray | None = None, source: np.ndarray | None = None
) -> pa.RecordBatch:
    """Pack a batch as Arrow columns (SCHEMA), with the pairs' uint8 labels and sources [P] where given."""
    import pyarrow as pa

    pairs, nodes, in_i, in_j, link, drnl_labels = (
        column.numpy(force=True)
        for column in (batch.pairs, batch.nodes, batch.in_i, batch.in_j, batch.link, batch.labels)
    )
    is_leaf = nodes >= 0
    starts = np.concatenate([[0], is_leaf.sum(1).cumsum()]).astype(np.int32)
    lists = {
        "nodes": pa.array(nodes[is_leaf].astype(np.int32)),
        "membership": pa.array((in_i + 2 * in_j.astype(np.uint8))[is_leaf]),
        "drnl": pa.array(drnl_labels[is_leaf].astype(np.uint8)),
    }
    columns = {name: pa.ListArray.from_arrays(pa.array(starts), values) for name, values in lists.items()}
    columns |= {"i": pa.array(pairs[:, 0]), "j": pa.array(pairs[:, 1]), "link": pa.array(link)}
    for name, values in (("label", label), ("source", source)):
        columns[name] = pa.nulls(len(batch), pa.uint8()) if values is None else pa.array(values, pa.uint8())
    return pa.record_batch([columns[name] for name in SCHEMA], schema=arrow_schema())


def from_arrow(table: pa.RecordBatch | pa.Table) -> SubgraphBatch:
    """Unpack a batch; leaves stand without holes, so W is the largest number of leaves."""
    import pyarrow as pa

    if isinstance(table, pa.RecordBatch):
        table = pa.Table.from_batches([table])
    columns = {name: table.column(name).combine_chunks() for name in ("i", "j", "nodes", "membership", "link")}
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
