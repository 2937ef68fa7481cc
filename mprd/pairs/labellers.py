"""P_i of a batch, by the GCN (Eq. 7) or by one of the rules of Tables 1 and 2.

Shapes: B images of a batch, K candidates of an image, P candidate pairs, N images, W width of the widest P_i.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.config.schema import Config, Labeller, PairsConfig
from mprd.gcn.network import PairGCN
from mprd.neighbors.exact import PADDING
from mprd.neighbors.lists import FrozenLists, NeighborLists
from mprd.pairs import rules
from mprd.pairs.clusters import ClusterMemory, same_cluster
from mprd.pairs.positives import MetaSet, PositiveLimit, split_by_limit
from mprd.runtime.distributed import WorkerGroup
from mprd.subgraphs import SubgraphBuilder

LABEL_CHUNK = 256
"""Images labeled at a time in a pass over all of them."""


@dataclass(frozen=True)
class Labels:
    """P_i of a batch, and the scores of its candidates where the labeler has any."""

    positives: Tensor
    """`[B, W]`, ids padded with -1."""
    candidates: Tensor | None = None
    """`[B, K]`, NN_k(i) padded with -1."""
    likelihoods: Tensor | None = None
    """`[B, K]`, g_ij; 0 at padding."""
    is_capped: Tensor | None = None
    """bool `[B]`, the lists that `neighbors.k_max` cut."""
    refused: Tensor | None = None
    """`[B, W]`, likely positives beyond `pairs.limit`, padded with -1: neither positives nor negatives."""


class Candidates(NamedTuple):
    """The candidates of some images, as lists and as pairs."""

    ids: Tensor
    """`[B]`, the images i."""
    lists: Tensor
    """`[B, K]`, NN_k(i) padded with -1."""
    is_capped: Tensor
    """bool `[B]`, the lists that `neighbors.k_max` cut."""
    places: tuple[Tensor, ...]
    """Rows and columns `[P]` of `lists` that hold a candidate."""

    @classmethod
    def of_batch(cls, ids: Tensor, lists: NeighborLists) -> Candidates:
        """Read, or search, the lists of the images `ids` `[B]`."""
        near, is_capped = lists.of_batch(ids)
        return cls(ids, near, is_capped, (near != PADDING).nonzero(as_tuple=True))

    @property
    def pairs(self) -> Tensor:
        """`[P, 2]`."""
        return torch.stack([self.ids[self.places[0]], self.lists[self.places]], dim=1)

    def table(self, values: Tensor) -> Tensor:
        """Put the values `[P]` of the pairs where the candidates are, `[B, K]`, with 0 at padding."""
        return values.new_zeros(self.lists.shape).index_put_(self.places, values)


@dataclass(frozen=True)
class CandidateLabeller:
    """Label the candidates NN_k(i) by the GCN (Sec. 4.1, Eq. 7)."""

    gcn: PairGCN
    lists: NeighborLists
    """Candidates, and the features that graphs are built of."""
    mu: float
    """Threshold of the likelihood (Eq. 7)."""
    limit: PositiveLimit | None = None
    """Most positives of an image."""

    def label(self, ids: Tensor) -> Labels:
        """Label the images `ids` `[B]`."""
        candidates = Candidates.of_batch(ids, self.lists)
        return self.accept(candidates, self.gcn.predict(self.lists.features, self.lists.ids, candidates.pairs))

    @torch.no_grad()
    def label_chunks(self, chunks: list[Tensor], build: SubgraphBuilder) -> Iterator[Labels]:
        """Label chunks of images, from the subgraphs that `build` yields."""
        candidates = [Candidates.of_batch(ids, self.lists) for ids in chunks]
        pair_ids = [chunk.pairs for chunk in candidates]
        stream = build(torch.cat(pair_ids), self.lists.ids, [*map(len, pair_ids)])
        for chunk, subgraphs in zip(candidates, stream, strict=True):
            logits = self.gcn(self.lists.features, subgraphs)
            yield self.accept(chunk, logits.sigmoid())

    def accept(self, candidates: Candidates, likelihoods: Tensor) -> Labels:
        """Apply Eq. 7 to the likelihoods `[P]` of the candidate pairs."""
        ids, lists, is_capped, _ = candidates
        table = candidates.table(likelihoods)
        accepted = rules.accept(ids, lists, table, mu=self.mu)
        scores = torch.cat([table.new_ones(len(ids), 1), table], dim=1)
        positives, refused = split_by_limit(ids, accepted, scores, self.limit)
        return Labels(positives, lists, table, is_capped=is_capped, refused=refused)


@dataclass(frozen=True)
class RuleLabeller:
    """Label by one of the rules of Tables 1 and 2: a function from ids `[B]` to P `[B, W]`, padded with -1."""

    rule: Callable[[Tensor], Tensor]
    refused: Callable[[Tensor], Tensor] | None = None
    """From ids `[B]` to what the limit has refused `[B, W]`, where it can."""

    def label(self, ids: Tensor) -> Labels:
        """Label the images `ids` `[B]`."""
        return Labels(self.rule(ids), refused=None if self.refused is None else self.refused(ids))

    def label_chunks(self, chunks: list[Tensor], _build: SubgraphBuilder) -> Iterator[Labels]:
        """Label chunks of images."""
        return map(self.label, chunks)


PairLabeller = CandidateLabeller | RuleLabeller


def choose_labeller(
    name: Labeller,
    config: Config,
    lists: NeighborLists,
    *,
    gcn: PairGCN,
    pids: Tensor | None,
    meta: MetaSet,
    clusters: ClusterMemory | None = None,
    limit: PositiveLimit | None = None,
) -> PairLabeller:
    """Return the labeler of this name.

    Args:
        pids: `[N]`, read by `supervised` alone.
        clusters: of this epoch, under `dbscan`; None where none were found, which labels as `single` does.
        limit: most positives of an image, for `gcn` and `reciprocal`.
    """
    if name == "gcn":
        return CandidateLabeller(gcn, lists, config.pairs.mu, limit)
    if name == "reciprocal":
        # all images are labeled at once, so lists are not live
        assert isinstance(lists, FrozenLists)
        return label_by_similarity(lists, above=config.pairs.threshold_of("reciprocal"), limit=limit)
    return RuleLabeller(choose_rule(name, config.pairs, lists.features, pids, meta, clusters))


def label_by_similarity(lists: FrozenLists, *, above: float, limit: PositiveLimit | None) -> RuleLabeller:
    """Label by a threshold of the k-reciprocal similarity of all pairs, once, when a label is first read."""

    @cache
    def split() -> tuple[Tensor, Tensor | None]:
        ids, values = lists.similarities.above(above)
        return split_by_limit(torch.arange(len(ids), device=ids.device), ids, values, limit)

    def refused(ids: Tensor) -> Tensor:
        beyond = split()[1]
        assert beyond is not None, "there is a limit"
        return beyond[ids]

    return RuleLabeller(lambda ids: split()[0][ids], None if limit is None else refused)


def choose_rule(
    name: Labeller,
    config: PairsConfig,
    features: Tensor,
    pids: Tensor | None,
    meta: MetaSet,
    clusters: ClusterMemory | None,
) -> Callable[[Tensor], Tensor]:
    """Return the rule of this name on features `[N, D]`: from ids `[B]` to P `[B, W]`."""
    if name == "single" or (name == "dbscan" and clusters is None):
        return lambda ids: ids[:, None]

    def mplp(ids: Tensor) -> Tensor:
        return rules.mplp(features, ids, t=config.threshold_of(name))

    masks: dict[str, Callable[[Tensor], Tensor]] = {
        "knn": lambda ids: rules.knn(features, ids),
        "ss": lambda ids: rules.ss(features, ids, similarity=config.threshold_of("ss")),
        "mplp": mplp,
        # MLCReID, with MMCL as its loss
        "mlcr": mplp,
        "supervised": lambda ids: rules.supervised(known(pids), ids),
        "dbscan": lambda ids: same_cluster(known(None if clusters is None else clusters.labels), ids),
    }
    mask = masks[name]
    if config.relabel_meta:
        return lambda ids: rules.mask_to_ids(rules.relabel(mask(ids), ids, meta))
    return lambda ids: rules.mask_to_ids(mask(ids))


def known(labels: Tensor | None) -> Tensor:
    """Return identities, which `check_requirements` has seen, or the clusters of this epoch."""
    assert labels is not None
    return labels


def label_all(
    labeller: PairLabeller, everyone: Tensor, *, build: SubgraphBuilder, workers: WorkerGroup
) -> Iterator[tuple[Tensor, Labels]]:
    """Yield ids and labels of all images, `everyone` `[N]` in order, from one state of the memory.

    Each worker labels its shard of each chunk, from the subgraphs that `build` yields.
    """
    chunks = everyone.split(LABEL_CHUNK)
    shards = [workers.shard(len(ids)) for ids in chunks]
    own = [ids[shard.own] for ids, shard in zip(chunks, shards, strict=True)]
    parts = zip(labeller.label_chunks(own, build), shards, strict=True)
    labels = (gather_labels(part, shard.counts, workers) for part, shard in parts)
    return zip(chunks, labels, strict=True)


def gather_labels(labels: Labels, counts: list[int], workers: WorkerGroup) -> Labels:
    """Concatenate the labels of all workers' images, in two messages: widths, then values."""
    if workers.size == 1:
        return labels
    fills = {
        "positives": PADDING,
        "refused": PADDING,
        "candidates": PADDING,
        "likelihoods": 0,
        "is_capped": 0,
    }
    own = {name: part for name in fills if (part := getattr(labels, name)) is not None}
    tables = {name: part if part.ndim == 2 else part[:, None] for name, part in own.items()}
    sizes = torch.tensor([[part.shape[1] for part in tables.values()]], device=workers.device)
    widths = workers.gather(sizes, [1] * workers.size).amax(0).tolist()
    padded = [
        F.pad(part, (0, width - part.shape[1]), value=fills[name])
        for (name, part), width in zip(tables.items(), widths, strict=True)
    ]
    # float64 holds ids up to 2^53, likelihoods and flags to the bit
    everyones = workers.gather(torch.cat([part.double() for part in padded], dim=1), counts).split(widths, dim=1)
    gathered = {name: part.to(own[name].dtype) for name, part in zip(own, everyones, strict=True)}
    if "is_capped" in gathered:
        gathered["is_capped"] = gathered["is_capped"].squeeze(1)
    return Labels(**gathered)
