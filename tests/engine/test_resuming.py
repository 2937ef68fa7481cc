"""A run that was stopped anywhere ends in the bits of one that was not."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.engine.callbacks import Callbacks
from mprd.engine.trainer import Trainer, fit
from mprd.errors import Interrupted, NonFiniteLoss, UserError
from mprd.evaluate.epoch_metrics import epoch_row
from mprd.neighbors.lists import mean_features
from mprd.neighbors.similarity import fit_similarity
from mprd.pairs import clusters as clusters_module
from mprd.runtime import checkpoint
from tests.conftest import NUM_IDS, TINY

from .loop import CPU, LIVE, WHITENING, assert_same_state, changed, open_data, stop_after, train

SETTINGS = (
    (),
    LIVE,
    # labels of the memory as it was before the epoch
    ("neighbors.source=memory", "pairs.refresh=epoch", "backbone.camera_bn=false"),
)


@pytest.fixture(scope="module", params=SETTINGS, ids=["default", "live", "epoch"])
def whole(request: pytest.FixtureRequest, tiny_root: Path) -> Trainer:
    """Train without a stop, once for each of the settings."""
    return train(load_config("demo", overrides=(*TINY, *request.param), values={"data": {"root": tiny_root}}))


# 24 images: an epoch is 3 GCN steps and 3 CNN steps; the first, the last, both phases, both ends of an epoch
@pytest.mark.parametrize("num_steps", [1, 3, 4, 6, 8, 11, 14, 18])
def test_resuming_at_any_step_ends_in_the_same_bits(num_steps: int, whole: Trainer, tmp_path: Path) -> None:
    config, path = whole.config, tmp_path / "last.pt"
    with pytest.raises(Interrupted):
        train(config, callbacks=stop_after(num_steps, path))
    resumed = Trainer(config, open_data(config), device=CPU)
    resumed.load_state_dict(checkpoint.load(path), path=path)
    fit(resumed)
    assert_same_state(whole, resumed)


def test_cluster_contrast_resumes_within_an_epoch(
    tiny_config: Config, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"K1": 7, "K2": 2, "MIN_SAMPLES": 3}.items():
        monkeypatch.setattr(clusters_module, name, value)
    small = ("pairs.labeller=dbscan", "clusters.eps=0.8")
    config, path = changed(tiny_config, tiny_root, *small), tmp_path / "last.pt"
    clusters: list[Any] = []
    whole = train(config, callbacks=Callbacks(after_epoch=lambda trainer: clusters.append(trainer.state.clusters)))
    assert all(found is not None for found in clusters)
    with pytest.raises(Interrupted):
        train(config, callbacks=stop_after(2, path))
    resumed = Trainer(config, open_data(config), device=CPU)
    resumed.load_state_dict(checkpoint.load(path), path=path)
    assert resumed.state.step == 2
    fit(resumed)
    assert_same_state(whole, resumed)


def test_a_whitened_run_resumes_in_the_same_bits_and_ends_with_a_whitening_of_its_network(
    tiny_config: Config, tiny_root: Path, tmp_path: Path
) -> None:
    config, path = changed(tiny_config, tiny_root, *WHITENING, "train.epochs=2"), tmp_path / "last.pt"
    rows: list[dict[str, Any]] = []
    reports: list[dict[str, float | None]] = []
    last: list[Any] = []

    def after_epoch(trainer: Trainer) -> None:
        assert trainer.state.similarity is not None
        reports.append(trainer.state.similarity.report)
        last.append(trainer.state.similarity.whitening)
        rows.append(epoch_row(trainer))

    whole = train(config, callbacks=Callbacks(after_epoch=after_epoch))
    # a row tells of the whitening that the epoch's lists were drawn by, and of the features whitened by the next one
    assert [row["surest_similarity"] for row in rows] == [report["surest_similarity"] for report in reports]
    assert all(0 < row["mAP_whitened"] <= 1 for row in rows)
    similarity = whole.state.similarity
    assert similarity is not None
    drawn = mean_features(whole.state.memory.features, whole.extract(whole.plain_images))
    # pairs are found in features whitened as in the epoch before
    again = fit_similarity(drawn, whole.camids, config.neighbors, last=last[-1])
    assert torch.equal(similarity(drawn), again(drawn))
    with pytest.raises(Interrupted):
        train(config, callbacks=dataclasses.replace(stop_after(4, path), after_epoch=epoch_row))
    resumed = Trainer(config, open_data(config), device=CPU, callbacks=Callbacks(after_epoch=epoch_row))
    resumed.load_state_dict(checkpoint.load(path), path=path)
    fit(resumed)
    assert_same_state(whole, resumed)


def test_seconds_of_an_epoch_are_all_there_after_a_resumption(
    tiny_config: Config, tiny_root: Path, tmp_path: Path
) -> None:
    config, path = changed(tiny_config, tiny_root, "train.epochs=1", "pairs.labeller=single"), tmp_path / "last.pt"
    with pytest.raises(Interrupted):
        train(config, callbacks=stop_after(2, path))
    saved = checkpoint.load(path)["stats"]["sums"]
    assert saved["cnn_seconds"] > 0
    resumed = Trainer(config, open_data(config), device=CPU)
    resumed.load_state_dict(checkpoint.load(path), path=path)
    resumed.train_cnn_epoch()
    assert resumed.stats.sums["cnn_seconds"] > saved["cnn_seconds"]
    assert resumed.stats.sums["images"] == 4 * NUM_IDS


def test_a_checkpoint_of_another_architecture_is_refused(tiny_config: Config, tiny_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(train(changed(tiny_config, tiny_root, "train.epochs=1")).state_dict(), path)
    other = changed(tiny_config, tiny_root, "backbone.name=resnet18")
    trainer = Trainer(other, open_data(other), device=CPU)
    with pytest.raises(UserError, match=r"last\.pt: the backbone of the checkpoint is of another architecture"):
        trainer.load_state_dict(checkpoint.load(path), path=path)


def test_another_optimizer_is_refused(tiny_config: Config, tiny_root: Path, tmp_path: Path) -> None:
    saved = train(changed(tiny_config, tiny_root, "train.epochs=1")).state_dict()
    other = changed(tiny_config, tiny_root, "train.optimizer=adamw")
    trainer = Trainer(other, open_data(other), device=CPU)
    with pytest.raises(UserError, match=r"last\.pt: made with another train\.optimizer than config\.yaml says"):
        trainer.load_state_dict(saved, path=tmp_path / "last.pt")


def test_weights_that_the_last_step_has_broken_end_the_run_before_it_is_evaluated(tiny_config: Config) -> None:
    def break_weights(trainer: Trainer, num_steps: int) -> None:
        if trainer.state.phase == "cnn" and trainer.state.step == num_steps:
            trainer.state.backbone.neck.weight.data.fill_(float("inf"))

    with pytest.raises(NonFiniteLoss, match=r"the CNN loss is no longer finite in epoch 0, step 4; .* learning rate"):
        train(tiny_config, callbacks=Callbacks(after_step=break_weights))


def test_a_loss_found_broken_late_is_never_saved(tiny_config: Config) -> None:
    trainer = Trainer(tiny_config, open_data(tiny_config), device=CPU)
    trainer.state_dict()
    trainer.stats.pending = {"cnn_loss": torch.tensor(float("inf")), "images": torch.tensor(8.0)}
    with pytest.raises(NonFiniteLoss, match="the CNN loss is not finite in epoch 0"):
        trainer.state_dict()
