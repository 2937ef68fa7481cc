"""P_i of a batch, by the GCN (Eq. 7) or by one of the rules of Tables 1 and 2."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.config.schema import ClustersConfig, Config, Decision, Labeller, PairsConfig
from mprd.gcn.network import PairGCN
from mprd.neighbors.lists import BatchSearch, NeighborLists
from mprd.neighbors.reciprocal import SimilarityTable
from mprd.pairs import rules as pairs
from mprd.pairs.agreement import agreements, likelihood_graph
from mprd.pairs.clusters import ClusterMemory, cluster_images, cluster_members, is_same_cluster
from mprd.pairs.rules import PADDING, MetaSet, PositiveLimit
from mprd.runtime.distributed import WorkerGroup
from mprd.subgraphs import SubgraphBatch, SubgraphBuilder, build_subgraphs, overlap

LABEL_CHUNK = 256
"""Images labeled at a time in a pass over all of them."""


@dataclass(frozen=True)
class Labels:
    """P_i of a batch, and what the GCN said of its candidates."""

    positives: Tensor
    """`[B, W]`, ids padded with -1."""
    candidates: Tensor | None = None
    """`[B, K]`, NN_k(i) padded with -1; None for a labeller that judges no candidates."""
    likelihoods: Tensor | None = None
    """`[B, K]`, g_ij; 0 at padding."""
    overlaps: Tensor | None = None
    """`[B, K]`, the overlap of the lists of i and j, what `ListOverlap` says; 0 at padding."""
    agreements: Tensor | None = None
    """`[B, K]`, how far i and j agree about all images; None where nobody asked."""
    num_candidates: int = 0
    """Entries of `candidates` that are not padding."""
    num_capped: int = 0
    """Lists that `neighbors.k_max` cut."""


class Candidates(NamedTuple):
    """The candidates of some images, as lists and as pairs."""

    ids: Tensor
    """`[B]`, the images i."""
    near: Tensor
    """`[B, K]`, NN_k(i) padded with -1."""
    places: tuple[Tensor, ...]
    """Rows and columns `[P]` of `near` where a candidate stands."""

    @classmethod
    def listed(cls, ids: Tensor, near: Tensor, *, count: int | None = None) -> Candidates:
        """Look for the candidates in their lists; where `count` says how many, an accelerator is not waited for."""
        is_there = near != PADDING
        places = is_there.nonzero() if count is None else torch.nonzero_static(is_there, size=count)
        return cls(ids, near, places.unbind(1))

    @property
    def pairs(self) -> Tensor:
        """`[P, 2]`."""
        return torch.stack([self.ids[self.places[0]], self.near[self.places]], dim=1)


class PairJudge(Protocol):
    """Whoever says how likely a pair shows one person: the GCN, or a control in its place."""

    @property
    def needs_similarities(self) -> bool:
        """Say whether it looks k-reciprocal similarities up."""

    def __call__(
        self, memory: Tensor, subgraphs: SubgraphBatch, *, similarities: SimilarityTable | None = None
    ) -> Tensor:
        """Return logits `[P]` from built graphs."""

    def predict(
        self,
        memory: Tensor,
        neighbor_ids: Tensor,
        pairs: Tensor,
        *,
        similarities: SimilarityTable | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return likelihoods `[P]` of pairs `[P, 2]`, and how far the lists of their ends overlap `[P]`."""


class ListOverlap:
    """Judge a pair by how far the lists of its ends overlap: what a graph of two stars says without learning.

    The likelihood is the Jaccard index of NN(i) and NN(j), i and j themselves left out.
    """

    needs_similarities = False

    def __call__(
        self, memory: Tensor, subgraphs: SubgraphBatch, *, similarities: SimilarityTable | None = None
    ) -> Tensor:
        return overlap(subgraphs).to(memory.dtype).logit()

    def predict(
        self, memory: Tensor, neighbor_ids: Tensor, pairs: Tensor, *, similarities: SimilarityTable | None = None
    ) -> tuple[Tensor, Tensor]:
        overlaps = overlap(build_subgraphs(pairs, neighbor_ids))
        return overlaps.to(memory.dtype), overlaps


