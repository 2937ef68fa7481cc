"""Agreement of likelihoods, against loops over dictionaries; and P drawn from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mprd.config.loading import load_config
from mprd.config.schema import ClustersConfig, Config, NeighborsConfig
from mprd.data.datasets import load_dataset
from mprd.engine.callbacks import Callbacks
from mprd.engine.trainer import Trainer, fit
from mprd.errors import UserError
from mprd.evaluate.epoch_metrics import epoch_row
from mprd.neighbors.exact import PADDING
from mprd.neighbors.lists import FrozenLists
from mprd.pairs import clusters
from mprd.pairs.agreement import POWER, agreements, likelihood_graph
from mprd.pairs.labellers import CandidateLabeller, Labels, ListOverlap, agree

Table = tuple[Tensor, Tensor]


def random_table(num_images: int = 600, width: int = 7) -> Table:
    """Draw lists of unequal length, no image in its own; likelihoods differ one way and the other."""
    draw = torch.Generator().manual_seed(0)
    steps = torch.rand(num_images, 20, generator=draw).argsort(1)[:, :width] + 1
    candidates = (torch.arange(num_images)[:, None] + steps) % num_images
    lengths = torch.randint(0, width + 1, (num_images, 1), generator=draw)
    likelihoods = torch.rand(num_images, width, generator=draw)
    return candidates.masked_fill(torch.arange(width) >= lengths, PADDING), likelihoods


def rows_by_hand(candidates: Tensor, likelihoods: Tensor) -> list[dict[int, float]]:
    rows: list[dict[int, float]] = [{i: 1.0} for i in range(len(candidates))]
    for i, (near, said) in enumerate(zip(candidates.tolist(), likelihoods.tolist(), strict=True)):
        for j, g in zip(near, said, strict=True):
            if j != PADDING:
                rows[i][j] = rows[j][i] = max(g**3, rows[i].get(j, 0.0))
    return rows


def cosine_by_hand(a: dict[int, float], b: dict[int, float]) -> float:
    lengths = [math.sqrt(sum(value**2 for value in row.values())) for row in (a, b)]
    return sum(value * b.get(image, 0.0) for image, value in a.items()) / lengths[0] / lengths[1]


def test_agreement_is_the_cosine_of_two_images_likelihoods() -> None:
    candidates, likelihoods = random_table(40)
    rows = rows_by_hand(candidates, likelihoods)
    ids = torch.tensor([7, 0, 39, 7])
    found = agreements(likelihood_graph(candidates, likelihoods), ids)
    expected = [[cosine_by_hand(rows[i], rows[j]) for j in range(40)] for i in ids.tolist()]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert POWER == 3


def test_an_image_without_candidates_agrees_with_itself_alone() -> None:
    candidates = torch.tensor([[1, PADDING], [0, PADDING], [PADDING, PADDING]])
    graph = likelihood_graph(candidates, torch.full((3, 2), 0.9))
    assert agreements(graph, torch.tensor([2])).tolist() == [[0.0, 0.0, 1.0]]


def test_a_common_mate_makes_positives_of_images_that_are_no_candidates_of_each_other() -> None:
    # 0 and 2 know 1 alone; 3 is somebody else's look-alike
    candidates = torch.tensor([[1, PADDING], [0, 2], [1, 3], [2, PADDING]])
    likelihoods = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.3], [0.3, 0.0]])
    labels = Labels(torch.arange(4)[:, None], candidates, likelihoods, likelihoods)
    (found,) = agree([labels], lambda ids: torch.tensor(0.45))
    assert [set(row) - {PADDING} for row in found.positives.tolist()] == [{0, 1, 2}, {0, 1, 2}, {0, 1, 2}, {3}]
    assert found.agreements is not None
    assert found.agreements[0].tolist() == pytest.approx([2 / math.sqrt(6), 0], rel=1e-3)
    assert found.likelihoods is likelihoods


def test_labels_of_many_chunks_are_those_of_all_rows() -> None:
    candidates, likelihoods = random_table()
    parts = [
        Labels(ids[:, None], candidates[ids], likelihoods[ids], likelihoods[ids])
        for ids in torch.arange(600).split(256)
    ]
    rows = rows_by_hand(candidates, likelihoods)
    labels = agree(parts, lambda ids: torch.tensor(0.4))
    found = [set(row) - {PADDING} for part in labels for row in part.positives.tolist()]
    for i in (0, 255, 256, 599):
        assert found[i] == {j for j in range(600) if j == i or cosine_by_hand(rows[i], rows[j]) > 0.4}
    assert max(map(len, found)) > 1


def test_images_of_one_cluster_are_positives_at_a_lower_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clusters, "K1", 5)
    monkeypatch.setattr(clusters, "K2", 2)
    # two groups of six around one direction each, and agreements that come from likelihoods alone
    features = F.normalize(torch.eye(2).repeat_interleave(6, 0) + 0.05 * torch.arange(24).view(12, 2) / 24)
    lists = FrozenLists(features, None, NeighborsConfig(k=2))
    rule = ClustersConfig(mu=0.3, eps=0.5)
    labeller = CandidateLabeller(ListOverlap(), lists, mu=0.6, decide="agreement", clustering=rule)
    least = labeller.thresholds()(torch.tensor([0, 7]))
    torch.testing.assert_close(least, torch.tensor([[0.3] * 6 + [0.6] * 6, [0.6] * 6 + [0.3] * 6]))
    without = CandidateLabeller(ListOverlap(), lists, mu=0.6, clustering=ClustersConfig())
    torch.testing.assert_close(without.thresholds()(torch.tensor([0])), torch.full((1, 12), 0.6))


def test_each_pair_has_the_threshold_that_is_asked_of_it() -> None:
    candidates = torch.tensor([[1, PADDING], [0, 2], [1, PADDING]])
    likelihoods = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.0]])
    labels = Labels(torch.arange(3)[:, None], candidates, likelihoods, likelihoods)
    # the rows are (1, 1, 0), (1, 1, 1) and (0, 1, 1): 0 and 2 agree by 1/2, both with 1 by 2/sqrt(6) = 0.816
    asked = torch.tensor([[0.9, 0.8, 0.6], [0.8, 0.9, 0.85], [0.4, 0.85, 0.9]])
    (found,) = agree([labels], lambda ids: asked[ids])
    assert [set(row) - {PADDING} for row in found.positives.tolist()] == [{0, 1}, {0, 1}, {0, 2}]


def test_clusters_have_a_say_in_agreement_alone() -> None:
    assert load_config("demo", overrides=("clusters.mu=0.2",)).clusters.mu == 0.2
    for setting in ("pairs.decide=likelihood", "pairs.labeller=mplp"):
        with pytest.raises(UserError, match=r"clusters\.mu needs"):
            load_config("demo", overrides=("clusters.mu=0.2", setting))
    with pytest.raises(UserError, match=r"clusters\.mu must not exceed pairs\.mu = 0\.35, but got 0\.4"):
        load_config("demo", overrides=("clusters.mu=0.4",))


def test_a_run_labels_by_agreement_and_says_what_it_is_worth(tiny_config: Config, tmp_path: Path) -> None:
    settings = tiny_config.model_dump()
    settings["pairs"] |= {"decide": "agreement", "mu": 0.3}
    # with k-reciprocal similarities, or without the cameras, so few images are told apart without a mistake
    settings["gcn"] |= {"variant": "structure"}
    settings["neighbors"] |= {"standardise": False, "source": "memory"}
    settings["eval"] |= {"every": 2}
    config = Config.model_validate(settings)
    rows = []
    dataset = load_dataset(config.data)
    callbacks = Callbacks(after_epoch=lambda trainer: rows.append(epoch_row(trainer)))
    trainer = Trainer(config, dataset, device=torch.device("cpu"), callbacks=callbacks)
    trainer.fill_memory()
    state = fit(trainer)
    assert rows[-1]["agreement_auc"] != rows[-1]["gcn_auc"]
    assert 0 <= rows[-1]["agreement_auc"] <= 1
    assert rows[-1]["reciprocal_auc"] not in (None, rows[-1]["jaccard_auc"])
    assert "reciprocal_auc" not in rows[0], "no evaluation was due"
    assert int(state.positives.counts().max()) > 1


def test_agreement_labels_all_images_at_once_and_a_rule_still_batch_by_batch() -> None:
    by_agreement = ("pairs.decide=agreement", "neighbors.source=memory")
    assert load_config("demo", overrides=by_agreement).pairs.is_once_an_epoch
    with pytest.raises(UserError, match=r"pairs\.decide: agreement labels all images at once, so pairs\.refresh"):
        load_config("demo", overrides=(*by_agreement, "pairs.refresh=batch"))
    rule = load_config("demo", overrides=("pairs.decide=agreement", "pairs.labeller=mplp"))
    assert not rule.pairs.is_once_an_epoch


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_finds_the_agreements_of_a_cpu() -> None:
    candidates, likelihoods = random_table()
    ids = torch.arange(0, 600, 7)
    here = agreements(likelihood_graph(candidates, likelihoods), ids)
    there = agreements(likelihood_graph(candidates.cuda(), likelihoods.cuda()), ids.cuda())
    torch.testing.assert_close(there.cpu(), here)
