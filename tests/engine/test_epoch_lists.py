"""The lists of an epoch: what they are drawn from, when, and which scores follow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.engine.callbacks import Callbacks
from mprd.engine.trainer import Trainer, fit
from mprd.evaluate.epoch_metrics import epoch_row
from mprd.neighbors.exact import find_neighbors
from mprd.pairs import clusters as clusters_module
from tests.conftest import NAMELESS, NUM_IDS, TINY

from .loop import CPU, WHITENING, changed, open_data, train


@pytest.mark.parametrize("source", ["mean", "memory"])
def test_lists_are_searched_once_an_epoch(
    source: str, tiny_config: Config, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[Tensor] = []

    def search(features: Tensor, **rule: Any) -> Any:
        if "queries" not in rule:
            searched.append(features)
        return find_neighbors(features, **rule)

    epochwise = ("pairs.refresh=epoch", f"neighbors.source={source}")
    config = changed(tiny_config, tiny_root, *epochwise)
    # 3 epochs, each with a GCN phase and a labelling pass
    monkeypatch.setattr("mprd.neighbors.lists.find_neighbors", search)
    train(config)
    assert len(searched) == 3


def test_lists_are_drawn_from_the_mean_of_memory_and_clean_features(tiny_config: Config, tiny_root: Path) -> None:
    config = changed(tiny_config, tiny_root, "train.epochs=2")
    seen: list[tuple[Tensor, Tensor, Tensor]] = []

    def look(trainer: Trainer, _num_steps: int) -> None:
        state = trainer.state
        # in the GCN's epoch neither network nor memory has moved since the lists were drawn
        if state.phase == "gcn" and state.step == 1 and state.epoch == 1:
            clean = trainer.extract(trainer.plain_images)
            seen.append((clean, state.memory.features.clone(), trainer.frozen_lists().source.clone()))

    trainer = Trainer(config, open_data(config), device=CPU, callbacks=Callbacks(after_step=look))
    trainer.fill_memory()
    fit(trainer)
    (clean, memory, drawn) = seen[0]
    assert not torch.allclose(clean, memory, atol=0.01)
    for i in range(len(drawn)):
        mean = (clean[i] + memory[i]) / 2
        torch.testing.assert_close(drawn[i], mean / mean.norm(), atol=1e-6, rtol=0)


def test_images_without_cameras_are_whitened(nameless_root: Path) -> None:
    overrides = (*TINY, *NAMELESS, *WHITENING, "train.epochs=1")
    config = load_config("demo", overrides=overrides, values={"data": {"root": nameless_root}})
    similarity = train(config).state.similarity
    assert similarity is not None
    assert similarity.whitening is not None


def test_scores_of_candidates_are_of_the_features_that_lists_were_drawn_from(
    tiny_config: Config, tiny_root: Path
) -> None:
    """Under `source: memory` the memory has moved on when the epoch is evaluated; whitened features are not it."""
    settings = ("neighbors.source=memory", "pairs.refresh=epoch", "train.epochs=1", "neighbors.k=6")
    start: list[Tensor] = []

    def look(trainer: Trainer) -> None:
        assert trainer.state.similarity is not None
        features = trainer.state.similarity(start[0])
        lists = trainer.frozen_lists()
        torch.testing.assert_close(lists.features, features)
        assert not torch.allclose(lists.source, trainer.state.memory.features, atol=0.01)
        first, second, _, cosines = torch.cat(trainer.stats.candidates)[:, :4].T
        expected = (features[first.long()] * features[second.long()]).sum(1)
        torch.testing.assert_close(cosines.float(), expected)
        assert epoch_row(trainer)["reciprocal_auc"] is not None

    config = changed(tiny_config, tiny_root, *settings)
    trainer = Trainer(config, open_data(config), device=CPU, callbacks=Callbacks(after_epoch=look))
    trainer.fill_memory()
    start.append(trainer.state.memory.features.clone())
    fit(trainer)


def test_the_pairs_of_labeled_images_count_in_no_score_from_either_side(tiny_config: Config, tiny_root: Path) -> None:
    rows = []

    def look(trainer: Trainer) -> None:
        meta = trainer.state.meta.ids
        pairs = torch.cat(trainer.stats.candidates)[:, :2].long()
        kept = ~(torch.isin(pairs[:, 0], meta) | torch.isin(pairs[:, 1], meta))
        is_true = trainer.pids[pairs[:, 0]] == trainer.pids[pairs[:, 1]]
        rows.append((epoch_row(trainer)["candidate_precision"], float(is_true[kept].float().mean())))

    train(changed(tiny_config, tiny_root, "train.epochs=1"), callbacks=Callbacks(after_epoch=look))
    assert rows[0][0] == pytest.approx(rows[0][1])


def test_cluster_contrast_labels_and_remembers_all_images_of_one_state(
    tiny_config: Config, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the last four images are outliers, which no batch holds: their rows would stay those of the start
    labels = torch.arange(4 * NUM_IDS) // 4
    labels[-4:] = -1
    monkeypatch.setattr(clusters_module, "cluster_images", lambda *_, **__: labels)
    config = changed(tiny_config, tiny_root, "pairs.labeller=dbscan", "train.epochs=2")
    clean: list[Tensor] = []

    class Watched(Trainer):
        def find_clusters(self) -> Any:
            clean.append(self.extract(self.plain_images))
            return super().find_clusters()

    trainer = Watched(config, open_data(config), device=CPU)
    trainer.fill_memory()
    fit(trainer)
    torch.testing.assert_close(trainer.state.memory.features[-4:], clean[-1][-4:], atol=1e-6, rtol=0)
    assert not torch.allclose(clean[0], clean[1], atol=0.01)
    assert trainer.state.positives.counts().tolist() == [4] * 20 + [1] * 4
