"""NN_k of the training images as an epoch goes: what lists are drawn from, and what was found."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.config.schema import ListSource, NeighborsConfig
from mprd.neighbors.approximate import NeighborSearch
from mprd.neighbors.camera_norm import CameraStatistics
from mprd.neighbors.exact import PADDING, NeighborTable, find_neighbors, rows_at_once
from mprd.neighbors.reciprocal import SimilarityTable, measure_similarities
from mprd.runtime.device import HostCopy


class BatchSearch(NamedTuple):
    """The lists of a batch as found, and what is still to be searched."""

    rows: Tensor
    """`[B]`, the images of the batch."""
    table: NeighborTable
    """Their lists, not trimmed."""
    is_around: Tensor
    """`[N]`, who stands in these lists and is not of the batch."""
    sizes: HostCopy
    """The longest of the lists, how many entries they have, how many of them were cut, and how many are around."""


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
        return self.cameras.standardize(features, camids)

    def search(self, rows: Tensor, *, is_trimmed: bool) -> NeighborTable:
        """Find the neighbors of some rows."""
        rule = {"camids": self.camids, "is_trimmed": is_trimmed, **self.rule()}
        # unit rows by Eq. 1 and the backbone; a look would read all of the memory, twice a step, and be waited for
        return find_neighbors(self.features, rows=rows, is_checked=True, **rule)

    def search_outside(self, queries: Tensor, camids: Tensor | None) -> Tensor:
        """Return the neighbor ids `[X, K]` of features `[X, D]` that are not in the memory."""
        queries = self.comparable(queries, camids)
        return find_neighbors(
            self.features, camids=self.camids, queries=queries, query_camids=camids, **self.rule()
        ).ids

    def rule(self) -> dict[str, Any]:
        """Return the settings of the search."""
        c = self.config
        block_rows = rows_at_once(len(self.features), self.features.device, memory_mb=c.memory_mb)
        rule = {"k": c.k, "similarity": c.similarity, "k_max": c.k_max, "metric": c.metric, "block_rows": block_rows}
        # shards and indexes know the cosine alone
        return rule if c.metric == "cosine" else {**rule, "density_k": c.density_k}

    def refresh(self) -> NeighborTable:
        """Search all rows anew, keep the lists in `ids`, and return what was found."""
        if self.found is None or not self.stands_still:
            self.found = self.search_all(self.features, camids=self.camids, **self.rule())
            self.ids = self.found.ids
        return self.found

    def search_batch(self, rows: Tensor) -> BatchSearch:
        """Search the lists of a batch `[B]`; an accelerator is not waited for."""
        table = self.search(rows, is_trimmed=False)
        is_around = torch.zeros(len(self.ids), dtype=torch.bool, device=rows.device)
        # the image itself in place of padding, which a mask would have to count
        near = table.ids.where(table.ids != PADDING, rows[:, None])
        is_around.index_fill_(0, near.flatten(), True).index_fill_(0, rows, False)
        sizes = [table.counts.max(), table.counts.sum(), table.is_capped.sum(), is_around.sum()]
        return BatchSearch(rows, table, is_around, HostCopy(torch.stack(sizes)))

    def refresh_around(self, batch: BatchSearch) -> tuple[Tensor, int, int]:
        """Keep the lists of a batch in `ids`, and search those of its neighbors.

        Returns:
            The batch's lists `[B, K]`, how many entries they have, and how many of them `k_max` cut.
        """
        width, num_entries, num_capped, num_around = batch.sizes.tolist()
        near = batch.table.ids[:, :width]
        around = torch.nonzero_static(batch.is_around, size=num_around).squeeze(1)
        # how long the longest is would have to be waited for, and costs an accelerator less to leave open
        found = self.search(around, is_trimmed=around.device.type == "cpu")
        self.set_rows(batch.rows, near)
        self.set_rows(around, found.ids)
        return near, num_entries, num_capped

    def set_rows(self, rows: Tensor, ids: Tensor) -> None:
        """Replace the lists of the images `rows` `[B]` by `ids` `[B, K']`, padded with -1."""
        self.widen(ids.shape[1])
        self.ids[rows] = F.pad(ids, (0, self.ids.shape[1] - ids.shape[1]), value=PADDING)

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
