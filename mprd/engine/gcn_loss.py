"""The loss of a GCN step (Eq. 6, Eq. 10): launched kernel by kernel, or recorded as CUDA graphs and replayed.

A step's pair graphs are small: a fast GPU is done with them long before the host has launched hundreds of kernels.
"""

# P pairs, W leaves, N images, X perturbed copies, D feature size, V = 2 + W nodes, C input columns
from __future__ import annotations

import gc
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mprd.engine.gcn_pool import PoolStep
from mprd.gcn.network import PairGCN, PairInputs
from mprd.neighbors.reciprocal import SimilarityTable
from mprd.runtime.distributed import WorkerGroup
from mprd.subgraphs import SubgraphBatch

FEWEST_PAIRS, FEWEST_LEAVES = 64, 16
"""Of a recorded step."""
EMPTY_SLOT = -1
"""In place of a leaf that is not there."""

StepLoss = Callable[[SubgraphBatch, PoolStep], Tensor]
"""L_G^u + eta L_G^m of a step and the graphs of this worker's share of its pairs."""


class Given(NamedTuple):
    """What the steps of an epoch have in common: `features` [N + X, D], `similarities` where G looks them up, eta."""

    features: Tensor
    similarities: SimilarityTable | None
    eta: float


class GcnLoss:
    """The loss, launched kernel by kernel; every worker has the whole, and gradients of its own pairs alone."""

    def __init__(self, gcn: PairGCN, workers: WorkerGroup) -> None:
        self.gcn, self.workers = gcn, workers

    def begin(self, features: Tensor, similarities: SimilarityTable | None, *, eta: float) -> StepLoss:
        """Return the loss of an epoch's steps; its pairs are of features [N + X, D]."""
        return partial(self.measure, Given(features, similarities, eta))

    def measure(self, given: Given, subgraphs: SubgraphBatch, step: PoolStep) -> Tensor:
        """Judge a step's graphs and compare."""
        own = self.gcn(given.features, subgraphs, similarities=given.similarities)
        unlabelled, meta = step.losses(self.workers.join(own, self.workers.shard(len(step)).counts))
        return unlabelled + given.eta * meta


class RecordedGcnLoss(GcnLoss):
    """The loss of one worker, its passes forward and backward as CUDA graphs (not in the paper).

    A graph works on tensors of one size at one place. So a step is written into a larger one, whose other pairs weigh
    nothing, and the features of an epoch to where those of the last one were. A size is recorded when it first comes;
    sizes are rounded, so that few do.
    """

    def __init__(self, gcn: PairGCN) -> None:
        super().__init__(gcn, WorkerGroup())
        self.features = torch.empty(0)
        self.steps: dict[tuple[int, int], RecordedStep] = {}

    def begin(self, features: Tensor, similarities: SimilarityTable | None, *, eta: float) -> StepLoss:
        """Return the loss of an epoch's steps, after copying the features [N + X, D]."""
        num_rows = rounded(len(features), digits=3)
        if len(self.features) != num_rows:
            if self.steps:
                self.steps.clear()
                # a graph that went during a recording would spoil it
                gc.collect()
            self.features = features.new_zeros(num_rows, features.shape[1])
        self.features[: len(features)] = features
        return super().begin(features, similarities, eta=eta)

    def measure(self, given: Given, subgraphs: SubgraphBatch, step: PoolStep) -> Tensor:
        """Return the loss of a step, which the next step of its size overwrites; too large a one is launched."""
        num_pairs = rounded(max(FEWEST_PAIRS, len(subgraphs)), digits=1)
        num_leaves = rounded(max(FEWEST_LEAVES, subgraphs.nodes.shape[1]), digits=1)
        if not self.gcn.fits_chunk(self.features.device, num_pairs, num_leaves=num_leaves):
            return super().measure(given, subgraphs, step)
        inputs = self.gcn.look_up(given.features, subgraphs, given.similarities)
        if (num_pairs, num_leaves) not in self.steps:
            self.steps[num_pairs, num_leaves] = RecordedStep(self.gcn, self.features, num_pairs, num_leaves, inputs)
        return self.steps[num_pairs, num_leaves](subgraphs, inputs, *step.targets(given.eta))


class RecordedStep:
    """One size of step: the tensors that its graphs read, and their replay."""

    def __init__(self, gcn: PairGCN, features: Tensor, num_pairs: int, num_leaves: int, inputs: PairInputs) -> None:
        """Record a step without a pair; `inputs` are any of those to come, for their number of columns."""
        device = features.device
        num_columns, num_scalars = inputs.columns.shape[2], inputs.scalars.shape[1]
        num_nodes = 2 + num_leaves if num_columns else 0
        self.features = features
        self.read = (
            torch.zeros(num_pairs, 2, dtype=torch.int64, device=device),
            torch.full((num_pairs, num_leaves), EMPTY_SLOT, device=device),
            *(torch.zeros(num_pairs, num_leaves, dtype=torch.bool, device=device) for _ in range(2)),
            torch.zeros(num_pairs, dtype=torch.bool, device=device),
            features.new_zeros(num_pairs, num_nodes, num_columns),
            features.new_zeros(num_pairs, num_scalars),
            *(features.new_zeros(num_pairs) for _ in range(2)),
        )
        self.run: Any = torch.cuda.make_graphed_callables(
            WeightedLoss(gcn), (features, *self.read), allow_unused_input=True
        )

    def __call__(self, subgraphs: SubgraphBatch, inputs: PairInputs, is_positive: Tensor, weights: Tensor) -> Tensor:
        """Write a step where the graphs read, and replay them."""
        graphs = (subgraphs.pairs, subgraphs.nodes, subgraphs.in_i, subgraphs.in_j, subgraphs.link)
        for place, values in zip(self.read, (*graphs, *inputs, is_positive, weights), strict=True):
            place.fill_(EMPTY_SLOT if values is subgraphs.nodes else 0)
            place[tuple(map(slice, values.shape))] = values
        return self.run(self.features, *self.read)


class WeightedLoss(nn.Module):
    """The cross-entropy of pairs, each with a weight of its own; recording replaces `forward`."""

    def __init__(self, gcn: PairGCN) -> None:
        super().__init__()
        self.gcn = gcn

    def forward(
        self,
        features: Tensor,
        pairs: Tensor,
        nodes: Tensor,
        in_i: Tensor,
        in_j: Tensor,
        link: Tensor,
        columns: Tensor,
        scalars: Tensor,
        is_positive: Tensor,
        weights: Tensor,
    ) -> Tensor:
        """Return the sum over P pairs."""
        subgraphs = SubgraphBatch(pairs, nodes, in_i, in_j, link)
        logits = self.gcn.judge(self.gcn.project(features), subgraphs, PairInputs(columns, scalars))
        return F.binary_cross_entropy_with_logits(logits, is_positive, weights, reduction="sum")


def rounded(number: int, *, digits: int) -> int:
    """Round up to a whole number that has at most so many leading binary digits."""
    unit = 1 << max(0, (number - 1).bit_length() - digits)
    return -(-number // unit) * unit
