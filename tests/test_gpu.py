"""Whole runs on a GPU, on a pretended one where there is none.

What a pretence can show: no tensor meets one of another device, and a step makes the host wait for nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_map

from mprd.config_loading import load_config
from mprd.engine import CHECK_STEPS, Hooks, Trainer, fit, ignore
from mprd.epoch_row import epoch_row
from mprd.labelling import CandidateLabeller, Labels
from mprd.state import TrainState

from .conftest import TINY
from .pretended_gpu import Remote, pretended_gpu, zero_gradients_only
from .test_engine import open_data

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
    ("name", "settings"),
    [
        ("gcn_step", ()),
        ("gcn_step", ("gcn.variant=reciprocal", "neighbors.source=mean")),
        ("cnn_step", ("pairs.decide=agreement", "pairs.mu=0.1")),
        ("cnn_step", ("pairs.labeller=reciprocal",)),
    ],
)
def test_a_step_on_a_gpu_makes_the_host_wait_for_nothing(
    name: str, settings: tuple[str, ...], tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, waits = getattr(Trainer, name), []

    def watched(trainer: Trainer, *args: Any) -> None:
        before = gpu.waits.copy()
        step(trainer, *args)
        if trainer.state.step % CHECK_STEPS:
            waits.append(gpu.waits - before)

    monkeypatch.setattr(Trainer, name, watched)
    with pretended_gpu() as gpu:
        run(tiny_root, *settings, device="cuda")
    assert len(waits) > 3
    assert not any(waits), waits


@pretending
def test_a_step_with_live_labels_waits_a_few_times(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    label, waits = CandidateLabeller.label, []

    def watched(labeller: CandidateLabeller, ids: torch.Tensor) -> Labels:
        before = gpu.waits.copy()
        labels = label(labeller, ids)
        waits.append((gpu.waits - before).total())
        return labels

    monkeypatch.setattr(CandidateLabeller, "label", watched)
    with pretended_gpu() as gpu:
        run(tiny_root, *SETTINGS["as in the paper"], device="cuda")
    # two searches, each checked and cut, the images around the batch, where candidates stand, the longest list
    assert set(waits) == {7}


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
    assert not torch.cuda.is_available()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_first_losses_on_a_gpu_are_those_of_the_cpu(tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    descend, losses = Trainer.descend, []

    def watched(trainer: Trainer, *args: Any, **settings: Any) -> None:
        losses.append(float(settings["whole"]))
        descend(trainer, *args, **settings)

    monkeypatch.setattr(Trainer, "descend", watched)
    # at the demo's rate so few identities blow up the last bit of anything
    settings = ("train.lr_new=0.0001", "train.batch_size=4", "train.epochs=3")
    run(tiny_root, *settings, "data.augment=batch", device="cpu")
    here, losses[:] = losses[:], []
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        run(tiny_root, *settings, device="cuda")
    assert len(losses) == len(here) >= 20
    assert losses[:20] == pytest.approx(here[:20], rel=1e-3)
