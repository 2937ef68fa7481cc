"""Features, neighbor lists, pair graphs and slow loops that tests of the method share."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mprd.subgraphs import SubgraphBatch

PADDING = -1

Leaf = tuple[int, bool, bool, int]
"""Node id, whether it is in NN(i) and in NN(j), DRNL label."""


def unit_rows(num_images: int, num_features: int = 6, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(num_images, num_features, generator=draw, dtype=torch.float64), dim=1).to(dtype)


def at_degrees(*angles: float) -> Tensor:
    return torch.tensor([[math.cos(math.radians(a)), math.sin(math.radians(a))] for a in angles])


def groups(num_groups: int, size: int, *, spread: float = 0.05, loners: int = 0) -> Tensor:
    """Draw unit rows around orthogonal centers, and some that are alone."""
    draw = torch.Generator().manual_seed(0)
    centers = torch.eye(num_groups + loners)
    rows = centers[:num_groups].repeat_interleave(size, 0)
    rows = rows + spread * torch.randn(rows.shape, generator=draw)
    return normalize(torch.cat([rows, centers[num_groups:]]), dim=1)


def slow_jaccard(distances: np.ndarray, k1: int, k2: int, length: int | None = None) -> np.ndarray:
    """Write the k-reciprocal Jaccard distance of Zhong et al., Sec. 3, out with sets, from squared distances [N, N].

    `length` cuts the lists of all images.
    """
    images = range(len(distances))
    nearest = [sorted(images, key=lambda j, i=i: (j != i, distances[i, j]))[:length] for i in images]

    def mutual(i: int, k: int) -> set[int]:
        return {j for j in nearest[i][: k + 1] if i in nearest[j][: k + 1]}

    weights = np.zeros(distances.shape)
    for i in images:
        members = mutual(i, k1)
        halves = [mutual(j, int(np.around(k1 / 2))) for j in members]
        for j in members.union(*(half for half in halves if len(half & members) > 2 / 3 * len(half))):
            weights[i, j] = np.exp(-distances[i, j])
        weights[i] /= weights[i].sum()
    weights = np.stack([weights[nearest[i][:k2]].mean(0) for i in images])
    result = np.empty(distances.shape)
    for i in images:
        for j in images:
            result[i, j] = 1 - np.minimum(weights[i], weights[j]).sum() / np.maximum(weights[i], weights[j]).sum()
    return result


def squared_distances(features: np.ndarray) -> np.ndarray:
    return np.array([[((a - b) ** 2).sum() for b in features] for a in features.astype(float)])


def random_lists(num_images: int, longest: int, *, seed: int = 0, shortest: int = 0) -> list[list[int]]:
    """Draw distinct neighbors, never the image itself."""
    draw = np.random.default_rng(seed)
    lists = []
    for i in range(num_images):
        others = [n for n in range(num_images) if n != i]
        lists.append(draw.permutation(others)[: draw.integers(shortest, longest + 1)].tolist())
    return lists


def padded(lists: list[list[int]]) -> Tensor:
    width = max(map(len, lists), default=0)
    rows = [ids + [PADDING] * (width - len(ids)) for ids in lists]
    return torch.tensor(rows, dtype=torch.int64).reshape(len(lists), width)


def as_lists(ids: Tensor) -> list[list[int]]:
    """Undo `padded`."""
    return [[n for n in row if n != PADDING] for row in ids.tolist()]


def all_pairs(num_images: int) -> Tensor:
    return torch.tensor([[i, j] for i in range(num_images) for j in range(num_images) if i != j])


def leaves(batch: SubgraphBatch, p: int) -> list[Leaf]:
    """List the leaves of pair p in order, without the holes."""
    return graphs(batch.rows(p, p + 1))[0][-1]


def graphs(batch: SubgraphBatch) -> list[tuple]:
    """Write out each pair, its link and its leaves."""
    # whole columns, as tensors are slow row by row
    pairs, link = batch.pairs.tolist(), batch.link.tolist()
    columns = [column.tolist() for column in (batch.nodes, batch.in_i, batch.in_j, batch.labels)]
    around = [[leaf for leaf in zip(*rows, strict=True) if leaf[0] != PADDING] for rows in zip(*columns, strict=True)]
    return [(*pair, is_linked, found) for pair, is_linked, found in zip(pairs, link, around, strict=True)]


def slow_graphs(lists: list[list[int]], pairs: Tensor) -> list[tuple]:
    """Write Eq. 4 out with Python lists."""
    found = []
    for i, j in pairs.tolist():
        nodes = [n for n in lists[i] if n != j] + [n for n in lists[j] if n != i and n not in lists[i]]
        memberships = [(n, n in lists[i], n in lists[j]) for n in nodes]
        around = [(n, in_i, in_j, 2 if in_i and in_j else 0) for n, in_i, in_j in memberships]
        found.append((i, j, j in lists[i] or i in lists[j], around))
    return found
