"""Algorithm 1: its order, its determinism, and what reaches what."""

from __future__ import annotations

import dataclasses
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mprd import losses
from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.data.cache import Packs
from mprd.data.datasets import ReidDataset, load_dataset
from mprd.data.images import TrainImages
from mprd.engine import schedules
from mprd.engine.callbacks import Backends, Callbacks
from mprd.engine.trainer import Trainer, fit
from mprd.errors import Interrupted, NonFiniteLoss, UserError
from mprd.evaluate.epoch_metrics import epoch_row
from mprd.neighbors.camera_norm import CameraStatistics
from mprd.neighbors.exact import find_neighbors
from mprd.neighbors.similarity import fit_chain
from mprd.pairs import clusters as clusters_module
from mprd.runtime import checkpoint
from tests.conftest import NAMELESS, NUM_IDS, TINY

CPU = torch.device("cpu")
LABELLERS = ("gcn", "list_overlap", "reciprocal", "knn", "ss", "mplp", "mlcr", "dbscan", "supervised", "single")


@pytest.fixture(autouse=True)
def quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, logger="mprd")


def changed(config: Config, root: Path, *overrides: str) -> Config:
    return load_config("demo", overrides=(*TINY, *overrides), values={"data": {"root": root}})


def open_data(config: Config) -> ReidDataset:
    assert config.data.root is not None
    folder = config.data.root.parent / "packs"
    return dataclasses.replace(load_dataset(config.data), packs=Packs(folder, mode=config.data.cache))


def train(config: Config, dataset: ReidDataset | None = None, **around: Any) -> Trainer:
    trainer = Trainer(config, dataset or open_data(config), device=CPU, **around)
    trainer.fill_memory()
    fit(trainer)
    return trainer


def flatten(value: Any, name: str = "") -> dict[str, Any]:
    """List every leaf of a state."""
    if isinstance(value, dict):
        return {k: v for key, item in value.items() for k, v in flatten(item, f"{name}.{key}").items()}
    if isinstance(value, list | tuple):
        return {k: v for key, item in enumerate(value) for k, v in flatten(item, f"{name}.{key}").items()}
    return {name: value}


def assert_same_state(first: Trainer, second: Trainer) -> None:
    """Compare every tensor and number of two trainers bit by bit, wall times aside."""
    a, b = flatten(first.state_dict()), flatten(second.state_dict())
    assert a.keys() == b.keys()
    for name in a:
        if "seconds" in name:
            continue
        same = torch.equal(a[name], b[name]) if isinstance(a[name], torch.Tensor) else a[name] == b[name]
        assert same, f"{name} differs"


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
        ("data.camera_style=none",),
        ("pairs.labeller=mlcr", "pairs.relabel_meta=true"),
        ("memory.update=before",),
        ("pairs.refresh=epoch",),
        ("neighbors.source=clean",),
        ("neighbors.source=mean",),
        ("neighbors.source=clean", "neighbors.metric=camera", "meta.pairs=random"),
        ("neighbors.source=clean", "neighbors.standardise=true", "neighbors.metric=camera", "neighbors.density_k=3"),
        ("gcn.variant=paper", "gcn.link=keep", "gcn.optimizer=sgd"),
        ("gcn.variant=reciprocal", "neighbors.source=mean"),
        ("gcn.variant=reciprocal", "pairs.refresh=epoch", "meta.num_ids=0"),
        ("train.optimizer=adamw", "train.lr_new=0.001", "backbone.recalibrate_bn=true"),
        ("train.warmup_epochs=2",),
    ],
)
def test_every_variant_of_the_tables_trains(overrides: tuple[str, ...], tiny_config: Config, tiny_root: Path) -> None:
    trainer = train(changed(tiny_config, tiny_root, *overrides))
    assert torch.isfinite(trainer.state.memory.features).all()
    norms = trainer.state.memory.features.norm(dim=1)
    assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5)


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


def stop_after(trainer_step: int, path: Path) -> Callbacks:
    """Save and stop after so many steps of all phases together."""
    seen = [0]

    def after_step(trainer: Trainer, _num_steps: int) -> None:
        seen[0] += 1
        if seen[0] == trainer_step:
            checkpoint.save(trainer.state_dict(), path)
            raise Interrupted("stop")

    return Callbacks(after_step=after_step)