class CandidateLabeller:
    """Label candidates by the GCN, or by a judge in its place (Sec. 4.1, Eq. 7)."""

    def __init__(
        self,
        judge: PairJudge,
        memory: Tensor,
        lists: NeighborLists,
        *,
        mu: float,
        is_live: bool,
        decide: Decision = "likelihood",
        limit: PositiveLimit | None = None,
        clustering: ClustersConfig | None = None,
    ) -> None:
        """Judge with the memory `[N, D]` as node features.

        Args:
            mu: what the likelihood of a pair must exceed, or the agreement of its ends, as `decide` says.
            limit: how many positives an image has at most.
            clustering: finds the clusters within which images may agree by less.
            is_live: search the batch's lists, and those of its neighbors, anew for each batch (Alg. 1);
                otherwise all lists are searched here, once.
        """
        self.judge = judge
        self.memory = memory
        self.lists = lists
        self.mu = mu
        self.decide_by = decide
        self.limit = limit
        self.clustering = clustering
        self.is_live = is_live
        self.num_capped = 0 if is_live else lists.refresh().num_capped
        """Lists cut by `neighbors.k_max` in the search made here."""

    @property
    def similarities(self) -> SimilarityTable | None:
        """Give what the judge looks up, if anything; measured at the first label, so not on resuming behind them."""
        return self.lists.similarities if self.judge.needs_similarities else None

    def least_agreement(self) -> Callable[[Tensor], Tensor]:
        """Return who says by what the images `ids` `[B]` must agree with each of all, `[B or 1, N]`."""
        mu = self.memory.new_full((1, len(self.memory)), self.mu)
        if self.clustering is None or self.clustering.mu is None:
            return lambda ids: mu
        labels, less = cluster_images(self.lists.features, self.clustering), self.clustering.mu
        return lambda ids: mu.where(~is_same_cluster(labels, ids), less)

    def label(self, ids: Tensor) -> Labels:
        """Label the images `ids` `[B]`."""
        return self.begin(ids)()

    def begin(self, ids: Tensor) -> Callable[[], Labels]:
        """Start on the images `ids` `[B]`, and return what ends it; an accelerator is waited for at the end alone."""
        if self.is_live:
            return partial(self.label_around, self.lists.search_batch(ids))
        return lambda: self.judge_lists(Candidates.listed(ids, self.lists.ids[ids]))

    def label_around(self, batch: BatchSearch) -> Labels:
        """Label a batch in lists that are searched anew (Alg. 1)."""
        near, num_candidates, num_capped = self.lists.refresh_around(batch)
        return self.judge_lists(Candidates.listed(batch.rows, near, count=num_candidates), num_capped=num_capped)

    def judge_lists(self, candidates: Candidates, *, num_capped: int = 0) -> Labels:
        """Build the graphs of the candidates, judge and decide."""
        likelihoods, overlaps = self.judge.predict(
            self.memory, self.lists.ids, candidates.pairs, similarities=self.similarities
        )
        return self.decide(candidates, likelihoods, overlaps, num_capped=num_capped)

    def decide(self, candidates: Candidates, likelihoods: Tensor, overlaps: Tensor, *, num_capped: int = 0) -> Labels:
        """Apply Eq. 7 to the likelihoods `[P]` of candidates."""
        ids, near, places = candidates
        judged, shared = (values.new_zeros(near.shape).index_put_(places, values) for values in (likelihoods, overlaps))
        positives = pairs.accept(ids, near, judged, mu=self.mu, limit=self.limit)
        return Labels(positives, near, judged, shared, num_candidates=len(likelihoods), num_capped=num_capped)

    @torch.no_grad()
    def label_all(self, chunks: list[Tensor], build: SubgraphBuilder) -> Iterator[Labels]:
        """Label chunk after chunk of images, with subgraphs from whoever builds them."""
        candidates = [Candidates.listed(ids, self.lists.ids[ids]) for ids in chunks]
        pair_ids = [chunk.pairs for chunk in candidates]
        stream = build(torch.cat(pair_ids), self.lists.ids, [*map(len, pair_ids)])
        for chunk, subgraphs in zip(candidates, stream, strict=True):
            logits = self.judge(self.memory, subgraphs, similarities=self.similarities)
            yield self.decide(chunk, logits.sigmoid(), overlap(subgraphs))


@dataclass(frozen=True)
class RuleLabeller:
    """Label by one of the rules of Tables 1 and 2."""

    name: Labeller
    features: Tensor
    """`[N, D]`, what similarities are taken of."""
    config: PairsConfig
    pids: Tensor | None
    """`[N]`, for `supervised` alone."""
    meta: MetaSet
    clusters: ClusterMemory | None = None
    """For `dbscan`; None where no clusters were found."""
    limit: PositiveLimit | None = None
    """For `reciprocal` alone."""

    def begin(self, ids: Tensor) -> Callable[[], Labels]:
        """Return what labels the images `ids` `[B]`."""
        return partial(self.label, ids)

    def label(self, ids: Tensor) -> Labels:
        """Label the images `ids` `[B]`."""
        if self.clusters is not None:
            return Labels(cluster_members(self.clusters.labels, ids))
        if self.name == "reciprocal":
            return Labels(self.reciprocal[ids])
        if self.name in ("single", "dbscan"):
            return Labels(ids[:, None])
        mask = self.mask(ids)
        if self.config.relabel_meta:
            mask = pairs.relabel(mask, ids, self.meta)
        return Labels(pairs.mask_to_ids(mask))

    @cached_property
    def reciprocal(self) -> Tensor:
        """Return P of all images under `reciprocal`, `[N, W]`."""
        return pairs.reciprocal(self.features, above=self.config.reciprocal, limit=self.limit)

    def mask(self, ids: Tensor) -> Tensor:
        """Return the rule's boolean `[B, N]`."""
        if self.name == "supervised":
            assert self.pids is not None
            return pairs.supervised(self.pids, ids)
        if self.name == "knn":
            return pairs.knn(self.features, ids, k=self.config.knn_k)
        if self.name == "ss":
            return pairs.ss(self.features, ids, similarity=self.config.ss_similarity)
        return pairs.mplp(self.features, ids, t=self.config.mplp_t)


