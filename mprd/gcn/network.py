"""G: predict from a pair's neighborhood graph whether both images show one person (Eq. 5, Sec. 3.2).

Each graph of Eq. 4 is two stars, so Eq. 5 is a few dense products over all pairs at once. Images are multiplied with
the first layer's weights once per memory state, not once per graph.
"""

# P pairs, W leaves, V = 2 + W nodes (i, j, leaves), N images, D feature size, C input columns, H hidden
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mprd.subgraphs import END_LABEL, NUM_LABELS, SubgraphBatch, build_subgraphs, pack

KERNEL_SIZE, STRIDE = 5, 2
"""Of the 1-D convolution over the pooled vector, as in SEAL's code."""
HIDDEN, CONV_CHANNELS, MLP_HIDDEN = 64, 4, 64
"""Widths of the graph convolutions, the 1-D convolution and the MLP; not stated in the paper."""
PAIRS_PER_GROUP = 2**15
"""Most pairs whose graphs `predict` builds at a time."""
CELLS_PER_CHUNK = {"cpu": 2**20, "cuda": 2**24}
"""Entries of one [P, V, H] tensor of a chunk: fits the CPU cache, or a small part of the GPU memory."""


class PairGCN(nn.Module):
    """Two graph convolutions, max-pooling, a 1-D convolution and two fully connected layers -> a logit (Sec. 3.2).

    >>> memory = torch.eye(4)
    >>> neighbor_ids = torch.tensor([[1, 2], [0, 2], [0, 1], [2, -1]])
    >>> gcn = PairGCN(4, generator=torch.Generator().manual_seed(0))
    >>> gcn.predict(memory, neighbor_ids, torch.tensor([[0, 1], [0, 3]])).shape
    torch.Size([2])
    """

    def __init__(
        self,
        num_features: int,
        *,
        hidden: int = HIDDEN,
        mlp_hidden: int = MLP_HIDDEN,
        generator: torch.Generator | None = None,
    ) -> None:
        """Build for memories [N, num_features]; weights are drawn from `generator`, by default the global one."""
        super().__init__()
        self.columns = num_features, NUM_LABELS
        self.theta_1 = nn.Parameter(torch.empty(sum(self.columns), hidden))
        self.theta_2 = nn.Parameter(torch.empty(hidden, hidden))
        self.conv = nn.Conv1d(1, CONV_CHANNELS, KERNEL_SIZE, STRIDE)
        num_positions = (2 * hidden - KERNEL_SIZE) // STRIDE + 1
        self.mlp_1 = nn.Linear(CONV_CHANNELS * num_positions, mlp_hidden)
        self.mlp_2 = nn.Linear(mlp_hidden, 1)
        self.reset_parameters(generator)

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights such that activations have about unit variance.

        All feature columns together have unit variance, and so has every label column: with equal weights three label
        columns would hardly count beside 2,048 feature columns.
        """
        of_feature, of_label = self.theta_1.split(self.columns)
        of_feature.normal_(0, max(1, len(of_feature)) ** -0.5, generator=generator)
        of_label.normal_(0, 1, generator=generator)
        self.theta_2.normal_(0, math.sqrt(2 / len(self.theta_2)), generator=generator)
        for layer in (self.conv, self.mlp_1, self.mlp_2):
            bound = layer.weight[0].numel() ** -0.5
            layer.weight.uniform_(-bound * math.sqrt(3), bound * math.sqrt(3), generator=generator)
            assert layer.bias is not None
            layer.bias.zero_()

    def forward(self, memory: Tensor, subgraphs: SubgraphBatch, *, projected: Tensor | None = None) -> Tensor:
        """Return logits [P] for memory [N, D], differentiable in the parameters and the memory.

        `projected` reuses `project(memory)`.
        """
        if self.fits_at_once(memory.device, len(subgraphs), num_leaves=subgraphs.nodes.shape[1]):
            projected = self.project(memory) if projected is None else projected
            return self.chunk_logits(projected, subgraphs)
        if projected is None:
            memory, subgraphs = keep_touched(memory, subgraphs)
            projected = self.project(memory)
        packed, num_leaves, order = pack(subgraphs)
        cells_per_node = cells_per_chunk(memory.device) // len(self.theta_2)
        logits, start = [projected[:0, 0]], 0  # empty and differentiable, in case there are no pairs
        while start < len(packed):
            stop = min(start + max(1, cells_per_node // (2 + int(num_leaves[start]))), len(packed))
            chunk = packed.rows(start, stop, num_leaves=int(num_leaves[stop - 1]))
            logits.append(self.chunk_logits(projected, chunk))
            start = stop
        return torch.cat(logits)[order.argsort()]

    def fits_at_once(self, device: torch.device, num_pairs: int, *, num_leaves: int) -> bool:
        """Return whether to compute all pairs as one chunk without packing, which syncs; never on a CPU.

        On a CPU the work that packing, `keep_touched` and `unordered` spare is worth more.
        """
        num_cells = num_pairs * (2 + num_leaves) * len(self.theta_2)
        return device.type != "cpu" and num_cells <= cells_per_chunk(device)

    def project(self, memory: Tensor) -> Tensor:
        """Multiply each image with each label l with Theta_1, [3 N + 1, H]; valid for one memory state.

        Row l N + n is image n with label l; the last row, of absent leaves, is 0.
        """
        of_feature, of_label = self.theta_1.split(self.columns)
        # scale the weights, since scaling all features takes longer than the product
        by_feature = memory @ (feature_scale(memory.shape[1]) * of_feature)
        return F.pad((by_feature + of_label[:, None]).flatten(0, 1), (0, 0, 0, 1))

    def chunk_logits(self, projected: Tensor, subgraphs: SubgraphBatch) -> Tensor:
        """Return the logits [P] of pairs whose tensors are computed at once; absent leaves are allowed."""
        stars = weigh_stars(subgraphs, dtype=projected.dtype)
        y_1 = convolve(first_product(projected, subgraphs), stars)
        y_2 = convolve(Nodes(y_1.ends @ self.theta_2, y_1.leaves @ self.theta_2), stars)
        return self.classify(torch.cat([max_pool(y_1), max_pool(y_2)], dim=1))

    def classify(self, pooled: Tensor) -> Tensor:
        """Return logits [P] from pooled vectors [P, 2 H]."""
        seen = F.relu(self.conv(pooled[:, None])).flatten(1)
        return self.mlp_2(F.relu(self.mlp_1(seen))).squeeze(1)

    @torch.no_grad()
    def predict(self, memory: Tensor, neighbor_ids: Tensor, pairs: Tensor) -> Tensor:
        """Return the likelihoods g_ij [P] of pairs [P, 2] with neighbor ids [N, K].

        Unless all pairs fit at once, a pair given as (i, j) and (j, i) is computed once, and pairs with lists of
        similar length are grouped, so that one long list does not pad all graphs.
        """
        if self.fits_at_once(memory.device, len(pairs), num_leaves=2 * neighbor_ids.shape[1]):
            subgraphs = build_subgraphs(pairs, neighbor_ids, is_trimmed=False)
            return self(memory, subgraphs).sigmoid()
        pairs, where = unordered(pairs, num_images=len(neighbor_ids))
        num_slots = len(pairs) * (2 + 2 * neighbor_ids.shape[1])
        projected = self.project(memory) if num_slots >= len(memory) else None
        likelihoods = memory.new_empty(len(pairs))
        for chosen in groups_of_like_length(neighbor_ids, pairs):
            subgraphs = build_subgraphs(pairs[chosen], neighbor_ids)
            logits = self(memory, subgraphs, projected=projected)
            likelihoods[chosen] = logits.sigmoid()
        return likelihoods[where]


def cells_per_chunk(device: torch.device) -> int:
    """Return the most entries of a chunk's tensor on this device."""
    return CELLS_PER_CHUNK.get(device.type, CELLS_PER_CHUNK["cpu"])