# 24 images: an epoch is 3 GCN steps and 3 CNN steps; the first, the last, both phases, both ends of an epoch
@pytest.mark.parametrize("num_steps", [1, 3, 4, 6, 8, 11, 14, 18])
@pytest.mark.parametrize(
    "overrides", [(), ("gcn.variant=reciprocal", "neighbors.source=mean"), ("pairs.refresh=epoch",)]
)
def test_resuming_at_any_step_ends_in_the_same_bits(
    num_steps: int, overrides: tuple[str, ...], tiny_config: Config, tiny_root: Path, tmp_path: Path
) -> None:
    config = changed(tiny_config, tiny_root, *overrides)
    whole = train(config)
    path = tmp_path / "last.pt"
    with pytest.raises(Interrupted):
        train(config, callbacks=stop_after(num_steps, path))
    resumed = Trainer(config, open_data(config), device=CPU)
    resumed.load_state_dict(checkpoint.load(path), path=path)
    fit(resumed)
    assert_same_state(whole, resumed)


@pytest.mark.parametrize("source", ["clean", "memory"])
def test_lists_are_searched_once_an_epoch(source: str, tiny_config: Config, tiny_root: Path) -> None:
    searched: list[Tensor] = []

    def search(features: Tensor, **rule: Any) -> Any:
        searched.append(features)
        return find_neighbors(features, **rule)

    epochwise = ("pairs.refresh=epoch", "neighbors.metric=cosine", f"neighbors.source={source}")
    config = changed(tiny_config, tiny_root, *epochwise)
    # 3 epochs, each with a GCN phase and a labelling pass
    train(config, backends=Backends(search_all=search))
    assert len(searched) == 3


def test_lists_are_drawn_from_the_mean_of_memory_and_clean_features(tiny_config: Config, tiny_root: Path) -> None:
    config = changed(tiny_config, tiny_root, "neighbors.source=mean", "neighbors.metric=cosine", "train.epochs=2")
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


