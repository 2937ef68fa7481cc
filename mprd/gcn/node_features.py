"""Inputs of the GCN for the nodes of a pair's graph: features, labels, and similarities to the two ends."""

# P pairs, W leaves, V = 2 + W nodes (i, j, leaves), N images, D feature size, C input columns
from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.neighbors.reciprocal import SimilarityTable
from mprd.subgraphs import NUM_LABELS

Variant = Literal["paper", "structure", "reciprocal"]
SIMILARITY_SCALE = 4
"""Factor of k-reciprocal similarities, which are far below 1 even for images of one person, to bring inputs near 1."""
CELLS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**24}
"""Entries of one [P, V, H] tensor of a chunk: fits the CPU cache, or a small part of the GPU memory."""


def feature_columns(memory: Tensor, *, variant: Variant) -> Tensor:
    """Return the node inputs that an image has in every graph, [N, C]: its feature for `paper`, else none."""
    return memory if variant == "paper" else memory[:, :0]


def feature_scale(num_features: int) -> float:
    """Return the factor of features, D^0.5, which gives entries of unit rows the size of one-hot labels."""
    return math.sqrt(num_features)


def label_columns(labels: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return the node inputs for the DRNL label, one-hot [..., 3]."""
    return F.one_hot(labels, NUM_LABELS).to(dtype)


def pair_columns(
    memory: Tensor, pairs: Tensor, nodes: Tensor, *, variant: Variant, similarities: SimilarityTable | None
) -> Tensor:
    """Return the node inputs that depend on the pair, [P, V, C].

    None for `paper`; the cosines to both ends for `structure`; those and the k-reciprocal `similarities` to both ends
    for `reciprocal`. The larger of the two is first, so (i, j) and (j, i) have equal inputs. `nodes` int64 [P, V], -1
    for absent nodes, which have inputs 0.
    """
    if variant == "paper":
        return memory.new_empty((*nodes.shape, 0))
    to_ends = [cosines_to_ends(memory, pairs, nodes)]
    if variant == "reciprocal":
        if similarities is None:
            raise ValueError("gcn.variant: reciprocal needs similarities, but got none")
        found = similarities.between(nodes.clamp(min=0)[:, :, None], pairs[:, None])
        to_ends.append(SIMILARITY_SCALE * found.to(memory.dtype))
    columns = [column for both in to_ends for column in (both.amax(2), both.amin(2))]
    return torch.stack(columns, dim=2) * (nodes >= 0)[:, :, None]


def cosines_to_ends(memory: Tensor, pairs: Tensor, nodes: Tensor) -> Tensor:
    """Return the cosines of each node to both ends of its pair, [P, V, 2]; arbitrary for absent nodes."""
    # few pairs at a time, since their gathered features are D / H times larger than other tensors of a chunk
    size = max(1, 4 * cells_per_chunk(memory.device) // max(1, nodes.shape[1] * memory.shape[1]))
    return torch.cat(
        [
            F.embedding(some.clamp(min=0), memory) @ F.embedding(ends, memory).transpose(1, 2)
            for some, ends in zip(nodes.split(size), pairs.split(size), strict=True)
        ]
    )


def cells_per_chunk(device: torch.device) -> int:
    """Return the most entries of a chunk's tensor on this device."""
    return CELLS_PER_CHUNK.get(device.type, CELLS_PER_CHUNK["cpu"])


def count_columns(num_features: int, variant: Variant) -> tuple[int, int, int]:
    """Return the numbers of input columns for feature, label and pair, taken from empty inputs."""
    memory = torch.empty(0, num_features)
    nothing = torch.empty(0, 2, dtype=torch.int64)
    of_pair = pair_columns(memory, nothing, nothing, variant=variant, similarities=SimilarityTable.empty())
    return feature_columns(memory, variant=variant).shape[1], NUM_LABELS, of_pair.shape[2]
