"""G: the likelihood that a pair shows one person, read off its neighborhood (Eq. 5, Sec. 3.2).

By Eq. 4 each graph is two stars, so Eq. 5 is a few dense products over all pairs at once (`forward`). The images are
multiplied with the first layer's weights once per memory state, however many graphs they stand in.
`forward_reference` is the same network on one PyG graph a pair: slow, and what the fast path is held against.
"""

# P pairs, W leaves, V = 2 + W nodes (i, j, leaves), N images, D feature size, C input columns, H hidden
from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mprd.errors import UserError
from mprd.gcn.node_features import (
    NUM_SCALARS,
    Variant,
    cells_per_chunk,
    count_columns,
    feature_columns,
    feature_scale,
    label_columns,
    pair_columns,
    pair_scalars,
)
from mprd.neighbors.reciprocal import SimilarityTable
from mprd.subgraphs import END_LABEL, NUM_LABELS, Link, SubgraphBatch, build_subgraphs, drnl, overlap, pack, to_graph

ReadOut = Literal["pooled", "scalars", "both"]
KERNEL_SIZE, STRIDE = 5, 2
"""Of the 1-D convolution over the pooled vector, as in the network of SEAL's authors."""
PAIRS_PER_GROUP = 2**15
"""Pairs whose graphs `predict` builds at a time."""


