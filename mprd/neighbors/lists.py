"""NN_k of the training images during an epoch: searched once and then fixed, or live as the memory moves (Alg. 1).

Both kinds answer the same calls. Shapes: N images, B images of a batch, K list width, D feature size.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.config.schema import NeighborsConfig
from mprd.neighbors.approximate import find_by_index
from mprd.neighbors.exact import PADDING, NeighborTable, find_neighbors
from mprd.neighbors.graph import SimilarityGraph
from mprd.neighbors.reciprocal import SimilarityTable, measure_similarities
from mprd.neighbors.similarity import Similarity, find_similarity_graph


class NeighborLists(Protocol):
    """What labeling and GCN training read."""

    @property
    def features(self) -> Tensor:
        """Unit features `[N, D]` that are compared."""

    @property
    def ids(self) -> Tensor:
        """The lists `[N, K]`, padded with -1; live lists hold those of the images searched so far."""

    def of_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the lists `[B, K]` of the images `rows` `[B]`, and which of them `k_max` cut, bool `[B]`.

        Afterwards `ids` holds these lists and those of all images in them.
        """


class FrozenLists:
    """Lists from features that stay as they are: all images are searched once, when a list is first needed."""

    def __init__(
        self, source: Tensor, camids: Tensor | None, config: NeighborsConfig, *, similarity: Similarity
    ) -> None:
        """Search in unit features `source` `[N, D]`, mapped by the similarity, of images under the cameras `[N]`."""
        self.source = source
        self.similarity = similarity
        self.features = similarity(source)
        self.camids = camids
        self.config = config

    @cached_property
    def graph(self) -> SimilarityGraph:
        """The nearest by the camera-corrected similarity, from which J is taken."""
        return find_similarity_graph(self.features, self.camids, self.config)

    @cached_property
    def found(self) -> NeighborTable:
        """The lists of all images."""
        find = find_by_index if self.config.search == "ivf" else find_neighbors
        return find(self.features, **search_rule(self.config))

    @property
    def ids(self) -> Tensor:
        return self.found.ids

    @cached_property
    def similarities(self) -> SimilarityTable:
        """J, the k-reciprocal similarities of all images."""
        return measure_similarities(self.graph, k1=self.similarity.k1)

    def of_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        return self.found.ids[rows], self.found.is_capped[rows]

    def search_outside(self, queries: Tensor) -> Tensor:
        """Return the neighbors `[X, K]` of mapped features `[X, D]` of images from outside."""
        return find_neighbors(self.features, queries=queries, **search_rule(self.config)).ids


class LiveLists:
    """Lists from the memory as it moves: a batch's lists, and those of its neighbors, are searched when asked for."""

    def __init__(self, memory: Tensor, config: NeighborsConfig) -> None:
        """Search in the unit features `memory` `[N, D]`, which change between two calls."""
        self.features = memory
        self.config = config
        self.ids = torch.full((len(memory), config.k), PADDING, device=memory.device)

    def of_batch(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        batch = self.search(rows)
        is_around = torch.zeros(len(self.ids), dtype=torch.bool, device=rows.device)
        is_around[batch.ids[batch.ids != PADDING]] = True
        is_around[rows] = False
        around = is_around.nonzero().squeeze(1)
        self.set_rows(rows, batch.ids)
        self.set_rows(around, self.search(around).ids)
        return batch.ids, batch.is_capped

    def search(self, rows: Tensor) -> NeighborTable:
        """Find the neighbors of the images `rows`."""
        # rows are normalized by Eq. 1; checking would read the whole memory twice a step
        return find_neighbors(self.features, rows=rows, is_checked=True, **search_rule(self.config))

    def set_rows(self, rows: Tensor, ids: Tensor) -> None:
        """Replace the lists of the images `rows` `[B]` by `ids` `[B, K']`, padded with -1."""
        self.ids = F.pad(self.ids, (0, max(0, ids.shape[1] - self.ids.shape[1])), value=PADDING)
        self.ids[rows] = F.pad(ids, (0, self.ids.shape[1] - ids.shape[1]), value=PADDING)


def search_rule(config: NeighborsConfig) -> dict[str, Any]:
    """Return the arguments of a search by cosine under these settings."""
    return {"k": config.k, "similarity": config.similarity, "k_max": config.k_max}


def mean_features(memory: Tensor, clean: Tensor) -> Tensor:
    """Return the unit features `[N, D]` that `neighbors.source: mean` draws lists from."""
    return F.normalize(clean + memory, dim=1)
