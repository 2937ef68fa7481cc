"""The neighborhood graph of a pair (Eq. 4) as a row of integers: two stars, and which star each leaf belongs to.

A batch holds no features, so it is cheap to build on one core and to send between processes.
"""

# P pairs, N images, K list width, W = 2 K leaves of a pair, V = 2 + W nodes of one graph
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mprd.runtime.device import send

END_LABEL, SHARED_LABEL = 1, 2
NUM_LABELS = 3
"""DRNL labels on two stars: 1 for the pair, 2 for a shared neighbor, 0 for the other leaves."""
CELLS_PER_CHUNK = 2**18
"""List entries compared at a time, few enough for the CPU cache."""
PAIRS_AT_ONCE = 4096
"""Pairs of small batches that are built together."""


@dataclass(frozen=True, eq=False)
class SubgraphBatch:
    """The graphs of P pairs (i, j), i != j.

    `pairs` int64 [P, 2]; `nodes` int64 [P, W], the leaves: NN(i) without j in list order, then those of NN(j) that are
    neither i nor in NN(i); -1 for an absent leaf, also in the middle of a row. `in_i`, `in_j` bool [P, W], whether a
    leaf is in NN(i), NN(j); `link` bool [P], whether j is in NN(i) or i in NN(j).
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
        """DRNL labels of the leaves, int64 [P, W]; 0 for absent leaves."""
        return SHARED_LABEL * (self.in_i & self.in_j).long()

    def rows(self, start: int, stop: int, *, num_leaves: int | None = None) -> SubgraphBatch:
        """Return the pairs from `start` to `stop`, with the first `num_leaves` leaf columns or all of them."""
        part = slice(start, stop)
        nodes, in_i, in_j = (column[part, :num_leaves] for column in (self.nodes, self.in_i, self.in_j))
        return SubgraphBatch(self.pairs[part], nodes, in_i, in_j, self.link[part])

    def to(self, device: torch.device) -> SubgraphBatch:
        """Copy to a device without a sync."""
        columns = (self.pairs, self.nodes, self.in_i, self.in_j, self.link)
        return SubgraphBatch(*(send(column, device) for column in columns))


def pack(batch: SubgraphBatch) -> tuple[SubgraphBatch, Tensor, Tensor]:
    """Remove absent leaves and sort the pairs by their number of leaves, so that chunks of them need little padding.

    Returns the batch, the ascending numbers of leaves int64 [P] on the CPU, and the original positions int64 [P].
    """
    is_leaf = batch.nodes >= 0
    position = is_leaf.cumsum(1) - 1
    num_leaves, order = is_leaf.sum(1).sort(stable=True)
    width = batch.nodes.shape[1]
    # one code a leaf needs one scatter; absent leaves are scattered to an extra last column
    code = 4 * batch.nodes + batch.in_i + 2 * batch.in_j.long()
    packed = code.new_full((len(batch), width + 1), -4).scatter_(1, position.where(is_leaf, width), code)
    num_leaves = num_leaves.cpu()
    packed = packed[order, : int(num_leaves[-1]) if len(batch) else 0]
    in_i, in_j = (packed & 1).bool(), (packed & 2).bool()
    return SubgraphBatch(batch.pairs[order], packed >> 2, in_i, in_j, batch.link[order]), num_leaves, order


class PairGraph(NamedTuple):
    """The graph of one pair: `adjacency` bool [V, V] without self loops, `node_ids` int64 [V], the pair first."""

    adjacency: np.ndarray
    node_ids: np.ndarray


SubgraphBuilder = Callable[[Tensor, Tensor, Sequence[int]], Iterator[SubgraphBatch]]
"""Builds pairs [P, 2] with neighbor ids [N, K] as batches of the given sizes, in order."""


def build_serially(pairs: Tensor, neighbor_ids: Tensor, sizes: Sequence[int]) -> Iterator[SubgraphBatch]:
    """Build the batches in this process, small ones together to save operator launches."""
    groups = list(grouped(sizes, PAIRS_AT_ONCE))
    for part, group in zip(pairs.split([*map(sum, groups)]), groups, strict=True):
        together = build_subgraphs(part, neighbor_ids)
        for stop, size in zip(accumulate(group), group, strict=True):
            yield together.rows(stop - size, stop)


def grouped(sizes: Sequence[int], num_pairs: int) -> Iterator[list[int]]:
    """Group consecutive sizes, each group as short as sums to at least `num_pairs`."""
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
    If trimmed, which syncs with an accelerator, W is twice the longest list of these pairs instead of 2 K.
    Raises TypeError for other dtypes or shapes.
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
    """A transposed batch: `nodes` int [2 K, P], `in_i`, `in_j` bool [2 K, P], `link` bool [P]."""

    nodes: Tensor
    in_i: Tensor
    in_j: Tensor
    link: Tensor


def compare_lists(pairs: Tensor, neighbor_ids: Tensor) -> Stars:
    """Compare the two lists of each pair; pairs are the last axis, along which comparisons vectorize."""
    i, j = pairs.int().T.contiguous()
    list_i, list_j = (neighbor_ids.index_select(0, ends).int().T.contiguous() for ends in pairs.unbind(1))
    if list_i.device.type == "cpu":
        # K comparisons of [K, P] stay in the cache; one of [K, K, P] would not
        is_shared_i, is_shared_j = (torch.zeros_like(ids, dtype=torch.bool) for ids in (list_i, list_j))
        for slot in range(len(list_i)):
            is_shared_i |= list_i == list_j[slot]
            is_shared_j |= list_j == list_i[slot]
    else:
        # one launch instead of K
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
    """Return the length of the longest list of these pairs."""
    ends = pairs.flatten()
    if len(ends) <= len(neighbor_ids):
        return int((neighbor_ids[ends] >= 0).any(0).sum())
    # with more ends than rows, read each row once
    is_used = torch.zeros(len(neighbor_ids), dtype=torch.bool, device=neighbor_ids.device)
    is_used[ends] = True
    return int(((neighbor_ids >= 0) & is_used[:, None]).any(0).sum())


def check_integers(pairs: Tensor, neighbor_ids: Tensor) -> None:
    """Raise TypeError unless pairs and lists are integers of the right shape."""
    if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise TypeError(f"pairs must be int64 [P, 2], but got {pairs.dtype} {tuple(pairs.shape)}")
    if neighbor_ids.dim() != 2 or neighbor_ids.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"neighbor_ids must be int [N, K], but got {neighbor_ids.dtype} {tuple(neighbor_ids.shape)}")


def to_graph(batch: SubgraphBatch, index: int) -> PairGraph:
    """Return the graph of one pair (Eq. 4)."""
    nodes = batch.nodes[index].numpy(force=True)
    is_leaf = nodes >= 0
    node_ids = np.concatenate([batch.pairs[index].numpy(force=True), nodes[is_leaf]])
    adjacency = np.zeros((len(node_ids), len(node_ids)), dtype=bool)
    adjacency[0, 2:] = batch.in_i[index].numpy(force=True)[is_leaf]
    adjacency[1, 2:] = batch.in_j[index].numpy(force=True)[is_leaf]
    adjacency[0, 1] = bool(batch.link[index])
    return PairGraph(adjacency | adjacency.T, node_ids)


def drnl(adjacency: Any) -> np.ndarray:
    """Return the double radius label of each node of any graph, int64 [V]; nodes 0 and 1 are the pair (SEAL [32]).

    With d_i the distance to i in the graph without j, d_j the distance to j without i, and d = d_i + d_j, the label is
    1 + min(d_i, d_j) + (d // 2) (d // 2 + d % 2 - 1). The pair has 1, nodes not connected to both ends have 0.

    >>> import numpy as np
    >>> two_stars = np.array([[0, 0, 1, 1], [0, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])  # 2 is shared, 3 is of i alone
    >>> drnl(two_stars).tolist()
    [1, 1, 2, 0]
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
    """Return the edges from `start` to each node of the graph without one node, int64 [V]; -1 if unreachable."""
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
