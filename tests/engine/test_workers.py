"""Training on two workers ends where one worker does."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mprd.backbone import features
from mprd.config.loading import build_config, layered, load_config
from mprd.config.schema import Config
from mprd.data.datasets import load_dataset
from mprd.engine.callbacks import Callbacks
from mprd.engine.camera_groups import CameraGroups
from mprd.engine.requirements import check_requirements
from mprd.engine.trainer import Trainer, fit
from mprd.errors import UserError
from mprd.evaluate.epoch_metrics import epoch_row
from mprd.pairs.labellers import Labels, gather_labels
from mprd.runtime.distributed import WorkerGroup
from tests.conftest import TINY
from tests.workers import on_workers

CPU = torch.device("cpu")
LARGE_ID = 2**40 + 1
CALM = ("train.lr_new=0.001",)
"""A learning rate that does not amplify rounding."""
# 7 does not divide 24, so that shards differ in size
RUNS = (
    ("train.batch_size=7", "pairs.refresh=epoch", "backbone.camera_bn=false"),
    (*CALM, "backbone.bn_group=4"),
    ("backbone.bn_group=6", "pairs.labeller=mplp", "memory.update=before"),
    (*CALM, "neighbors.whitening=true", "pairs.labeller=reciprocal", "pairs.limit=false"),
)


def run(workers: WorkerGroup, root: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Train on the tiny data set; return the state and the row of each epoch."""
    overrides = (*TINY, "train.epochs=2", *overrides)
    config = load_config("demo", overrides=overrides, values={"data": {"root": root}})
    dataset = load_dataset(config.data)
    rows: list[dict[str, Any]] = []
    callbacks = Callbacks(after_epoch=lambda trainer: rows.append(epoch_row(trainer)))
    trainer = Trainer(config, dataset, device=CPU, callbacks=callbacks, workers=workers)
    trainer.fill_memory()
    fit(trainer)
    state = trainer.state
    return {
        "rows": rows,
        "memory": state.memory.features,
        "positives": state.positives.mask(torch.arange(len(dataset.train))),
        "backbone": state.backbone.state_dict(),
        "gcn": state.gcn.state_dict(),
    }


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    """Train in float64, where the order of sums changes the losses by less than 1e-9.

    In float32 it changes them by 1e-7, and by 1e-3 where a hard negative changes for it.
    """
    image_batches = features.image_batches

    def doubled(*args: Any, **kwargs: Any) -> Iterator[Tensor]:
        return (images.double() for images in image_batches(*args, **kwargs))

    torch.set_default_dtype(torch.float64)
    features.image_batches = doubled
    try:
        yield
    finally:
        features.image_batches = image_batches
        torch.set_default_dtype(torch.float32)


def uneven_labels(rank: int) -> Labels:
    """Return one image's labels, each table wider on another worker."""
    ids = torch.full((1, 2 - rank), rank)
    positives, likelihoods = torch.full((1, 1 + rank), [LARGE_ID, 1][rank]), torch.full(ids.shape, 0.1)
    return Labels(positives, ids, likelihoods, is_capped=torch.tensor([rank == 1]))


def work(workers: WorkerGroup, root: Path) -> dict[str, Any]:
    with in_float64():
        runs = [run(workers, root, overrides) for overrides in RUNS]
    labels = gather_labels(uneven_labels(workers.rank), [1, 1], workers)
    return {"runs": runs, "float32": run(workers, root, CALM), "labels": labels}


@pytest.fixture(scope="module")
def two(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_workers(2, work, tiny_root, folder=tmp_path_factory.mktemp("two"))


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_two_workers_end_where_one_does(number: int, two: list[dict[str, Any]], tiny_root: Path) -> None:
    with in_float64():
        alone = run(WorkerGroup(), tiny_root, RUNS[number])
    first, second = (results["runs"][number] for results in two)
    assert_same_run(alone, first, atol=1e-8)
    # the two workers have identical bits
    for part in ("backbone", "gcn"):
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in first[part].items())
    assert torch.equal(first["memory"], second["memory"])
    assert torch.equal(first["positives"], second["positives"])


