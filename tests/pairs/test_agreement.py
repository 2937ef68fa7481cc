"""Agreement of likelihoods, against loops over dictionaries; and P drawn from it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.data.datasets import load_dataset
from mprd.engine.callbacks import Callbacks
from mprd.engine.trainer import Trainer, fit
from mprd.errors import UserError
from mprd.evaluate.epoch_metrics import epoch_row
from mprd.neighbors.exact import PADDING
from mprd.pairs.agreement import Agreements, likelihood_graph
from mprd.pairs.labellers import Labels, agree

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
    graph = likelihood_graph(candidates, likelihoods)
    expected = torch.tensor([[cosine_by_hand(rows[i], rows[j]) for j in range(40)] for i in range(7, 31)])
    found = Agreements.of_block(graph, graph.T.tocsr(), slice(7, 31))
    torch.testing.assert_close(found.at(torch.arange(40).repeat(24, 1), 40), expected)
    assert found.at(torch.full((24, 2), PADDING), 40).tolist() == [[0, 0]] * 24
    # no pair without a common mate is held
    assert len(found.values) == int((expected > 0).sum())


def test_an_image_without_candidates_agrees_with_itself_alone() -> None:
    candidates = torch.tensor([[1, PADDING], [0, PADDING], [PADDING, PADDING]])
    graph = likelihood_graph(candidates, torch.full((3, 2), 0.9))
    found = Agreements.of_block(graph, graph.T.tocsr(), slice(2, 3))
    assert (found.rows.tolist(), found.ids.tolist(), found.values.tolist()) == ([0], [2], [1.0])


def test_a_common_mate_makes_positives_of_images_that_are_no_candidates_of_each_other() -> None:
    # 0 and 2 know 1 alone; 3 is somebody else's look-alike
    candidates = torch.tensor([[1, PADDING], [0, 2], [1, 3], [2, PADDING]])
    likelihoods = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, 0.3], [0.3, 0.0]])
    labels = Labels(torch.arange(4)[:, None], candidates, likelihoods, likelihoods)
    (found,) = agree([labels], 0.45)
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
    labels = agree(parts, 0.4)
    found = [set(row) - {PADDING} for part in labels for row in part.positives.tolist()]
    for i in (0, 255, 256, 599):
        assert found[i] == {j for j in range(600) if j == i or cosine_by_hand(rows[i], rows[j]) > 0.4}
    assert max(map(len, found)) > 1


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
    assert rows[-1]["reciprocal_auc"] not in (None, rows[-1]["gcn_auc"])
    assert "reciprocal_auc" not in rows[0], "no evaluation was due"
    assert int(state.positives.counts().max()) > 1


def test_agreement_labels_all_images_at_once_and_a_rule_still_batch_by_batch() -> None:
    by_agreement = ("pairs.decide=agreement", "neighbors.source=memory")
    assert load_config("demo", overrides=by_agreement).pairs.is_once_an_epoch
    with pytest.raises(UserError, match=r"pairs\.decide: agreement labels all images at once, so pairs\.refresh"):
        load_config("demo", overrides=(*by_agreement, "pairs.refresh=batch"))
    rule = load_config("demo", overrides=("pairs.decide=agreement", "pairs.labeller=mplp"))
    assert not rule.pairs.is_once_an_epoch
