"""Agreement of two images: the cosine of their rows of likelihoods, over the whole graph of candidates.

Not in the paper, whose Eq. 7 looks at each pair alone. Two images of one identity have high likelihoods with the same
other images; a pair with a wrong likelihood lacks this support.
Shapes: N images, K candidates of an image, B query rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mprd.neighbors.exact import PADDING

POWER = 3
"""Exponent of a likelihood in an image's row: without it many doubtful candidates outweigh the few sure ones."""


def likelihood_graph(candidates: Tensor, likelihoods: Tensor) -> Tensor:
    """Return the row of each image: its likelihoods to all images to the power of 3, 1 to itself, of unit length.

    A pair that is a candidate in one direction counts in both; of two likelihoods the larger counts.

    Args:
        candidates: `[N, K]`, NN_k padded with -1.
        likelihoods: `[N, K]`, g_ij; values at padding are ignored.

    Returns:
        Sparse `[N, N]`, coalesced.
    """
    num_images = len(candidates)
    rows, columns = (candidates != PADDING).nonzero(as_tuple=True)
    others, values = candidates[rows, columns], likelihoods[rows, columns]
    own = torch.arange(num_images, device=candidates.device)
    keys = torch.cat([rows * num_images + others, others * num_images + rows, own * (num_images + 1)])
    keys, where = keys.unique(return_inverse=True)
    weights = values.new_zeros(len(keys))
    weights.scatter_reduce_(0, where, torch.cat([values, values, values.new_ones(num_images)]), "amax")
    weights = weights**POWER
    first, second = keys // num_images, keys % num_images
    lengths = weights.new_zeros(num_images).index_add_(0, first, weights.square()).sqrt()
    # `unique` returns sorted keys without duplicates
    return torch.sparse_coo_tensor(
        torch.stack([first, second]),
        weights / lengths[first],
        (num_images, num_images),
        is_coalesced=True,
        check_invariants=True,
    )


def agreements(graph: Tensor, rows: Tensor) -> Tensor:
    """Return the agreement of the images `rows` `[B]` with every image, `[B, N]` in 0..1: the cosines of their rows."""
    return torch.sparse.mm(graph, graph.index_select(0, rows).to_dense().T).T
