"""Whole runs on a GPU, on a pretended one where there is none.

What a pretence can show: no tensor meets one of another device, and a step makes the host wait for nothing.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_map

from mprd.backbone.network import build_backbone, speed_up
from mprd.config.loading import load_config
from mprd.engine.gcn_loss import WeightedLoss
from mprd.engine.state import TrainState
from mprd.engine.trainer import CHECK_STEPS, Hooks, Trainer, fit, ignore
from mprd.errors import UserError
from mprd.evaluate.epoch_metrics import epoch_row
from mprd.runtime.device import Fetched, send
from mprd.runtime.distributed import WorkerGroup
from tests.conftest import TINY
from tests.pretended_gpu import Remote, pretended_gpu, zero_gradients_only

from .test_trainer import open_data

pretending = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, and need not pretend")

RULES = ("jaccard", "knn", "ss", "mplp", "mlcr", "reciprocal", "supervised")
LIVE = ("neighbors.source=memory", "neighbors.metric=cosine", "neighbors.standardise=false")
SETTINGS = {
    "as recommended": ("gcn.variant=reciprocal", "pairs.decide=agreement", "pairs.mu=0.1", "neighbors.source=mean"),
    "structure": ("pairs.decide=agreement", "pairs.mu=0.1"),
    "as in the paper": (*LIVE, "gcn.variant=paper", "meta.pairs=random"),
    "a graph, and scalars": ("gcn.read_out=both", "data.camera_style=colour"),
    **{name: (f"pairs.labeller={name}",) for name in RULES},
    "dbscan": ("pairs.labeller=dbscan", "clusters.eps=0.9", "clusters.min_samples=2"),
}

Rows = list[dict[str, Any]]


def run(
    root: Path, *overrides: str, device: str, start: dict[str, Any] | None = None, after_step: Any = ignore
) -> tuple[dict[str, Any], Rows]:
    """Train on a device, from a saved state where there is one.

    Return the state that a checkpoint would hold, on the CPU, and the rows of all epochs.
    """
    config = load_config("demo", overrides=(*TINY, "train.epochs=2", *overrides), values={"data": {"root": root}})
    rows: Rows = []
    hooks = Hooks(after_step=after_step, after_epoch=lambda trainer: rows.append(epoch_row(trainer)))
    trainer = Trainer(config, open_data(config), device=torch.device(device), hooks=hooks)
    trainer.fill_memory()
    if start is not None:
        trainer.state.load_state_dict(start, path=root)
    state = fit(trainer).state_dict()
    return {name: part.cpu() for name, part in state.items() if isinstance(part, torch.Tensor)}, rows


@pretending
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_on_a_gpu_is_a_run_on_the_cpu(settings: tuple[str, ...], tiny_root: Path) -> None:
    with zero_gradients_only():
        here, rows_here = run(tiny_root, *settings, "data.augment=batch", device="cpu")
    with pretended_gpu():
        there, rows_there = run(tiny_root, *settings, device="cuda")
    assert torch.equal(here["positives"], there["positives"])
    torch.testing.assert_close(here["memory"], there["memory"], atol=1e-5, rtol=0)
    for one, other in zip(rows_here, rows_there, strict=True):
        timed = [name for name in one if "second" in name]
        assert without(one, timed) == pytest.approx(without(other, timed), abs=1e-4, nan_ok=True)


def without(row: dict[str, Any], names: list[str]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names and isinstance(value, float)}


@pretending
@pytest.mark.parametrize("num_steps", [2, 5])
def test_a_run_on_a_gpu_resumes_within_an_epoch_and_saves_again(num_steps: int, tiny_root: Path) -> None:
    saved: list[Any] = []

    def save(state: TrainState, _num_steps: int) -> None:
        saved.append(tree_map(lambda leaf: leaf.cpu() if isinstance(leaf, torch.Tensor) else leaf, state.state_dict()))

    settings = SETTINGS["as in the paper"]
    with pretended_gpu():
        whole, _ = run(tiny_root, *settings, device="cuda", after_step=save)
        resumed, _ = run(tiny_root, *settings, device="cuda", after_step=save, start=saved[num_steps - 1])
    for name, part in whole.items():
        torch.testing.assert_close(resumed[name], part, atol=1e-6, rtol=0)


@pretending
@pytest.mark.parametrize(
    ("phase", "settings", "awaited"),
    [
        ("gcn", (), set()),
        ("gcn", ("gcn.variant=reciprocal", "neighbors.source=mean"), set()),
        ("gcn", ("gcn.variant=reciprocal", "neighbors.source=mean", "train.cuda_graphs=true"), set()),
        ("cnn", ("pairs.decide=agreement", "pairs.mu=0.1"), set()),
        ("cnn", ("pairs.labeller=reciprocal",), set()),
        # how many neighbors and pairs there are
        ("cnn", SETTINGS["as in the paper"], {"device.py: self.arrival.synchronize()"}),
        ("cnn", (*SETTINGS["as in the paper"], "memory.update=before"), {"device.py: self.arrival.synchronize()"}),
    ],
)
def test_a_step_on_a_gpu_makes_the_host_wait_for_nothing_but_the_sizes_of_live_lists(
    phase: str, settings: tuple[str, ...], awaited: set[str], tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "make_graphed_callables", lambda network, _samples, **_: network)
    waits: list[Counter[str]] = []
    last: tuple[int, Counter[str]] = (-1, Counter())

    def note(state: TrainState, _num_steps: int) -> None:
        # from behind the last step of this epoch, so that getting the next batch counts
        nonlocal last
        if state.phase == phase and last[0] == state.epoch and (state.step - 1) % CHECK_STEPS:
            waits.append(gpu.waits - last[1])
        last = (state.epoch if state.phase == phase else -1, gpu.waits.copy())

    with pretended_gpu() as gpu:
        run(tiny_root, *settings, device="cuda", after_step=note)
    assert len(waits) > 3
    for found in waits:
        assert found == Counter(awaited)


@pretending
@pytest.mark.parametrize("settings", [(), ("backbone.freeze_bn=true",), SETTINGS["as in the paper"]])
def test_training_passes_are_launched_as_recorded_and_nothing_else_is(
    settings: tuple[str, ...], tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched, recordings, gcn_steps = [], [], []
    steps: Counter[str] = Counter()

    def record_cnn(network: nn.Module, samples: tuple[torch.Tensor, ...]) -> Any:
        recordings.append(len(samples[0]))
        # as torch does: run it for a while, which moves running statistics
        before = [buffer.clone() for buffer in network.buffers()]
        for _ in range(3):
            network(*samples)
        moved = [bool((buffer != old).any().cpu()) for buffer, old in zip(network.buffers(), before, strict=True)]
        assert any(moved) != ("backbone.freeze_bn=true" in settings)

        def launch(images: torch.Tensor) -> torch.Tensor:
            assert torch.is_grad_enabled()
            assert network.training
            launched.append(images.shape)
            return network(images)

        return launch

    def record_gcn(loss: nn.Module, samples: tuple[torch.Tensor, ...]) -> Any:
        before = gpu.waits.copy()
        loss(*samples)

        def launch(*inputs: torch.Tensor) -> torch.Tensor:
            assert all(one is other for one, other in zip(inputs, samples, strict=True))
            gcn_steps.append(len(inputs[1]))
            return loss(*samples)

        assert gpu.waits == before
        return launch

    def record(network: nn.Module, samples: tuple[torch.Tensor, ...], **_: Any) -> Any:
        return (record_gcn if isinstance(network, WeightedLoss) else record_cnn)(network, samples)

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", record)
    # 24 images: batches of 5, 5, 5, 5 and 4
    settings = (*settings, "train.batch_size=5")
    with pretended_gpu() as gpu:
        plain, rows = run(tiny_root, *settings, device="cuda")
        assert not launched
        assert not gcn_steps
        recorded, rows_recorded = run(
            tiny_root,
            *settings,
            "train.cuda_graphs=true",
            device="cuda",
            after_step=lambda state, _num_steps: steps.update([state.phase]),
        )
    for name, part in plain.items():
        assert torch.equal(recorded[name], part), name
    assert [row["cnn_loss"] for row in rows_recorded] == [row["cnn_loss"] for row in rows]
    assert [row["gcn_loss"] for row in rows_recorded] == pytest.approx([row["gcn_loss"] for row in rows], rel=1e-5)
    assert launched == 2 * [*4 * [(5, 3, 32, 16)], (4, 3, 32, 16)]
    assert recordings == [5, 4]
    assert len(gcn_steps) == steps["gcn"] > 2


def test_what_is_recorded_meets_no_cache_of_autocast() -> None:
    # torch refuses to record under one
    config = load_config("demo")
    backbone, cached = build_backbone(config.backbone), []
    backbone.is_bf16 = True

    def recorded(images: torch.Tensor) -> torch.Tensor:
        assert torch.is_autocast_enabled("cpu")
        cached.append(torch.is_autocast_cache_enabled())
        return backbone.trunk(images)

    backbone.recorded = recorded
    backbone(torch.rand(2, 3, 32, 16))
    assert cached == [False]


def test_cuda_graphs_want_a_gpu_and_one_worker(tiny_root: Path) -> None:
    for other in ("train.compile=true", "backbone.bn_group=4"):
        with pytest.raises(UserError, match="cuda_graphs goes with neither"):
            load_config("demo", overrides=("train.cuda_graphs=true", other))
    overrides = (*TINY, "train.cuda_graphs=true")
    config = load_config("demo", overrides=overrides, values={"data": {"root": tiny_root}})
    with pytest.raises(UserError, match="is for one worker, but there are 2"):
        speed_up(build_backbone(config.backbone, workers=WorkerGroup(rank=0, size=2)), config.train)
    with pytest.raises(UserError, match="needs a CUDA device, but this run is on cpu"):
        run(tiny_root, "train.cuda_graphs=true", device="cpu")


@pretending
def test_the_pretended_gpu_refuses_and_counts() -> None:
    with pretended_gpu() as gpu:
        there = torch.arange(4.0, device="cuda")
        with pytest.raises(RuntimeError, match="tensors of two devices"):
            there + torch.ones(4)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert isinstance(there * 2.0 + torch.tensor(1.0), Remote)
        there[:2].add_(1)
        assert there.tolist() == [1, 2, 2, 3]
        assert gpu.waits.total() == 1
        assert int(there.sum()) == 8
        assert len(there[there > 1]) == 3
        assert gpu.waits.total() == 3
        there.copy_(torch.ones(4), non_blocking=True)
        coming = Fetched(send([1, 2], torch.device("cuda")))
        assert gpu.waits.total() == 3
        assert coming.tolist() == [1, 2]
        there.copy_(torch.ones(4))
        assert torch.tensor([1.0], device="cuda")[torch.tensor([0])] == 1
        assert gpu.waits.total() == 3 + 5
    assert not torch.cuda.is_available()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_first_losses_on_a_gpu_are_those_of_the_cpu(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descend, losses = Trainer.descend, []

    def watched(trainer: Trainer, *args: Any, **settings: Any) -> torch.Tensor:
        whole = descend(trainer, *args, **settings)
        losses.append(float(whole))
        return whole

    monkeypatch.setattr(Trainer, "descend", watched)
    # at the demo's rate so few identities blow up the last bit of anything
    settings = ("train.lr_new=0.0001", "train.batch_size=4", "train.epochs=3")
    run(tiny_root, *settings, "data.augment=batch", device="cpu")
    here, losses[:] = losses[:], []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        run(tiny_root, *settings, device="cuda")
    assert len(losses) == len(here) >= 20
    assert losses[:20] == pytest.approx(here[:20], rel=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_recorded_passes_are_those_launched_one_by_one(precision: str, tiny_root: Path) -> None:
    # small steps, so that what kernels leave to chance does not grow
    settings = ("train.lr_new=0.0001", "train.batch_size=5", "train.epochs=2", f"train.precision={precision}")
    plain, rows = run(tiny_root, *settings, device="cuda")
    recorded, rows_recorded = run(tiny_root, *settings, "train.cuda_graphs=true", device="cuda")
    for name in ("gcn_loss", "cnn_loss"):
        assert [row[name] for row in rows_recorded] == pytest.approx([row[name] for row in rows], rel=1e-3)
    torch.testing.assert_close(recorded["memory"], plain["memory"], atol=1e-2, rtol=0)
