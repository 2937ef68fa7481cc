"""P_i by a judge of candidate pairs."""

from __future__ import annotations

import torch

from mprd.config.schema import Config, NeighborsConfig, PairsConfig
from mprd.gcn.network import PairGCN
from mprd.neighbors.exact import NeighborTable
from mprd.neighbors.lists import FrozenLists
from mprd.pairs.labellers import CandidateLabeller, ListOverlap, RuleLabeller, choose_labeller, label_by_similarity
from mprd.pairs.positives import MetaSet, PositiveLimit
from mprd.subgraphs import build_serially
from tests.graphs import groups

NEAR = [[1, 2, 3], [0, 2, 4], [0, 1, 3], [4, 5, 0], [3, 5, 1], [3, 4, 2]]
"""Lists of 0 and 1 share 2 out of 2, 3, 4; those of 0 and 3 nothing out of 1, 2, 4, 5."""


def lists_by_hand() -> FrozenLists:
    table = NeighborTable(torch.tensor(NEAR), torch.full((6,), 3), torch.zeros(6, dtype=torch.bool))
    return FrozenLists(torch.eye(6), None, NeighborsConfig(k=3, k_max=3), search_all=lambda *_, **__: table)


def by_hand(i: int, *, above: float) -> set[int]:
    """Take the candidates whose lists overlap by more than so much, and the image itself."""
    taken = {i}
    for j in NEAR[i]:
        a, b = set(NEAR[i]) - {j}, set(NEAR[j]) - {i}
        if len(a & b) / len(a | b) > above:
            taken.add(j)
    return taken


def overlap_labeller(mu: float) -> CandidateLabeller:
    return CandidateLabeller(ListOverlap(), lists_by_hand(), mu=mu)


def test_candidates_whose_lists_overlap_enough_are_positives() -> None:
    for mu in (0.0, 0.3, 0.5):
        labels = overlap_labeller(mu).label(torch.arange(6))
        for i, row in enumerate(labels.positives.tolist()):
            assert set(row) - {-1} == by_hand(i, above=mu)
    assert by_hand(0, above=0.3) == {0, 1, 2}


def test_labels_are_the_same_from_graphs_that_somebody_else_built() -> None:
    ids = torch.arange(6)
    whole = overlap_labeller(0.3).label(ids)
    parts = list(overlap_labeller(0.3).label_chunks(list(ids.split(4)), build_serially))
    assert torch.equal(torch.cat([part.positives for part in parts]), whole.positives)
    torch.testing.assert_close(torch.cat([part.likelihoods for part in parts]), whole.likelihoods)
    torch.testing.assert_close(torch.cat([part.overlaps for part in parts]), whole.overlaps)
    assert torch.equal(whole.likelihoods, whole.overlaps)


def test_the_gcn_is_told_apart_from_the_overlap_that_is_kept_beside_it() -> None:
    gcn = PairGCN(6, hidden=4, mlp_hidden=4, generator=torch.Generator().manual_seed(0))
    labeller = CandidateLabeller(gcn, lists_by_hand(), mu=0.5)
    labels = labeller.label(torch.arange(2))
    assert labels.likelihoods is not None
    assert labels.overlaps is not None
    pairs = torch.tensor([[0, 1], [0, 2], [0, 3], [1, 0], [1, 2], [1, 4]])
    expected, _ = gcn.predict(torch.eye(6), torch.tensor(NEAR), pairs)
    torch.testing.assert_close(labels.likelihoods.flatten(), expected)
    assert labels.overlaps.tolist()[0] == labels_overlap(0)


def labels_overlap(i: int) -> list[float]:
    sets = [(set(NEAR[i]) - {j}, set(NEAR[j]) - {i}) for j in NEAR[i]]
    return [torch.tensor(len(a & b) / len(a | b)).item() for a, b in sets]


def test_every_name_has_its_labeller() -> None:
    rest = {"gcn": PairGCN(6), "pids": torch.arange(6)}
    rest["meta"] = MetaSet.empty()
    config = Config(pairs=PairsConfig(labeller="list_overlap", mu=0.6, threshold=0.2))
    gcn, shared, knn = (
        choose_labeller(name, config, lists_by_hand(), **rest) for name in ("gcn", "list_overlap", "knn")
    )
    assert isinstance(gcn, CandidateLabeller)
    assert isinstance(shared, CandidateLabeller)
    assert isinstance(knn, RuleLabeller)
    assert (gcn.mu, shared.mu) == (0.6, 0.2)
    assert isinstance(shared.scorer, ListOverlap)


def test_similarities_above_a_threshold_are_positives_and_the_limit_refuses_some() -> None:
    camids = torch.zeros(24, dtype=torch.long)
    lists = FrozenLists(groups(3, 8, spread=0.4), camids, NeighborsConfig(k=3, metric="camera"))
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
