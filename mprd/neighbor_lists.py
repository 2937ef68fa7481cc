"""NN_k of the training images as an epoch goes: what lists are drawn from, and what was found."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.camera_bias import CameraStatistics
from mprd.config import ListSource, NeighborsConfig
from mprd.neighbor_search import NeighborSearch
from mprd.neighbors import NeighborTable, find_neighbors
from mprd.pairs import PADDING
from mprd.reciprocal import SimilarityTable, measure_similarities


class NeighborLists:
    """NN_k of the training images; rows are searched when asked for, the rest stays as it was."""

    def __init__(
        self,
        features: Tensor,
        camids: Tensor | None,
        config: NeighborsConfig,
        search_all: NeighborSearch = find_neighbors,
        *,
        stands_still: bool = False,
    ) -> None:
        """Search in `features` `[N, D]`: the memory itself, which may change between calls, or clean features.

        Args:
            search_all: searches the lists of all images; those of a batch are always searched here, exactly.
            stands_still: the features never change, so that all lists are searched once.

        Raises UserError where the features are to be standardised by cameras that nobody knows.
        """
        self.cameras = CameraStatistics.measure(features, camids) if config.standardise else None
        self.source = features
        self.features = self.comparable(features, camids)
        """What is compared: the source, or the source standardised by camera."""
        self.camids = camids
        self.config = config
        self.search_all = search_all
        self.stands_still = stands_still
        self.ids = torch.full((len(features), config.k), PADDING, device=features.device)
        self.found: NeighborTable | None = None
        """The lists of all images, once they were searched."""

    def comparable(self, features: Tensor, camids: Tensor | None) -> Tensor:
        """Return what features `[n, D]` of images under the cameras `[n]` are compared by."""
        if self.cameras is None:
            return features
        assert camids is not None, "features are standardised, and some come without their cameras"
        return self.cameras.standardise(features, camids)

    def search(self, rows: Tensor | None = None) -> NeighborTable:
        """Find the neighbours of some rows, or of all."""
        if rows is None:
            return self.search_all(self.features, camids=self.camids, **self.rule())
        # unit rows by Eq. 1 and the backbone; a look would read all of the memory, twice a step, and be waited for
        return find_neighbors(self.features, camids=self.camids, rows=rows, is_checked=True, **self.rule())

    def search_outside(self, queries: Tensor, camids: Tensor | None) -> Tensor:
        """Return the neighbour ids `[X, K]` of features `[X, D]` that are not in the memory."""
        queries = self.comparable(queries, camids)
        return find_neighbors(
            self.features, camids=self.camids, queries=queries, query_camids=camids, **self.rule()
        ).ids

    def rule(self) -> dict[str, Any]:
        """Return the settings of the search."""
        c = self.config
        rule = {"k": c.k, "similarity": c.similarity, "k_max": c.k_max, "metric": c.metric}
        # shards and indexes know the cosine alone
        return rule if c.metric == "cosine" else {**rule, "density_k": c.density_k}

    def refresh(self, rows: Tensor | None = None) -> NeighborTable:
        """Search rows anew (all when None), keep the lists in `ids`, and return what was found."""
        if rows is None and self.stands_still and self.found is not None:
            return self.found
        table = self.search(rows)
        if rows is None:
            self.ids, self.found = table.ids, table
        else:
            self.widen(table.ids.shape[1])
            self.ids[rows] = F.pad(table.ids, (0, self.ids.shape[1] - table.ids.shape[1]), value=PADDING)
        return table

    def refresh_around(self, ids: Tensor) -> int:
        """Search the lists of a batch and of its neighbours; return how many of the batch's were cut by k_max."""
        table = self.refresh(ids)
        # the image itself in place of padding, which a mask would have to count
        near = table.ids.where(table.ids != PADDING, ids[:, None])
        self.refresh(torch.cat([ids, near.flatten()]).unique())
        return table.num_capped

    @cached_property
    def similarities(self) -> SimilarityTable:
        """Give the k-reciprocal similarities by what lists are drawn from, measured once: it must stand still."""
        return measure_similarities(self.features)

    def widen(self, width: int) -> None:
        """Make room for longer lists."""
        self.ids = F.pad(self.ids, (0, max(0, width - self.ids.shape[1])), value=PADDING)


def list_features(source: ListSource, memory: Tensor, extract: Callable[[], Tensor]) -> Tensor:
    """Return the features `[N, D]` that lists are drawn from, given the memory and who extracts clean ones."""
    if source == "memory":
        return memory
    clean = extract()
    return clean if source == "clean" else F.normalize(clean + memory, dim=1)