def feature_scale(num_features: int) -> float:
    """Return the factor of features, D^0.5, which gives entries of unit rows the size of one-hot labels."""
    return math.sqrt(num_features)


class Nodes(NamedTuple):
    """A vector for each node: `ends` [P, 2, H] for i and j, `leaves` [P, W, H]."""

    ends: Tensor
    leaves: Tensor


class StarWeights(NamedTuple):
    """The matrix D^-1 (A + I) of two stars.

    Of A: `members` [P, 2, W] and `link` [P, 1, 1]. Of D^-1: `end_scale` [P, 2, 1] and `leaf_scale` [P, W, 1].
    """

    members: Tensor
    link: Tensor
    end_scale: Tensor
    leaf_scale: Tensor


def first_product(projected: Tensor, subgraphs: SubgraphBatch) -> Nodes:
    """Return Y^(0) Theta_1 from `PairGCN.project`; 0 for absent leaves."""
    pairs = subgraphs.pairs
    nodes = torch.cat([pairs, subgraphs.nodes], dim=1)
    labels = torch.cat([torch.full_like(pairs, END_LABEL), subgraphs.labels], dim=1)
    num_images = len(projected) // NUM_LABELS
    rows = (nodes + labels * num_images).where(nodes >= 0, len(projected) - 1)
    product = F.embedding(rows, projected)
    return Nodes(product[:, :2], product[:, 2:])