def choose_labeller(
    name: Labeller,
    config: Config,
    lists: NeighborLists,
    *,
    gcn: PairGCN,
    memory: Tensor,
    pids: Tensor | None,
    meta: MetaSet,
    clusters: ClusterMemory | None = None,
    limit: PositiveLimit | None = None,
) -> CandidateLabeller | RuleLabeller:
    """Give the labeller of this name; those that judge candidates search all lists at once, or else live (Alg. 1)."""
    rule = config.pairs
    if name not in ("gcn", "jaccard"):
        return RuleLabeller(name, lists.features, rule, pids, meta, clusters, limit)
    judge, mu = (gcn, rule.mu) if name == "gcn" else (ListOverlap(), rule.jaccard)
    return CandidateLabeller(
        judge,
        memory,
        lists,
        mu=mu,
        is_live=config.searches_live,
        decide=rule.decide,
        limit=limit,
        clustering=config.clusters,
    )


def label_all(
    labeller: CandidateLabeller | RuleLabeller, everyone: Tensor, *, build: SubgraphBuilder, workers: WorkerGroup
) -> Iterator[tuple[Tensor, Labels]]:
    """Label all images, ids `[N]` in order, from one state of the memory; each worker judges its share of each chunk.

    The subgraphs are those of `build`.
    """
    chunks = everyone.split(LABEL_CHUNK)
    shards = [workers.shard(len(ids)) for ids in chunks]
    own = [ids[shard.own] for ids, shard in zip(chunks, shards, strict=True)]
    parts = labeller.label_all(own, build) if isinstance(labeller, CandidateLabeller) else map(labeller.label, own)
    labels = (gather_labels(part, shard.counts, workers) for part, shard in zip(parts, shards, strict=True))
    if isinstance(labeller, CandidateLabeller) and labeller.decide_by == "agreement":
        return zip(chunks, agree(labels, labeller.least_agreement(), limit=labeller.limit), strict=True)
    return zip(chunks, labels, strict=True)


def agree(
    labels: Iterable[Labels], least: Callable[[Tensor], Tensor], *, limit: PositiveLimit | None = None
) -> Iterator[Labels]:
    """Label all images anew, given the labels of all in order: positive are those who agree by more than `least`."""
    labels = list(labels)
    candidates = torch.cat([part.candidates for part in labels if part.candidates is not None])
    likelihoods = torch.cat([part.likelihoods for part in labels if part.likelihoods is not None])
    graph = likelihood_graph(candidates, likelihoods)
    everyone = torch.arange(len(candidates), device=candidates.device)
    for part, ids, near in zip(labels, everyone.split(LABEL_CHUNK), candidates.split(LABEL_CHUNK), strict=True):
        scores = agreements(graph, ids)
        yield replace(
            part,
            positives=pairs.accept_all(ids, scores, mu=least(ids), limit=limit),
            agreements=scores.gather(1, near.clamp(min=0)).masked_fill(near == PADDING, 0),
        )


def gather_labels(labels: Labels, counts: list[int], workers: WorkerGroup) -> Labels:
    """Put the labels of all workers' images one behind the other, in two messages: how wide they are, and they."""
    if workers.size == 1:
        return labels
    fills = {"positives": PADDING, "candidates": PADDING, "likelihoods": 0, "overlaps": 0}
    own = {name: part for name in fills if (part := getattr(labels, name)) is not None}
    counts_own = [labels.num_candidates, labels.num_capped]
    sizes = torch.tensor([[*(part.shape[1] for part in own.values()), *counts_own]], device=workers.device)
    sizes = workers.gather(sizes, [1] * workers.size)
    widths, (num_candidates, num_capped) = sizes[:, :-2].amax(0).tolist(), sizes[:, -2:].sum(0).tolist()
    padded = [
        F.pad(part, (0, width - part.shape[1]), value=fills[name])
        for (name, part), width in zip(own.items(), widths, strict=True)
    ]
    # float64 holds ids up to 2^53 and likelihoods alike, to the bit
    everyones = workers.gather(torch.cat([part.double() for part in padded], dim=1), counts).split(widths, dim=1)
    tables = {name: part.to(own[name].dtype) for name, part in zip(own, everyones, strict=True)}
    return Labels(**tables, num_candidates=num_candidates, num_capped=num_capped)