class PairGCN(nn.Module):
    """Two graph convolutions, max-pooling, a 1-D convolution and two fully connected layers -> a logit (Sec. 3.2)."""

    def __init__(
        self,
        num_features: int,
        *,
        variant: Variant = "paper",
        link: Link = "keep",
        hidden: int = 64,
        conv_channels: int = 4,
        mlp_hidden: int = 64,
        read_out: ReadOut = "pooled",
        generator: torch.Generator | None = None,
    ) -> None:
        """Build for memories [N, num_features]; weights are drawn from `generator`, the global one by default.

        What the last layers see is `read_out`: the `pooled` graph (the paper), the pair's `scalars` alone (a control
        without a graph network), or `both`.
        """
        super().__init__()
        if 2 * hidden < KERNEL_SIZE:
            raise UserError(f"gcn.hidden must be at least {(KERNEL_SIZE + 1) // 2}, but got {hidden}")
        self.variant, self.link, self.read_out = variant, link, read_out
        self.columns = count_columns(num_features, variant)
        self.theta_1 = nn.Parameter(torch.empty(sum(self.columns), hidden))
        self.theta_2 = nn.Parameter(torch.empty(hidden, hidden))
        self.conv = nn.Conv1d(1, conv_channels, KERNEL_SIZE, STRIDE)
        num_positions = (2 * hidden - KERNEL_SIZE) // STRIDE + 1
        num_pooled = 0 if read_out == "scalars" else conv_channels * num_positions
        self.mlp_1 = nn.Linear(num_pooled + (0 if read_out == "pooled" else NUM_SCALARS), mlp_hidden)
        self.mlp_2 = nn.Linear(mlp_hidden, 1)
        self.reset_parameters(generator)

    @property
    def needs_similarities(self) -> bool:
        """Say whether its graphs look k-reciprocal similarities up."""
        return self.variant == "reciprocal" and self.read_out != "scalars"

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw all weights so that activations keep about unit size.

        All feature columns share one unit of variance and every other column has its own: else the three label
        columns would drown among 2,048 of the feature.
        """
        of_feature, of_label, of_pair = self.theta_1.split(self.columns)
        of_feature.normal_(0, max(1, len(of_feature)) ** -0.5, generator=generator)
        of_label.normal_(0, 1, generator=generator)
        of_pair.normal_(0, 1, generator=generator)
        self.theta_2.normal_(0, math.sqrt(2 / len(self.theta_2)), generator=generator)
        for layer in (self.conv, self.mlp_1, self.mlp_2):
            bound = layer.weight[0].numel() ** -0.5
            layer.weight.uniform_(-bound * math.sqrt(3), bound * math.sqrt(3), generator=generator)
            assert layer.bias is not None
            layer.bias.zero_()

    def forward(
        self,
        memory: Tensor,
        subgraphs: SubgraphBatch,
        *,
        similarities: SimilarityTable | None = None,
        projected: Tensor | None = None,
    ) -> Tensor:
        """Return logits [P] for memory [N, D], differentiable in the parameters and the memory.

        `similarities` of the N images are needed by the variant `reciprocal` alone; `projected` is `project(memory)`
        where the caller keeps it for several batches.
        """
        if self.fits_at_once(memory.device, len(subgraphs), num_leaves=subgraphs.nodes.shape[1]):
            projected = self.project(memory) if projected is None else projected
            return self.judge(projected, subgraphs, self.look_up(memory, subgraphs, similarities))
        if projected is None:
            if similarities is None:  # which know images by the numbers they have
                memory, subgraphs = keep_touched(memory, subgraphs)
            projected = self.project(memory)
        packed, num_leaves, order = pack(subgraphs)
        cells_per_node = cells_per_chunk(memory.device) // len(self.theta_2)
        logits, start = [projected[:0, 0]], 0  # without pairs, an empty tensor that can still be differentiated
        while start < len(packed):
            stop = min(start + max(1, cells_per_node // (2 + int(num_leaves[start]))), len(packed))
            chunk = packed.rows(start, stop, num_leaves=int(num_leaves[stop - 1]))
            logits.append(self.judge(projected, chunk, self.look_up(memory, chunk, similarities)))
            start = stop
        return torch.cat(logits)[order.argsort()]

    def fits_at_once(self, device: torch.device, num_pairs: int, *, num_leaves: int) -> bool:
        """Say whether so many pairs are judged in one chunk, as they are.

        Never on a CPU: closing holes, leaving out images and judging a pair once spare it work. An accelerator would
        be waited for to count what is spared, for longer than the work takes.
        """
        return device.type != "cpu" and self.fits_chunk(device, num_pairs, num_leaves=num_leaves)

    def fits_chunk(self, device: torch.device, num_pairs: int, *, num_leaves: int) -> bool:
        """Say whether so many pairs make no more than one chunk."""
        return num_pairs * (2 + num_leaves) * len(self.theta_2) <= cells_per_chunk(device)

    def project(self, memory: Tensor) -> Tensor:
        """Multiply each image, under each label l, with its rows of Theta_1, [3 N + 1, H]; once a memory state.

        Row l N + n is image n under label l; the last row, of no image, is 0.
        """
        of_feature, of_label, _ = self.theta_1.split(self.columns)
        # the scale goes to the weights: scaling all features would take longer than the product itself
        by_feature = feature_columns(memory, variant=self.variant) @ (feature_scale(memory.shape[1]) * of_feature)
        return F.pad((by_feature + of_label[:, None]).flatten(0, 1), (0, 0, 0, 1))

    def look_up(self, memory: Tensor, subgraphs: SubgraphBatch, similarities: SimilarityTable | None) -> PairInputs:
        """Look up what the network sees of each pair beside its projected images: what no weight touches yet."""
        pairs = subgraphs.pairs
        columns = memory.new_empty(len(pairs), 0, 0)
        if self.read_out != "scalars" and self.columns[-1] > 0:
            nodes = torch.cat([pairs, subgraphs.nodes], dim=1)
            columns = pair_columns(memory, pairs, nodes, variant=self.variant, similarities=similarities)
        return PairInputs(columns, self.scalars(memory, subgraphs))

    def scalars(self, memory: Tensor, subgraphs: SubgraphBatch) -> Tensor:
        """Return the pairs' scalars [P, 3]; [P, 0] where the network does not see them."""
        if self.read_out == "pooled":
            return memory.new_empty(len(subgraphs), 0)
        return pair_scalars(memory, subgraphs)

    def judge(self, projected: Tensor, subgraphs: SubgraphBatch, inputs: PairInputs) -> Tensor:
        """Return the logits [P] of one chunk, from `project` and `look_up`."""
        if self.read_out == "scalars":
            return self.decide(inputs.scalars, None)
        stars = weigh(subgraphs, link=self.link, dtype=projected.dtype)
        y_1 = convolve(self.first_product(projected, subgraphs, inputs.columns), stars)
        y_2 = convolve(Nodes(y_1.ends @ self.theta_2, y_1.leaves @ self.theta_2), stars)
        return self.decide(inputs.scalars, torch.cat([max_pool(y_1), max_pool(y_2)], dim=1))

    def first_product(self, projected: Tensor, subgraphs: SubgraphBatch, columns: Tensor) -> Nodes:
        """Return Y^(0) Theta_1; 0 for absent leaves."""
        pairs = subgraphs.pairs
        nodes = torch.cat([pairs, subgraphs.nodes], dim=1)
        labels = torch.cat([torch.full_like(pairs, END_LABEL), subgraphs.labels], dim=1)
        num_images = len(projected) // NUM_LABELS
        rows = (nodes + labels * num_images).where(nodes >= 0, len(projected) - 1)
        product = F.embedding(rows, projected)
        if self.columns[-1] > 0:
            theta = self.theta_1[-self.columns[-1] :]
            product = torch.addmm(product.flatten(0, 1), columns.flatten(0, 1), theta).view_as(product)
        return Nodes(product[:, :2], product[:, 2:])

    def decide(self, scalars: Tensor, pooled: Tensor | None) -> Tensor:
        """Turn pooled vectors [P, 2 H], the pairs' scalars [P, 3], or both into logits [P]."""
        seen = [] if pooled is None else [F.relu(self.conv(pooled[:, None])).flatten(1)]
        if self.read_out != "pooled":
            seen.append(scalars)
        return self.mlp_2(F.relu(self.mlp_1(torch.cat(seen, dim=1)))).squeeze(1)

    @torch.no_grad()
    def predict(
        self,
        memory: Tensor,
        neighbor_ids: Tensor,
        pairs: Tensor,
        *,
        similarities: SimilarityTable | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return the likelihoods g_ij [P] of pairs [P, 2], building their graphs from neighbor ids [N, K].

        The graphs tell along the way how far the lists of a pair's ends overlap, [P], which is returned beside them.
        G cannot tell (i, j) from (j, i): a pair asked for both ways is judged once. Pairs with lists of like length
        are taken together, so that one long list does not widen all graphs.
        """
        if self.fits_at_once(memory.device, len(pairs), num_leaves=2 * neighbor_ids.shape[1]):
            subgraphs = build_subgraphs(pairs, neighbor_ids, is_trimmed=False)
            return self(memory, subgraphs, similarities=similarities).sigmoid(), overlap(subgraphs)
        pairs, where = unordered(pairs, num_images=len(neighbor_ids))
        num_slots = len(pairs) * (2 + 2 * neighbor_ids.shape[1])
        projected = self.project(memory) if num_slots >= len(memory) else None
        likelihoods, overlaps = memory.new_empty(len(pairs)), torch.empty(len(pairs), device=memory.device)
        for chosen in groups_of_like_length(neighbor_ids, pairs):
            subgraphs = build_subgraphs(pairs[chosen], neighbor_ids)
            logits = self(memory, subgraphs, similarities=similarities, projected=projected)
            likelihoods[chosen] = logits.sigmoid()
            overlaps[chosen] = overlap(subgraphs)
        return likelihoods[where], overlaps[where]

    def forward_reference(
        self, memory: Tensor, subgraphs: SubgraphBatch, *, similarities: SimilarityTable | None = None
    ) -> Tensor:
        """Return the logits [P] of `forward` from one PyG graph a pair, labeled by the general DRNL."""
        from torch_geometric.nn import SAGEConv, global_max_pool
        from torch_geometric.utils import add_self_loops

        batch = batch_graphs(subgraphs, link=self.link).to(memory.device)
        of_pair = pair_columns(
            memory,
            batch.pair[batch.batch],
            batch.node_ids[:, None],
            variant=self.variant,
            similarities=similarities,
        )
        y = torch.cat(
            [
                feature_columns(memory[batch.node_ids], variant=self.variant) * feature_scale(memory.shape[1]),
                label_columns(batch.labels, dtype=memory.dtype),
                of_pair[:, 0],
            ],
            dim=1,
        )
        edge_index, _ = add_self_loops(batch.edge_index, num_nodes=batch.num_nodes)
        layers = []
        for theta in (self.theta_1, self.theta_2):
            conv = SAGEConv(*theta.shape, aggr="mean", root_weight=False, bias=False)
            y = F.relu(torch.func.functional_call(conv, {"lin_l.weight": theta.T}, (y, edge_index)))
            layers.append(y)
        pooled = global_max_pool(torch.cat(layers, dim=1), batch.batch, len(subgraphs))
        return self.decide(self.scalars(memory, subgraphs), None if self.read_out == "scalars" else pooled)


class PairInputs(NamedTuple):
    """What is known of pairs: `columns` [P, V, C] of their nodes (`pair_columns`) and `scalars` [P, 3].

    Either is empty where the network does not see it.
    """

    columns: Tensor
    scalars: Tensor


class Nodes(NamedTuple):
    """One vector a node: `ends` [P, 2, H] for i and j, `leaves` [P, W, H]."""

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


def weigh(subgraphs: SubgraphBatch, *, link: Link, dtype: torch.dtype) -> StarWeights:
    """Turn memberships into the weights of Eq. 5."""
    members = torch.stack([subgraphs.in_i, subgraphs.in_j], dim=1).to(dtype)
    has_link = subgraphs.link[:, None, None].to(dtype) * (link == "keep")
    end_degrees, leaf_degrees = 1 + members.sum(2) + has_link[:, 0], 1 + members.sum(1)
    return StarWeights(members, has_link, 1 / end_degrees[:, :, None], 1 / leaf_degrees[:, :, None])


def convolve(product: Nodes, stars: StarWeights) -> Nodes:
    """Return Y^(l+1) = ReLU(D^-1 (A + I) Y^(l) Theta) from the product Y^(l) Theta (Eq. 5)."""
    ends = torch.baddbmm(product.ends + stars.link * product.ends.flip(1), stars.members, product.leaves)
    leaves = torch.baddbmm(product.leaves, stars.members.transpose(1, 2), product.ends)
    return Nodes(ends.mul_(stars.end_scale).relu_(), leaves.mul_(stars.leaf_scale).relu_())


def max_pool(y: Nodes) -> Tensor:
    """Return the largest entry over a graph's nodes, [P, H]; absent leaves are 0, and after a ReLU no node is below."""
    if y.leaves.shape[1] == 0:
        return y.ends.amax(1)
    return torch.maximum(y.ends.amax(1), y.leaves.amax(1))


def keep_touched(memory: Tensor, subgraphs: SubgraphBatch) -> tuple[Tensor, SubgraphBatch]:
    """Leave out the images that stand in no graph, where that can spare work, and renumber the rest."""
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
    """List each pair once, smaller id first, int64 [Q, 2], and say where every given pair is found there, [P]."""
    keys, where = (pairs.amin(1) * num_images + pairs.amax(1)).unique(return_inverse=True)
    return torch.stack([keys // num_images, keys % num_images], dim=1), where


def groups_of_like_length(neighbor_ids: Tensor, pairs: Tensor) -> Iterator[Tensor]:
    """Yield positions of pairs, int64 [<= P], such that the longer of two lists differs by a quarter within a group."""
    lengths, order = (neighbor_ids >= 0).sum(1)[pairs].amax(1).sort(stable=True)
    lengths = lengths.cpu()
    start = 0
    while start < len(pairs):
        end = int(torch.searchsorted(lengths, int(lengths[start]) * 5 // 4, right=True))
        stop = min(end, start + PAIRS_PER_GROUP)
        yield order[start:stop]
        start = stop


def batch_graphs(subgraphs: SubgraphBatch, *, link: Link) -> Any:
    """Write out each pair's graph as PyG data, one after the other, and batch them."""
    from torch_geometric.data import Batch, Data

    graphs = []
    for index in range(len(subgraphs)):
        adjacency, node_ids = to_graph(subgraphs, index, link=link)
        graphs.append(
            Data(
                num_nodes=len(node_ids),
                edge_index=torch.from_numpy(adjacency).nonzero().T,
                node_ids=torch.from_numpy(node_ids),
                labels=torch.from_numpy(drnl(adjacency)),
                pair=subgraphs.pairs[index : index + 1].cpu(),
            )
        )
    return Batch.from_data_list(graphs)
