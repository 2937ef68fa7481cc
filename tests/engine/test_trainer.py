"""Algorithm 1: its order, its determinism, and what reaches what."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mprd import losses
from mprd.config.nested import look_up
from mprd.config.schema import Config
from mprd.data.datasets import ReidDataset
from mprd.data.images import TrainImages
from mprd.engine import schedules
from mprd.engine.callbacks import Callbacks
from mprd.engine.trainer import Trainer, fit
from mprd.errors import NonFiniteLoss, UserError
from mprd.evaluate.epoch_metrics import epoch_row

from .loop import CPU, LIVE, assert_same_state, changed, open_data, train

LABELLERS = ("gcn", "reciprocal", "knn", "ss", "mplp", "mlcr", "dbscan", "supervised", "single")


@pytest.mark.parametrize("labeller", LABELLERS)
def test_every_labeller_trains_and_reports(labeller: str, tiny_config: Config, tiny_root: Path) -> None:
    rows: list[dict[str, Any]] = []
    callbacks = Callbacks(after_epoch=lambda trainer: rows.append(epoch_row(trainer)))
    train(changed(tiny_config, tiny_root, f"pairs.labeller={labeller}"), callbacks=callbacks)
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    assert all(np.isfinite(row["cnn_loss"]) and 0 <= row["mAP"] <= 1 for row in rows)
    assert all((row["gcn_loss"] is None) == (labeller != "gcn") for row in rows)
    if labeller == "supervised":
        assert (rows[-1]["pair_precision"], rows[-1]["pair_recall"]) == (1.0, 1.0)
    if labeller == "single":
        assert (rows[-1]["positives"], rows[-1]["pair_recall"]) == (1.0, 0.0)
    if labeller == "knn":
        assert rows[-1]["positives"] == 9.0


@pytest.mark.parametrize(
    "overrides",
    [
        ("gcn.sources=meta",),
        ("gcn.sources=unlabelled", "meta.num_ids=0"),
        ("pairs.labeller=mlcr", "pairs.relabel_meta=true"),
        ("memory.update=before",),
        LIVE,
        ("neighbors.source=memory", "pairs.refresh=epoch"),
        ("neighbors.whitening=true",),
        ("train.optimizer=adamw", "train.lr_new=0.001", "backbone.camera_bn=false"),
        ("train.warmup_epochs=2",),
    ],
)
def test_every_variant_of_the_tables_trains(overrides: tuple[str, ...], tiny_config: Config, tiny_root: Path) -> None:
    config = changed(tiny_config, tiny_root, *overrides)
    names = [override.partition("=")[0] for override in overrides]
    assert [name for name in names if look_up(config, name) == look_up(tiny_config, name)] == []
    trainer = train(config)
    assert torch.isfinite(trainer.state.memory.features).all()
    norms = trainer.state.memory.features.norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


def test_without_camstyle_files_no_style_is_transferred(
    tiny_config: Config, tiny_root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="mprd")
    once = ("train.epochs=1",)
    plain = train(changed(tiny_config, tiny_root, *once))
    assert "CamStyle" not in caplog.text
    assert_same_state(plain, train(changed(tiny_config, tiny_root, *once, "data.camera_style=camstyle")))
    assert caplog.text.count("no CamStyle files, so no style is transferred (MPRD#)") == 1


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(tiny_config: Config, tiny_root: Path) -> None:
    first = train(tiny_config)
    torch.rand(7)  # the global generator is nobody's business
    assert_same_state(first, train(tiny_config))
    other = train(changed(tiny_config, tiny_root, "train.seed=1"))
    assert not torch.equal(first.state.memory.features, other.state.memory.features)


def test_loader_processes_do_not_change_the_result(tiny_config: Config, tiny_root: Path) -> None:
    assert_same_state(train(tiny_config), train(changed(tiny_config, tiny_root, "data.num_workers=2")))


def first_loss(config: Config, root: Path, *overrides: str) -> tuple[float, Trainer]:
    """Train for an epoch; return its CNN loss and the state it ends in."""
    found: list[Any] = []
    callbacks = Callbacks(after_epoch=lambda trainer: found.append(trainer.stats.mean("cnn_loss", "images")))
    trainer = train(changed(config, root, "train.epochs=1", *overrides), callbacks=callbacks)
    return found[0], trainer


def test_packed_images_give_the_bits_of_files_and_a_batch_at_once_nearly_so(
    tiny_config: Config, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # at the demo's rate three steps on six identities blow up whatever they are given, and labels may tip
    slow = ("train.lr_new=0.001", "pairs.labeller=supervised")
    loss, packed = first_loss(tiny_config, tiny_root, *slow)
    assert_same_state(packed, first_loss(tiny_config, tiny_root, *slow, "data.cache=none")[1])
    # as on an accelerator
    monkeypatch.setattr(TrainImages, "is_batched", lambda *_: True)
    other, _ = first_loss(tiny_config, tiny_root, *slow)
    assert other == pytest.approx(loss, rel=0.002)
    assert other != loss


def with_shuffled_pids(trainer: Trainer) -> ReidDataset:
    """Give every image outside Z a wrong identity, one that Z does not hold."""
    dataset = trainer.dataset
    assert dataset.train.pids is not None
    pids = dataset.train.pids.copy()
    outside = np.setdiff1d(np.arange(len(pids)), trainer.state.meta.ids.numpy())
    pids[outside] = np.random.default_rng(0).permutation(pids[outside])
    assert (pids != dataset.train.pids).any()
    return dataclasses.replace(dataset, train=dataclasses.replace(dataset.train, pids=pids))


def test_no_label_outside_z_reaches_training(tiny_config: Config) -> None:
    first = train(tiny_config)
    second = train(tiny_config, dataset=with_shuffled_pids(first))
    assert_same_state(first, second)


def test_labels_of_z_reach_the_gcn(tiny_config: Config, tiny_root: Path) -> None:
    first = train(tiny_config)
    second = train(changed(tiny_config, tiny_root, "meta.num_ids=0"))
    assert not torch.equal(first.state.gcn.theta_2, second.state.gcn.theta_2)


def test_labels_by_the_batch_and_by_the_epoch_agree_while_the_memory_stands_still(
    tiny_config: Config, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    still = "memory.update=before"
    with monkeypatch.context() as patch:
        patch.setattr(schedules, "GAMMA_START", 0.0)
        patch.setattr(schedules, "GAMMA_END", 0.0)
        by_batch = train(changed(tiny_config, tiny_root, still))
        by_epoch = train(changed(tiny_config, tiny_root, still, "pairs.refresh=epoch"))
    images = torch.arange(len(by_batch.dataset.train))
    assert torch.equal(by_batch.state.positives.mask(images), by_epoch.state.positives.mask(images))
    assert by_batch.state.positives.counts().max() > 1
    moving = train(changed(tiny_config, tiny_root, "pairs.refresh=epoch"))
    assert not torch.equal(moving.state.memory.features, by_epoch.state.memory.features)


def memory_at_first_loss(order: str, config: Config, root: Path, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """Return what the loss of the first CNN step is taken against."""
    seen: list[Tensor] = []
    trainer = Trainer(changed(config, root, f"memory.update={order}"), open_data(config), device=CPU)
    plain = losses.binomial_deviance

    def watched(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(trainer.state.memory.features.clone())
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(losses, "binomial_deviance", watched)
        trainer.fill_memory()
        trainer.train_cnn_epoch()
    return seen[0]


def test_the_memory_moves_before_or_after_the_loss_as_set(
    tiny_config: Config, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Trainer(tiny_config, open_data(tiny_config), device=CPU)
    start.fill_memory()
    before, after = (memory_at_first_loss(o, tiny_config, tiny_root, monkeypatch) for o in ("before", "after"))
    changed_rows = [(memory != start.state.memory.features).any(1).sum().item() for memory in (before, after)]
    # a batch is half of a camera's twelve images
    assert changed_rows == [6, 0]


def test_after_each_epoch_batch_norms_have_the_statistics_of_clean_images(tiny_config: Config, tiny_root: Path) -> None:
    differences: list[list[float]] = []

    def look(trainer: Trainer) -> None:
        assert trainer.camids is not None
        images = trainer.plain_images.batch(np.arange(trainer.num_images), CPU)
        convolution, norm = trainer.state.backbone.trunk[:2]
        with torch.no_grad():
            maps = convolution(images)
        parts = [maps[trainer.camids == camera] for camera in trainer.camids.unique()]
        means = torch.stack([part.mean((0, 2, 3)) for part in (*parts, maps)])
        # a camera of twelve images takes the rest of the statistics of all
        means[:-1] = torch.lerp(means[-1], means[:-1], 12 / 22)
        moments = getattr(norm, "camera_moments", None)
        found = norm.running_mean.expand_as(means) if moments is None else moments[:, 0]
        differences.append((found - means).abs().amax(1).tolist())

    for override in ("backbone.camera_bn=true", "backbone.camera_bn=false"):
        train(changed(tiny_config, tiny_root, override), callbacks=Callbacks(after_epoch=look))
    # two cameras of twelve images each, and all
    assert max(map(max, differences[:3])) < 1e-5 < 1e-3 < min(map(min, differences[3:]))


def test_under_camera_bn_a_batch_shows_one_camera(tiny_config: Config, tiny_root: Path) -> None:
    shown: dict[str, list[set[int]]] = {"true": [], "false": []}

    class Watched(Trainer):
        def cnn_step(self, images: Tensor, batch: Tensor, *rest: Any) -> None:
            assert self.camids is not None
            shown[str(self.config.backbone.camera_bn).lower()].append(set(self.camids[batch].tolist()))
            super().cnn_step(images, batch, *rest)

    for value in shown:
        config = changed(tiny_config, tiny_root, f"backbone.camera_bn={value}", "train.epochs=1")
        trainer = Watched(config, open_data(config), device=CPU)
        trainer.fill_memory()
        fit(trainer)
    assert set(map(len, shown["true"])) == {1}
    assert {0} in shown["true"]
    assert {1} in shown["true"]
    assert 2 in set(map(len, shown["false"]))


def test_every_image_is_trained_on_once_an_epoch(tiny_config: Config, tiny_root: Path) -> None:
    config = changed(tiny_config, tiny_root, "train.batch_size=7", "train.epochs=1")
    ids: list[int] = []

    class Watched(Trainer):
        def cnn_step(self, images: Tensor, batch: Tensor, *rest: Any) -> None:
            ids.extend(batch.tolist())
            super().cnn_step(images, batch, *rest)

    trainer = Watched(config, open_data(config), device=CPU)
    trainer.fill_memory()
    fit(trainer)
    assert sorted(ids) == list(range(24))


def test_a_loss_that_is_not_finite_stops_before_the_step(tiny_config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, calls = losses.binomial_deviance, []

    def broken(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        return plain(*args, **kwargs) * (float("nan") if len(calls) == 2 else 1.0)

    monkeypatch.setattr(losses, "binomial_deviance", broken)
    trainer = Trainer(tiny_config, open_data(tiny_config), device=CPU)
    trainer.fill_memory()
    with pytest.raises(NonFiniteLoss, match="the CNN loss is nan in epoch 0, step 1"):
        fit(trainer)
    assert trainer.state.step == 1
    assert all(torch.isfinite(p).all() for p in trainer.state.backbone.parameters())


def test_settings_that_do_not_fit_the_data_are_refused(tiny_config: Config, tiny_root: Path) -> None:
    with pytest.raises(UserError, match=r"neighbors\.k = 30"):
        train(changed(tiny_config, tiny_root, "neighbors.k=30", "neighbors.k_max=40"))
    with pytest.raises(UserError, match=r"meta\.num_ids"):
        train(changed(tiny_config, tiny_root, "meta.num_ids=7"))


def test_bfloat16_changes_rounding_and_no_more(tiny_config: Config, tiny_root: Path) -> None:
    slow = ("train.lr_new=0.001", "pairs.labeller=supervised")
    loss, _ = first_loss(tiny_config, tiny_root, *slow)
    rounded, trainer = first_loss(tiny_config, tiny_root, *slow, "train.precision=bf16")
    assert rounded != loss
    assert rounded == pytest.approx(loss, rel=0.02)
    tensors = [trainer.state.memory.features, *trainer.state.backbone.parameters()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW])
def test_a_fused_optimizer_leaves_a_step_out_by_itself(make: Any) -> None:
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = make([weight], lr=0.1, weight_decay=0.5, fused=True)
    weight.grad = torch.full((3,), float("nan"))
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.step()
    assert weight.tolist() == [1, 1, 1]
    optimizer.found_inf = torch.tensor(0.0)
    weight.grad = torch.ones(3)
    optimizer.step()
    assert (weight < 1).all()


def test_eta_falls_from_the_first_epoch_of_the_gcn(tiny_config: Config, tiny_root: Path) -> None:
    config = changed(tiny_config, tiny_root, "train.epochs=6", "train.warmup_epochs=2", "meta.eta.end=0.1")
    trainer, etas = Trainer(config, open_data(config), device=CPU), []
    for epoch in range(6):
        trainer.state.epoch = epoch
        etas.append(trainer.eta)
    assert etas == pytest.approx([1, 1, 1, 0.7, 0.4, 0.1])
