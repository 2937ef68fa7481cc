"""Inputs of the GCN for the nodes of a pair's graph: features and labels (Sec. 3.2)."""

# N images, D feature size
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.subgraphs import NUM_LABELS

CELLS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**24}
"""Entries of one [P, V, H] tensor of a chunk: fits the CPU cache, or a small part of the GPU memory."""


def feature_scale(num_features: int) -> float:
    """Return the factor of features, D^0.5, which gives entries of unit rows the size of one-hot labels."""
    return math.sqrt(num_features)


def label_columns(labels: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Return the node inputs for the DRNL label, one-hot [..., 3]."""
    return F.one_hot(labels, NUM_LABELS).to(dtype)


def cells_per_chunk(device: torch.device) -> int:
    """Return the most entries of a chunk's tensor on this device."""
    return CELLS_PER_CHUNK.get(device.type, CELLS_PER_CHUNK["cpu"])
