"""What the nodes of a pair's graph bring to the GCN: features, labels, and how near they are to the two ends."""

# P pairs, W leaves, V = 2 + W nodes (i, j, leaves), N images, D feature size, C input columns
from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.neighbors.reciprocal import SimilarityTable
from mprd.subgraphs import NUM_LABELS, SubgraphBatch, overlap

Variant = Literal["paper", "structure", "reciprocal"]
NUM_SCALARS = 3
SIMILARITY_SCALE = 4
"""What k-reciprocal similarities are multiplied with: of mates they are about 0.4, and inputs want the size of 1."""
CELLS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**24}
"""Numbers that one [P, V, H] tensor of a chunk may hold: in the cache, or in a part of the device's memory."""


def feature_columns(memory: Tensor, *, variant: Variant) -> Tensor:
    """List the node inputs that an image has in every graph, [N, C]: its feature for `paper`, else none."""
    return memory if variant == "paper" else memory[:, :0]


def feature_scale(num_features: int) -> float:
    """Say what features are multiplied with, D^0.5: unit rows have entries of about D^-0.5, one-hot labels of 1."""
    return math.sqrt(num_features)


def label_columns(labels: Tensor, *, dtype: torch.dtype) -> Tensor:
    """List the node inputs that stand for the DRNL label, one-hot [..., 3]."""
    return F.one_hot(labels, NUM_LABELS).to(dtype)


def pair_columns(
    memory: Tensor, pairs: Tensor, nodes: Tensor, *, variant: Variant, similarities: SimilarityTable | None
) -> Tensor:
    """List the node inputs that depend on the pair, [P, V, C].

    None for `paper`; the cosines to its ends for `structure`; for `reciprocal` the k-reciprocal `similarities` to them
    as well. The larger of two comes first, so that G cannot tell (i, j) from (j, i). `nodes` int64 [P, V], -1
    where absent, whose inputs are 0.
    """
    if variant == "paper":
        return memory.new_empty((*nodes.shape, 0))
    to_ends = [cosines_to_ends(memory, pairs, nodes)]
    if variant == "reciprocal":
        if similarities is None:
            raise ValueError("gcn.variant: reciprocal looks similarities up, but got none")
        found = similarities.between(nodes.clamp(min=0)[:, :, None], pairs[:, None])
        to_ends.append(SIMILARITY_SCALE * found.to(memory.dtype))
    columns = [column for both in to_ends for column in (both.amax(2), both.amin(2))]
    return torch.stack(columns, dim=2) * (nodes >= 0)[:, :, None]


def cosines_to_ends(memory: Tensor, pairs: Tensor, nodes: Tensor) -> Tensor:
    """Multiply each node's feature with those of its pair, [P, V, 2]; meaningless for absent nodes.

    A few pairs at a time: their features would be D / H times the size of all else in a chunk.
    """
    size = max(1, 4 * cells_per_chunk(memory.device) // max(1, nodes.shape[1] * memory.shape[1]))
    return torch.cat(
        [
            F.embedding(some.clamp(min=0), memory) @ F.embedding(ends, memory).transpose(1, 2)
            for some, ends in zip(nodes.split(size), pairs.split(size), strict=True)
        ]
    )


def pair_scalars(memory: Tensor, subgraphs: SubgraphBatch) -> Tensor:
    """List what can be said of a pair without a network, [P, 3].

    Its cosine; the overlap (Jaccard index) of its lists; and the same softly, the sum over all leaves of the smaller
    cosine to the two ends over that of the larger, negative cosines counted as 0.
    """
    cosines = cosines_to_ends(memory, subgraphs.pairs, subgraphs.nodes).clamp(min=0)
    cosines = cosines * (subgraphs.nodes >= 0)[:, :, None]
    soft = cosines.amin(2).sum(1) / cosines.amax(2).sum(1).clamp(min=1e-6)
    ends = F.embedding(subgraphs.pairs, memory)
    return torch.stack([(ends[:, 0] * ends[:, 1]).sum(1), overlap(subgraphs).to(memory.dtype), soft], dim=1)


def cells_per_chunk(device: torch.device) -> int:
    """Say how many numbers a tensor of one chunk may hold on this device."""
    return CELLS_PER_CHUNK.get(device.type, CELLS_PER_CHUNK["cpu"])


def count_columns(num_features: int, variant: Variant) -> tuple[int, int, int]:
    """Count the input columns of feature, label and pair, by listing them for nothing."""
    memory = torch.empty(0, num_features)
    nothing = torch.empty(0, 2, dtype=torch.int64)
    of_pair = pair_columns(memory, nothing, nothing, variant=variant, similarities=SimilarityTable.empty())
    return feature_columns(memory, variant=variant).shape[1], NUM_LABELS, of_pair.shape[2]