def test_cluster_contrast_resumes_within_an_epoch(
    tiny_config: Config, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {"K1": 7, "K2": 2, "MIN_SAMPLES": 3}.items():
        monkeypatch.setattr(clusters_module, name, value)
    small = ("pairs.labeller=dbscan", "clusters.eps=0.7")
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
    assert changed_rows == [8, 0]


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


def test_a_checkpoint_of_another_architecture_is_refused(tiny_config: Config, tiny_root: Path, tmp_path: Path) -> None:
    path = tmp_path / "last.pt"
    checkpoint.save(train(changed(tiny_config, tiny_root, "train.epochs=1")).state_dict(), path)
    other = changed(tiny_config, tiny_root, "backbone.name=resnet18")
    trainer = Trainer(other, open_data(other), device=CPU)
    with pytest.raises(UserError, match=r"last\.pt: the backbone of the checkpoint is of another architecture"):
        trainer.load_state_dict(checkpoint.load(path), path=path)


def test_bfloat16_changes_rounding_and_no_more(tiny_config: Config, tiny_root: Path) -> None:
    slow = ("train.lr_new=0.001", "pairs.labeller=supervised")
    loss, _ = first_loss(tiny_config, tiny_root, *slow)
    rounded, trainer = first_loss(tiny_config, tiny_root, *slow, "train.precision=bf16")
    assert rounded != loss
    assert rounded == pytest.approx(loss, rel=0.02)
    tensors = [trainer.state.memory.features, *trainer.state.backbone.parameters()]
    assert {tensor.dtype for tensor in tensors} == {torch.float32}


def test_a_loss_found_broken_late_is_never_saved(tiny_config: Config) -> None:
    trainer = Trainer(tiny_config, open_data(tiny_config), device=CPU)
    trainer.state_dict()
    trainer.stats.pending = {"cnn_loss": torch.tensor(float("inf")), "images": torch.tensor(8.0)}
    with pytest.raises(NonFiniteLoss, match="the CNN loss is not finite in epoch 0"):
        trainer.state_dict()


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


def test_lists_that_need_cameras_are_refused_at_the_start_where_there_are_none(
    tiny_config: Config, tiny_root: Path
) -> None:
    data = open_data(tiny_config)
    blind = dataclasses.replace(data, train=dataclasses.replace(data.train, camids=None))
    plain = "neighbors.standardise=false"
    for setting, needs in ((plain, "neighbors.metric: camera"), ("neighbors.metric=cosine", "neighbors.standardise")):
        config = changed(tiny_config, tiny_root, setting, "train.warmup_epochs=2", "train.epochs=2")
        with pytest.raises(UserError, match=rf"^{re.escape(needs)} needs cameras, and .* has none; "):
            Trainer(config, blind, device=CPU)
    rule = changed(tiny_config, tiny_root, plain, "pairs.labeller=knn", "train.epochs=1")
    train(rule, dataset=blind)


WHITENING = ("neighbors.whitening=true", "pairs.labeller=reciprocal", "meta.num_ids=0", "pairs.limit=false")


def test_a_whitened_run_resumes_in_the_same_bits_and_ends_with_a_chain_of_its_network(
    tiny_config: Config, tiny_root: Path, tmp_path: Path
) -> None:
    config, path = changed(tiny_config, tiny_root, *WHITENING, "train.epochs=2"), tmp_path / "last.pt"
    rows: list[dict[str, Any]] = []
    reports: list[dict[str, float | None]] = []
    last: list[Any] = []

    def after_epoch(trainer: Trainer) -> None:
        assert trainer.state.chain is not None
        reports.append(trainer.state.chain.report)
        last.append(trainer.state.chain.whitening)
        rows.append(epoch_row(trainer))

    whole = train(config, callbacks=Callbacks(after_epoch=after_epoch))
    # a row tells of the chain that the epoch's lists were drawn by, and of the features whitened by the next one
    assert [row["surest_similarity"] for row in rows] == [report["surest_similarity"] for report in reports]
    assert all(0 < row["mAP_whitened"] <= 1 for row in rows)
    chain = whole.state.chain
    assert chain is not None
    clean = whole.extract(whole.plain_images)
    # pairs are found in features whitened as in the epoch before
    again = fit_chain(clean, whole.camids, config.neighbors, last=last[-1])
    assert torch.equal(chain(clean, whole.camids), again(clean, whole.camids))
    with pytest.raises(Interrupted):
        train(config, callbacks=dataclasses.replace(stop_after(4, path), after_epoch=epoch_row))
    resumed = Trainer(config, open_data(config), device=CPU, callbacks=Callbacks(after_epoch=epoch_row))
    resumed.load_state_dict(checkpoint.load(path), path=path)
    fit(resumed)
    assert_same_state(whole, resumed)


def test_images_without_cameras_are_whitened_as_one_group(nameless_root: Path) -> None:
    overrides = (*TINY, *NAMELESS, *WHITENING, "train.epochs=1")
    config = load_config("demo", overrides=overrides, values={"data": {"root": nameless_root}})
    chain = train(config).state.chain
    assert chain is not None
    assert chain.cameras is None
    assert chain.whitening is not None


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


def test_cluster_contrast_labels_and_remembers_all_images_of_one_state(
    tiny_config: Config, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the last four images are outliers, which no batch holds: their rows would stay those of the start
    labels = torch.arange(4 * NUM_IDS) // 4
    labels[-4:] = -1
    monkeypatch.setattr(clusters_module, "cluster_images", lambda *_, **__: labels)
    config = changed(tiny_config, tiny_root, "pairs.labeller=dbscan", "neighbors.source=mean", "train.epochs=2")
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


def test_eta_falls_from_the_first_epoch_of_the_gcn(tiny_config: Config, tiny_root: Path) -> None:
    config = changed(tiny_config, tiny_root, "train.epochs=6", "train.warmup_epochs=2", "meta.eta.end=0.1")
    trainer, etas = Trainer(config, open_data(config), device=CPU), []
    for epoch in range(6):
        trainer.state.epoch = epoch
        etas.append(trainer.eta)
    assert etas == pytest.approx([1, 1, 1, 0.7, 0.4, 0.1])


def test_scores_of_candidates_are_of_the_features_that_lists_were_drawn_from(
    tiny_config: Config, tiny_root: Path
) -> None:
    """Under `source: memory` the memory has moved on when the epoch is evaluated; standardized features are not it."""
    settings = ("pairs.labeller=list_overlap", "neighbors.source=memory", "pairs.refresh=epoch", "train.epochs=1")
    start: list[Tensor] = []

    def look(trainer: Trainer) -> None:
        features = CameraStatistics.measure(start[0], trainer.camids).standardize(start[0], trainer.camids)
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
