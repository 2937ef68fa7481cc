"""What an epoch of the CNN minimizes: the loss of the pairs (Eq. 2), or of Cluster-Contrast's clusters.

Shapes: B images of this worker, G images of the global batch, N images, D feature size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from mprd import losses
from mprd.backbone.features import ordered_batches
from mprd.config.schema import Config
from mprd.engine.state import TrainState
from mprd.memory import FeatureMemory
from mprd.pairs.clusters import ClusterMemory, balanced_batches
from mprd.pairs.positives import PositiveTable


class Objective(Protocol):
    """The batches of an epoch, their loss, and what changes after a step."""

    def batches(self, draw: torch.Generator) -> list[list[int]]:
        """Draw the epoch's global batches of image ids."""

    def loss(self, features: Tensor, ids: Tensor) -> Tensor:
        """Return the mean loss of features `[B, D]` of the images `ids` `[B]`."""

    def update(self, features: Tensor, ids: Tensor) -> None:
        """Take over the features `[G, D]` of a global batch after its step."""


@dataclass(frozen=True)
class PairObjective:
    """Pull P_i, push N_i* (Eq. 2), or MLCReID's MMCL, against the memory."""

    memory: FeatureMemory
    positives: PositiveTable
    pair_loss: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    """From similarities, P_i, and what is neither positive nor negative, all `[B, N]`, to a scalar."""
    batch_size: int
    groups: Sequence[Tensor]
    """Ids of the images that may share a batch, all images in all."""

    def batches(self, draw: torch.Generator) -> list[list[int]]:
        """Return every image once, in random order."""
        orders = [ids[torch.randperm(len(ids), generator=draw)] for ids in self.groups]
        batches = [batch for ids in orders for batch in ordered_batches(ids, self.batch_size, is_normalized=True)]
        if len(orders) == 1:
            return batches
        return [batches[row] for row in torch.randperm(len(batches), generator=draw).tolist()]

    def loss(self, features: Tensor, ids: Tensor) -> Tensor:
        return self.pair_loss(features @ self.memory.features.T, self.positives.mask(ids), self.positives.doubtful(ids))

    def update(self, features: Tensor, ids: Tensor) -> None:
        """Change nothing: the memory is updated under every objective."""


@dataclass(frozen=True)
class ClusterObjective:
    """InfoNCE against the centroids of the clusters, which follow the features (Cluster-Contrast)."""

    clusters: ClusterMemory
    camids: Tensor | None
    """`[N]`."""
    batch_size: int

    def batches(self, draw: torch.Generator) -> list[list[int]]:
        """Return several images each of some clusters a batch."""
        return balanced_batches(self.clusters.labels, self.camids, batch_size=self.batch_size, generator=draw)

    def loss(self, features: Tensor, ids: Tensor) -> Tensor:
        return self.clusters.loss(features, ids)

    def update(self, features: Tensor, ids: Tensor) -> None:
        self.clusters.update(features, ids)


def choose_objective(config: Config, state: TrainState, camids: Tensor | None, groups: Sequence[Tensor]) -> Objective:
    """Return the objective of this epoch: clusters where `dbscan` found any, else pairs in batches of a group each."""
    if state.clusters is not None:
        return ClusterObjective(state.clusters, camids, config.train.batch_size)
    pair_loss = losses.mmcl if config.pairs.labeller == "mlcr" else losses.binomial_deviance
    pair_loss = partial(pair_loss, delta=config.loss.delta, r=config.loss.r)
    return PairObjective(state.memory, state.positives, pair_loss, config.train.batch_size, groups)
