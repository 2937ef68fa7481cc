"""The GCN's reference path on PyG, one graph a pair: slow, and what tests and benchmarks/labelling.py compare G with.

It shares the parameters and the last layers of `PairGCN`, but not the dense form of Eq. 5 or the labels of two stars.
"""

# P pairs, V nodes of all graphs, D feature size, C input columns, H hidden
from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SAGEConv, global_max_pool
from torch_geometric.utils import add_self_loops

from mprd.gcn.node_features import feature_columns, feature_scale, label_columns, pair_columns
from mprd.neighbors.reciprocal import SimilarityTable
from mprd.subgraphs import Link, SubgraphBatch, drnl, to_graph

if TYPE_CHECKING:
    from mprd.gcn.network import PairGCN


def reference_logits(
    gcn: PairGCN, memory: Tensor, subgraphs: SubgraphBatch, *, similarities: SimilarityTable | None = None
) -> Tensor:
    """Return the logits [P] of `PairGCN.forward`."""
    batch = batch_graphs(subgraphs, link=gcn.link).to(memory.device)
    edge_index, _ = add_self_loops(batch.edge_index, num_nodes=batch.num_nodes)
    y = node_columns(gcn, memory, batch, similarities)
    layers = []
    for theta in (gcn.theta_1, gcn.theta_2):
        conv = SAGEConv(*theta.shape, aggr="mean", root_weight=False, bias=False)
        y = F.relu(torch.func.functional_call(conv, {"lin_l.weight": theta.T}, (y, edge_index)))
        layers.append(y)
    pooled = global_max_pool(torch.cat(layers, dim=1), batch.batch, len(subgraphs))
    return gcn.classify(pooled)


def node_columns(gcn: PairGCN, memory: Tensor, batch: Batch, similarities: SimilarityTable | None) -> Tensor:
    """Return Y^(0), the inputs of all nodes [V, C]."""
    pairs, nodes = batch.pair[batch.batch], batch.node_ids[:, None]
    of_feature = feature_columns(memory[batch.node_ids], variant=gcn.variant) * feature_scale(memory.shape[1])
    of_label = label_columns(batch.labels, dtype=memory.dtype)
    of_pair = pair_columns(memory, pairs, nodes, variant=gcn.variant, similarities=similarities)
    return torch.cat([of_feature, of_label, of_pair[:, 0]], dim=1)


def batch_graphs(subgraphs: SubgraphBatch, *, link: Link) -> Batch:
    """Write out the graph of each pair, labeled by the general DRNL, and batch them in order."""
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