def weigh_stars(subgraphs: SubgraphBatch, *, dtype: torch.dtype) -> StarWeights:
    """Compute the weights of Eq. 5 from memberships and links."""
    members = torch.stack([subgraphs.in_i, subgraphs.in_j], dim=1).to(dtype)
    has_link = subgraphs.link[:, None, None].to(dtype)
    end_degrees, leaf_degrees = 1 + members.sum(2) + has_link[:, 0], 1 + members.sum(1)
    return StarWeights(members, has_link, 1 / end_degrees[:, :, None], 1 / leaf_degrees[:, :, None])


def convolve(product: Nodes, stars: StarWeights) -> Nodes:
    """Return Y^(l+1) = ReLU(D^-1 (A + I) Y^(l) Theta) from the product Y^(l) Theta (Eq. 5)."""
    ends = torch.baddbmm(product.ends + stars.link * product.ends.flip(1), stars.members, product.leaves)
    leaves = torch.baddbmm(product.leaves, stars.members.transpose(1, 2), product.ends)
    return Nodes(ends.mul_(stars.end_scale).relu_(), leaves.mul_(stars.leaf_scale).relu_())


def max_pool(y: Nodes) -> Tensor:
    """Return the maximum over the nodes of each graph, [P, H]; absent leaves are 0, the minimum of a ReLU."""
    if y.leaves.shape[1] == 0:
        return y.ends.amax(1)
    return torch.maximum(y.ends.amax(1), y.leaves.amax(1))


def keep_touched(memory: Tensor, subgraphs: SubgraphBatch) -> tuple[Tensor, SubgraphBatch]:
    """Drop images that are in no graph and renumber the rest, if there can be any such images."""
    num_slots = subgraphs.pairs.numel() + subgraphs.nodes.numel()
    if num_slots >= len(memory):
        return memory, subgraphs
    is_leaf = subgraphs.nodes >= 0
    is_touched = torch.zeros(len(memory), dtype=torch.bool, device=memory.device)
    is_touched[subgraphs.pairs.flatten()] = True
    is_touched[subgraphs.nodes[is_leaf]] = True
    position = is_touched.cumsum(0) - 1
    nodes = position[subgraphs.nodes.clamp(min=0)].where(is_leaf, -1)
    renumbered = SubgraphBatch(position[subgraphs.pairs], nodes, subgraphs.in_i, subgraphs.in_j, subgraphs.link)
    return memory[is_touched], renumbered


def unordered(pairs: Tensor, *, num_images: int) -> tuple[Tensor, Tensor]:
    """Return the distinct pairs, smaller id first, int64 [Q, 2], and the index of each given pair among them, [P]."""
    keys, where = (pairs.amin(1) * num_images + pairs.amax(1)).unique(return_inverse=True)
    return torch.stack([keys // num_images, keys % num_images], dim=1), where


def groups_of_like_length(neighbor_ids: Tensor, pairs: Tensor) -> Iterator[Tensor]:
    """Yield indices of pairs, int64 [<= P], within which the longer list of a pair differs by at most a quarter."""
    lengths, order = (neighbor_ids >= 0).sum(1)[pairs].amax(1).sort(stable=True)
    lengths = lengths.cpu()
    start = 0
    while start < len(pairs):
        end = int(torch.searchsorted(lengths, int(lengths[start]) * 5 // 4, right=True))
        stop = min(end, start + PAIRS_PER_GROUP)
        yield order[start:stop]
        start = stop
