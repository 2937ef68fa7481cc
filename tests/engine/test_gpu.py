"""Whole runs on a GPU, or on a pretended one: no operator mixes devices, results are the CPU's, steps do not sync."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from mprd.config.loading import load_config
from mprd.data.images import TrainImages
from mprd.engine.callbacks import Callbacks, ignore
from mprd.engine.trainer import CHECK_STEPS, Trainer, fit
from mprd.evaluate.epoch_metrics import epoch_row
from mprd.runtime.device import send
from tests.conftest import TINY
from tests.pretended_gpu import Remote, pretended_gpu, zero_gradients_only

from .loop import LIVE
from .test_trainer import open_data

pretending = pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU, and need not pretend")

RULES = ("knn", "ss", "mplp", "mlcr", "reciprocal", "supervised")
SETTINGS = {
    "whitened": ("neighbors.whitening=true",),
    "as in the paper": LIVE,
    **{name: (f"pairs.labeller={name}",) for name in RULES},
    "dbscan": ("pairs.labeller=dbscan", "clusters.eps=0.9"),
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
    callbacks = Callbacks(after_step, lambda trainer: rows.append(epoch_row(trainer)))
    trainer = Trainer(config, open_data(config), device=torch.device(device), callbacks=callbacks)
    trainer.fill_memory()
    if start is not None:
        trainer.load_state_dict(start, path=root)
    fit(trainer)
    state = trainer.state_dict()
    return {name: part.cpu() for name, part in state.items() if isinstance(part, torch.Tensor)}, rows


@pretending
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_a_run_on_a_gpu_is_a_run_on_the_cpu(
    settings: tuple[str, ...], tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # augmented as on a GPU
    monkeypatch.setattr(TrainImages, "is_batched", lambda *_: True)
    with zero_gradients_only():
        here, rows_here = run(tiny_root, *settings, device="cpu")
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
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_run_resumes_within_an_epoch_on_either_device_and_saves_again(
    optimizer: str, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # augmented as on a GPU
    monkeypatch.setattr(TrainImages, "is_batched", lambda *_: True)
    saved: list[Any] = []

    def save(trainer: Trainer, _num_steps: int) -> None:
        state = trainer.state_dict()
        saved.append(tree_map(lambda leaf: leaf.clone().cpu() if isinstance(leaf, torch.Tensor) else leaf, state))

    settings = (*SETTINGS["as in the paper"], f"train.optimizer={optimizer}", "train.lr_new=0.001")
    with pretended_gpu():
        for first in ("cpu", "cuda"):
            whole, _ = run(tiny_root, *settings, device=first, after_step=save)
            for second in ("cpu", "cuda"):
                # in the second step of the CNN, the 5th of 12 steps
                resumed, _ = run(tiny_root, *settings, device=second, after_step=save, start=deepcopy(saved[4]))
                for name, part in whole.items():
                    torch.testing.assert_close(resumed[name], part, atol=1e-6, rtol=0)
            saved.clear()


@pretending
@pytest.mark.parametrize(
    ("phase", "settings", "most_waits"),
    [
        ("gcn", (), 0),
        ("cnn", ("pairs.refresh=epoch",), 0),
        # where neighbors and pairs are, and the widths of lists
        ("cnn", SETTINGS["as in the paper"], 8),
    ],
)
def test_a_step_on_a_gpu_synchronizes_for_the_sizes_of_live_lists_alone(
    phase: str, settings: tuple[str, ...], most_waits: int, tiny_root: Path
) -> None:
    waits: list[int] = []
    last: tuple[int, int] = (-1, 0)

    def note(trainer: Trainer, _num_steps: int) -> None:
        # from the end of the previous step of the epoch, so that fetching the next batch counts
        nonlocal last
        state = trainer.state
        if state.phase == phase and last[0] == state.epoch and (state.step - 1) % CHECK_STEPS:
            waits.append(gpu.waits - last[1])
        last = (state.epoch if state.phase == phase else -1, gpu.waits)

    with pretended_gpu() as gpu:
        run(tiny_root, *settings, device="cuda", after_step=note)
    assert len(waits) > 3
    assert max(waits) <= most_waits


@pretending
def test_the_pretended_gpu_refuses_mixed_devices_and_counts_waits() -> None:
    with pretended_gpu() as gpu:
        there = torch.arange(4.0, device="cuda")
        with pytest.raises(RuntimeError, match="tensors of two devices"):
            there + torch.ones(4)
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert isinstance(there * 2.0 + torch.tensor(1.0), Remote)
        there[:2].add_(1)
        assert there.tolist() == [1, 2, 2, 3]
        assert int(there.sum()) == 8
        assert len(there[there > 1]) == 3
        assert gpu.waits == 3
        there.copy_(torch.ones(4), non_blocking=True)
        send([1, 2], torch.device("cuda"))
        assert gpu.waits == 3
        there.copy_(torch.ones(4))
        assert torch.tensor([1.0], device="cuda")[torch.tensor([0])] == 1
        assert gpu.waits == 7
    assert not torch.cuda.is_available()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_losses_on_a_gpu_are_those_of_the_cpu(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TrainImages, "is_batched", lambda *_: True)
    # at the demo's learning rate so few identities amplify rounding
    settings = ("train.lr_new=0.0001", "train.batch_size=4")
    _, here = run(tiny_root, *settings, device="cpu")
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        _, there = run(tiny_root, *settings, device="cuda")
    assert [row["cnn_loss"] for row in there] == pytest.approx([row["cnn_loss"] for row in here], rel=1e-3)
