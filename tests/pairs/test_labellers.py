"""P_i by a judge of candidate pairs."""

from __future__ import annotations

import torch

from mprd.config.schema import Config, NeighborsConfig, PairsConfig
from mprd.gcn.network import PairGCN
from mprd.neighbors.exact import NeighborTable
from mprd.neighbors.lists import FrozenLists
from mprd.neighbors.similarity import Similarity
from mprd.pairs.labellers import CandidateLabeller, RuleLabeller, choose_labeller, label_by_similarity
from mprd.pairs.positives import MetaSet, PositiveLimit
from mprd.subgraphs import build_serially
from tests.graphs import groups

NEAR = [[1, 2, 3], [0, 2, 4], [0, 1, 3], [4, 5, 0], [3, 5, 1], [3, 4, 2]]
"""The candidates of each of six images."""


def lists_by_hand() -> FrozenLists:
    table = NeighborTable(torch.tensor(NEAR), torch.zeros(6, dtype=torch.bool))
    lists = FrozenLists(torch.eye(6), None, NeighborsConfig(k=3, k_max=3), similarity=Similarity())
    lists.found = table
    return lists


def gcn_labeller(mu: float) -> CandidateLabeller:
    gcn = PairGCN(6, hidden=4, mlp_hidden=4, generator=torch.Generator().manual_seed(0))
    return CandidateLabeller(gcn, lists_by_hand(), mu=mu)


def test_candidates_whose_likelihood_exceeds_mu_are_positives() -> None:
    everyone = torch.arange(6)
    pairs = torch.tensor([(i, j) for i, near in enumerate(NEAR) for j in near])
    likelihoods = gcn_labeller(0.5).gcn.predict(torch.eye(6), torch.tensor(NEAR), pairs).view(6, 3)
    # between the likelihoods, so that some candidates are positives and some are not
    mu = float(likelihoods.median()) + 1e-6
    labels = gcn_labeller(mu).label(everyone)
    assert labels.likelihoods is not None
    torch.testing.assert_close(labels.likelihoods, likelihoods)
    taken = [{i} | {j for j, g in zip(NEAR[i], likelihoods[i].tolist(), strict=True) if g > mu} for i in range(6)]
    assert [set(row) - {-1} for row in labels.positives.tolist()] == taken
    assert 6 < sum(map(len, taken)) < 6 + 18


def test_labels_are_the_same_from_graphs_that_somebody_else_built() -> None:
    ids = torch.arange(6)
    whole = gcn_labeller(0.5).label(ids)
    parts = list(gcn_labeller(0.5).label_chunks(list(ids.split(4)), build_serially))
    assert torch.equal(torch.cat([part.positives for part in parts]), whole.positives)
    torch.testing.assert_close(torch.cat([part.likelihoods for part in parts]), whole.likelihoods)


def test_every_name_has_its_labeller() -> None:
    rest = {"gcn": PairGCN(6), "pids": torch.arange(6)}
    rest["meta"] = MetaSet.empty()
    config = Config(pairs=PairsConfig(mu=0.6))
    gcn, knn = (choose_labeller(name, config, lists_by_hand(), **rest) for name in ("gcn", "knn"))
    assert isinstance(gcn, CandidateLabeller)
    assert isinstance(knn, RuleLabeller)
    assert gcn.mu == 0.6


def test_similarities_above_a_threshold_are_positives_and_the_limit_refuses_some() -> None:
    camids = torch.zeros(24, dtype=torch.long)
    lists = FrozenLists(groups(3, 8, spread=0.4), camids, NeighborsConfig(k=3), similarity=Similarity())
    everyone, table = torch.arange(24), lists.similarities
    above = table.between(everyone[:, None], everyone) > 0.4
    free = label_by_similarity(lists, above=0.4, limit=None).label(everyone)
    limited = label_by_similarity(lists, above=0.4, limit=PositiveLimit(camids, same=2, other=0)).label(everyone)
    assert free.refused is None
    assert limited.refused is not None
    assert int(above.sum(1).max()) > 4
    for i in everyone.tolist():
        near = above[i].nonzero().squeeze(1).tolist()
        best = sorted((j for j in near if j != i), key=lambda j: -float(table.between(everyone[i], everyone[j])))
        assert set(free.positives[i].tolist()) - {-1} == set(near)
        assert set(limited.positives[i].tolist()) - {-1} == {i, *best[:2]}
        assert set(limited.refused[i].tolist()) - {-1} == {*best[2:]}
