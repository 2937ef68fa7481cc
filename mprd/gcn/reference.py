"""The GCN's reference path on PyG, one graph a pair: slow, and what tests and benchmarks/labelling.py compare G with.

It shares the parameters and the last layers of `PairGCN`, but not the dense form of Eq. 5 or the labels of two stars.
"""

# P pairs, V nodes of all graphs, D feature size, C input columns, H hidden
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch_geometric.data import Batch, Data
from torch_geometric.nn import SAGEConv, global_max_pool
from torch_geometric.utils import add_self_loops

from mprd.gcn.network import PairGCN, feature_scale
from mprd.subgraphs import NUM_LABELS, SubgraphBatch, drnl, to_graph


def reference_logits(gcn: PairGCN, memory: Tensor, subgraphs: SubgraphBatch) -> Tensor:
    """Return the logits [P] of `PairGCN.forward`."""
    batch = batch_graphs(subgraphs).to(memory.device)
    edge_index, _ = add_self_loops(batch.edge_index, num_nodes=batch.num_nodes)
    y = node_columns(memory, batch)
    layers = []
    for theta in (gcn.theta_1, gcn.theta_2):
        conv = SAGEConv(*theta.shape, aggr="mean", root_weight=False, bias=False)
        y = F.relu(torch.func.functional_call(conv, {"lin_l.weight": theta.T}, (y, edge_index)))
        layers.append(y)
    pooled = global_max_pool(torch.cat(layers, dim=1), batch.batch, len(subgraphs))
    return gcn.classify(pooled)


def node_columns(memory: Tensor, batch: Batch) -> Tensor:
    """Return Y^(0), the inputs of all nodes [V, C]."""
    of_feature = memory[batch.node_ids] * feature_scale(memory.shape[1])
    return torch.cat([of_feature, F.one_hot(batch.labels, NUM_LABELS).to(memory.dtype)], dim=1)


def batch_graphs(subgraphs: SubgraphBatch) -> Batch:
    """Write out the graph of each pair, labeled by the general DRNL, and batch them in order."""
    graphs = []
    for index in range(len(subgraphs)):
        adjacency, node_ids = to_graph(subgraphs, index)
        graphs.append(
            Data(
                num_nodes=len(node_ids),
                edge_index=torch.from_numpy(adjacency).nonzero().T,
                node_ids=torch.from_numpy(node_ids),
                labels=torch.from_numpy(drnl(adjacency)),
            )
        )
    return Batch.from_data_list(graphs)
