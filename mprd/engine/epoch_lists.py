"""The neighbor lists of an epoch: the features they are drawn from, and the similarity fitted to these."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import Tensor

from mprd.config.schema import Config
from mprd.engine.stats import EpochStats
from mprd.neighbors.lists import FrozenLists, mean_features
from mprd.neighbors.similarity import KnownIds, Similarity, Whitening, fit_similarity
from mprd.pairs.positives import MetaSet
from mprd.runtime.spans import span

if TYPE_CHECKING:
    from mprd.engine.state import TrainState


class EpochLists:
    """Make lists when they are first needed, and keep them for the epoch; the state keeps features and similarity."""

    def __init__(
        self, config: Config, state: TrainState, camids: Tensor | None, *, extract: Callable[[], Tensor]
    ) -> None:
        """Draw lists of the images under the cameras `[N]`; `extract` returns their clean features `[N, D]`."""
        self.config = config
        self.state = state
        self.camids = camids
        self.extract = extract
        self.lists: FrozenLists | None = None
        self.next_stats: EpochStats | None = None
        self.last: Whitening | None = None

    def get(self, stats: EpochStats) -> FrozenLists:
        """Return the epoch's lists; the seconds of a new similarity are added to the statistics."""
        if self.config.searches_live:
            # the lists of the GCN's epoch, during which the memory is fixed
            return self.draw(self.state.memory.features, Similarity())
        if self.lists is None:
            features = self.features()
            started = time.monotonic()
            if self.state.similarity is None:
                self.state.similarity = self.fit(features)
            self.lists = self.draw(features, self.state.similarity)
            stats.add("similarity_seconds", time.monotonic() - started)
        return self.lists

    def renew(self) -> None:
        """Drop lists, their features and the similarity, all of which the network has moved away from.

        Under `neighbors.whitening` they are made anew at once, so that a whitening of this network is saved with it.
        """
        self.last = self.state.whitening
        self.state.list_features = self.state.similarity = self.lists = None
        self.next_stats = EpochStats()
        if self.config.neighbors.whitening:
            self.get(self.next_stats)

    def begin_epoch(self) -> EpochStats:
        """Renew the lists unless that is done, and return the new epoch's statistics."""
        if self.next_stats is None:
            self.renew()
        assert self.next_stats is not None
        stats, self.next_stats = self.next_stats, None
        return stats

    def features(self) -> Tensor:
        """Return the features `[N, D]` that the epoch's lists are drawn from."""
        if self.state.list_features is None:
            self.state.list_features = list_features(self.config, self.state.memory.features, extract=self.extract)
        return self.state.list_features

    def fit(self, features: Tensor) -> Similarity:
        """Fit the similarity to features `[N, D]`; labeled images tell how many of the surest pairs are true."""
        with span("similarity"):
            return fit_with_meta(self.config, features, self.camids, self.state.meta, last=self.last)

    def draw(self, features: Tensor, similarity: Similarity) -> FrozenLists:
        """Return lists of features `[N, D]` mapped by the similarity."""
        return FrozenLists(features, self.camids, self.config.neighbors, similarity=similarity)


def fit_with_meta(
    config: Config, features: Tensor, camids: Tensor | None, meta: MetaSet, *, last: Whitening | None = None
) -> Similarity:
    """Fit the similarity to features `[N, D]` under the cameras `[N]`, with what the labeled images Z tell."""
    known = KnownIds.of(meta.ids, meta.pids, num_images=len(features), is_whole=config.meta.is_whole)
    return fit_similarity(features, camids, config.neighbors, known=known, last=last)


def list_features(config: Config, memory: Tensor, *, extract: Callable[[], Tensor]) -> Tensor:
    """Return the features `[N, D]` that lists are drawn from, a copy where they are the memory, which moves.

    Args:
        extract: returns clean features of all images.
    """
    if config.pairs.labeller == "dbscan":
        # Cluster-Contrast clusters clean features
        return extract()
    return mean_features(memory, extract()) if config.neighbors.source == "mean" else memory.clone()