def test_two_workers_end_within_1e_4_of_one_in_float32(two: list[dict[str, Any]], tiny_root: Path) -> None:
    assert_same_run(run(WorkerGroup(), tiny_root, CALM), two[0]["float32"], atol=1e-4)


def assert_same_run(alone: dict[str, Any], shared: dict[str, Any], *, atol: float) -> None:
    torch.testing.assert_close(shared["memory"], alone["memory"], rtol=0, atol=atol)
    assert torch.equal(shared["positives"], alone["positives"])
    assert len(alone["rows"]) == len(shared["rows"]) == 2
    for one, other in zip(alone["rows"], shared["rows"], strict=True):
        for name in ("cnn_loss", "gcn_loss", "mAP", "label_free_score", "pair_precision", "gcn_auc", "neighbors"):
            wanted = None if one.get(name) is None else pytest.approx(one[name], abs=atol)
            assert other.get(name) == wanted, name
    for part in ("backbone", "gcn"):
        for name, tensor in alone[part].items():
            torch.testing.assert_close(shared[part][name], tensor, rtol=0, atol=atol, msg=name)


def test_labels_of_different_widths_are_gathered(two: list[dict[str, Any]]) -> None:
    for results in two:
        labels = results["labels"]
        assert labels.positives.tolist() == [[LARGE_ID, -1], [1, 1]]
        assert labels.candidates.tolist() == [[0, 0], [1, -1]]
        assert torch.equal(labels.likelihoods, torch.tensor([[0.1, 0.1], [0.1, 0.0]]))
        assert labels.refused is None
        assert labels.is_capped.tolist() == [False, True]


def test_a_batch_smaller_than_the_number_of_workers_is_refused(tiny_config: Config) -> None:
    dataset = load_dataset(tiny_config.data)
    with pytest.raises(UserError, match=r"train\.batch_size: a batch of 6 is too small for 9 workers"):
        Trainer(tiny_config, dataset, device=CPU, workers=WorkerGroup(0, 9))


def test_batches_of_statistics_are_checked_as_they_are(tiny_config: Config, caplog: pytest.LogCaptureFixture) -> None:
    dataset = load_dataset(tiny_config.data)

    def sized(train: int, evaluation: int) -> Config:
        parts = {"train": {"batch_size": train}, "eval": {"batch_size": evaluation}, "backbone": {"camera_bn": True}}
        return build_config(layered(tiny_config.model_dump(), parts))

    # 24 images, of which no batch norm sees one alone
    for size in (1, 2, 24):
        groups = CameraGroups.of(None, len(dataset.train), least=2)
        check_requirements(sized(max(2, size), size), dataset, groups, WorkerGroup(0, 2))
    # two images of the third camera join the first one's batches, but not its statistics
    config = sized(3, 3)
    camids = torch.tensor([0] * 4 + [1] * 6 + [2] * 2)
    dataset = replace(dataset, camera_numbers=(1, 2, 3))
    caplog.set_level("WARNING", logger="mprd")
    with pytest.raises(UserError, match=r"^eval\.batch_size: a batch of 2 is too small for 3 workers"):
        check_requirements(config, dataset, CameraGroups.of(camids, 12, least=3), WorkerGroup(1, 3))
    assert caplog.messages == []
    check_requirements(config, dataset, CameraGroups.of(camids[:10], 10, least=5), WorkerGroup())
    assert caplog.messages == [
        "fewer than train.batch_size = 5 training images, so batch norms take the statistics of all: cameras 1"
    ]


def test_a_normalization_group_of_one_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"backbone\.bn_group must be 0 or at least 2"):
        load_config("demo", overrides=("backbone.bn_group=1",))
