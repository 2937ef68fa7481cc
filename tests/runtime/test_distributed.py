"""Several workers, one result: shares, gathering, batch norm over the global batch, and the whole loop on two."""

from __future__ import annotations

import contextlib
import datetime
import multiprocessing
import pickle
import socket
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from mprd.backbone import features
from mprd.backbone.batch_norm import BatchSplit, replace_batch_norms
from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.data.datasets import load_dataset
from mprd.engine.trainer import Hooks, Trainer, fit
from mprd.errors import UserError
from mprd.evaluate.epoch_metrics import epoch_row
from mprd.pairs.labellers import Labels, gather_labels
from mprd.runtime.distributed import WorkerGroup, batch_groups, joined_workers, split_evenly
from tests.conftest import TINY

CPU = torch.device("cpu")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def enter(rank: int, size: int, port: int, work: Callable[..., Any], args: tuple, path: Path) -> None:
    """Join the group, do the work, and leave its value or its traceback in a file."""
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo",
            init_method=f"tcp://127.0.0.1:{port}",
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=120),
        )
        value = work(joined_workers(CPU), *args)
        dist.barrier()
        dist.destroy_process_group()
        path.write_bytes(pickle.dumps(value))
    except BaseException:
        path.with_suffix(".error").write_text(traceback.format_exc())
        raise


def on_workers(size: int, work: Callable[..., Any], *args: Any, folder: Path) -> list[Any]:
    """Run `work(workers, *args)` in so many processes and return their values; forked, to import torch once."""
    context, port = multiprocessing.get_context("fork"), free_port()
    paths = [folder / f"{work.__name__}-{size}-{rank}.pickle" for rank in range(size)]
    processes = [
        context.Process(target=enter, args=(rank, size, port, work, args, path)) for rank, path in enumerate(paths)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
    errors = [path.with_suffix(".error").read_text() for path in paths if path.with_suffix(".error").exists()]
    assert not errors, errors[0]
    assert [process.exitcode for process in processes] == [0] * size
    return [pickle.loads(path.read_bytes()) for path in paths]


# -- shares ---------------------------------------------------------------------------------------


def test_rows_are_divided_evenly_and_in_order() -> None:
    assert split_evenly(7, 3) == [3, 2, 2]
    assert [WorkerGroup(rank, 3).shard(7).own for rank in range(3)] == [slice(0, 3), slice(3, 5), slice(5, 7)]
    assert WorkerGroup(1, 3).shard(7).weight == 2 / 7
    assert WorkerGroup(2, 3).shard(2).own == slice(2, 2)
    assert WorkerGroup(0, 2).shard(0).weight == 0


def test_groups_are_nearly_equal_and_never_smaller_than_asked() -> None:
    assert batch_groups(32, 0) == [32]
    assert batch_groups(32, 8) == [8, 8, 8, 8]
    assert batch_groups(31, 8) == [11, 10, 10]
    assert batch_groups(5, 8) == [5]


def test_a_group_stays_with_one_worker_where_there_are_enough_groups() -> None:
    assert WorkerGroup(0, 2).shard(31, groups=[11, 10, 10]).edges == (0, 21, 31)
    assert WorkerGroup(0, 4).shard(31, groups=[11, 10, 10]).edges == (0, 8, 16, 24, 31)


def test_one_process_alone_hands_back_what_it_was_given() -> None:
    workers, rows = WorkerGroup(), torch.rand(3, 2, requires_grad=True)
    assert workers.gather(rows, [3]) is rows
    assert workers.join(rows, [3]) is rows
    assert workers.sum(rows) is rows
    assert workers.any(True) is True
    network = nn.Sequential(nn.BatchNorm2d(2))
    replace_batch_norms(network, BatchSplit(workers, 0))
    assert type(network[0]) is nn.BatchNorm2d


# -- messages -------------------------------------------------------------------------------------


LARGE_ID = 2**40 + 1


def uneven_labels(rank: int) -> Labels:
    """One image's labels, each table wider on another worker."""
    ids = torch.full((1, 2 - rank), rank)
    positives, likelihoods = torch.full((1, 1 + rank), [LARGE_ID, 1][rank]), torch.full(ids.shape, 0.1)
    return Labels(positives, ids, likelihoods, num_candidates=2 - rank, num_capped=2 + rank)


def exchange(workers: WorkerGroup) -> dict[str, Any]:
    rank = workers.rank
    rows = torch.arange(6.0).view(3, 2)[workers.shard(3).own].requires_grad_()
    joined = workers.join(rows, [2, 1])
    (joined * torch.tensor([[1.0], [10.0], [100.0]])).sum().backward()
    weight = torch.zeros(2, 2, requires_grad=True)
    unused, frozen = torch.zeros(1, requires_grad=True), torch.zeros(1)
    weight.grad = torch.full((2, 2), float(rank + 1))
    whole = workers.sum_gradients([weight, unused, frozen], torch.tensor(rank + 0.25))
    return {
        "gathered": workers.gather(rows, [2, 1]),
        "joined": joined.detach(),
        "own gradient": rows.grad,
        "labels": gather_labels(uneven_labels(rank), [1, 1], workers),
        "empty": workers.gather(torch.ones(1 - rank, 2), [1, 0]),
        "sum": workers.sum_number(rank + 1.5),
        "any": (workers.any(rank == 1), workers.any(False)),
        "gradients": (weight.grad, unused.grad, frozen.grad),
        "loss": float(whole),
    }


def test_two_workers_gather_join_and_sum(tmp_path: Path) -> None:
    first, second = on_workers(2, exchange, folder=tmp_path)
    for answer in (first, second):
        assert answer["gathered"].tolist() == [[0, 1], [2, 3], [4, 5]]
        assert answer["joined"].tolist() == [[0, 1], [2, 3], [4, 5]]
        labels = answer["labels"]
        assert labels.positives.tolist() == [[LARGE_ID, -1], [1, 1]]
        assert labels.candidates.tolist() == [[0, 0], [1, -1]]
        assert torch.equal(labels.likelihoods, torch.tensor([[0.1, 0.1], [0.1, 0.0]]))
        assert labels.overlaps is None
        assert (labels.num_candidates, labels.num_capped) == (3, 5)
        assert answer["empty"].tolist() == [[1, 1]]
        assert answer["sum"] == 4.0
        assert answer["any"] == (True, False)
        weight, unused, frozen = answer["gradients"]
        assert (weight.tolist(), unused.tolist(), frozen) == ([[3, 3], [3, 3]], [0], None)
        assert answer["loss"] == 1.5
    assert first["own gradient"].tolist() == [[1, 1], [10, 10]]
    assert second["own gradient"].tolist() == [[100, 100]]


# -- batch norm -----------------------------------------------------------------------------------


def by_hand(maps: Tensor, norm: nn.Module, groups: list[int]) -> Tensor:
    """Normalize each group as the definition says, through plain differentiable operations."""
    shape = (1, -1) + (1,) * (maps.ndim - 2)
    axes = [axis for axis in range(maps.ndim) if axis != 1]
    parts = []
    for part in maps.split(groups):
        mean = part.mean(axes, keepdim=True)
        variance = ((part - mean) ** 2).mean(axes, keepdim=True)
        parts.append((part - mean) / (variance + norm.eps).sqrt() * norm.weight.view(shape) + norm.bias.view(shape))
    return torch.cat(parts)


def make_norm(shape: tuple[int, ...]) -> tuple[nn.Module, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(5)
    norm = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1]).double()
    with torch.no_grad():
        norm.weight.copy_(torch.rand(shape[1], generator=draw, dtype=torch.float64) + 0.5)
        norm.bias.copy_(torch.rand(shape[1], generator=draw, dtype=torch.float64))
    return norm, *(torch.randn(shape, generator=draw, dtype=torch.float64) * 3 + 1 for _ in range(2))


def normalize(workers: WorkerGroup, shape: tuple[int, ...], bn_group: int) -> dict[str, Any]:
    """Normalize this worker's share, and run a weighted sum of it back."""
    norm, maps, weights = make_norm(shape)
    network, cut = nn.Sequential(norm), BatchSplit(workers, bn_group)
    replace_batch_norms(network, cut)
    shares = cut.shard(shape[0])
    cut.set_batch(shape[0])
    own = maps[shares.own].clone().requires_grad_()
    out = network(own)
    cut.sync_running_stats()
    (out * weights[shares.own]).sum().backward()
    workers.sum_gradients(network.parameters(), out.sum())
    return {
        "out": workers.gather(out, shares.counts).detach(),
        "maps": workers.gather(own.grad, shares.counts),
        "weight": network[0].weight.grad,
        "bias": network[0].bias.grad,
        "state": network.state_dict(),
    }


def expected(shape: tuple[int, ...], bn_group: int) -> dict[str, Any]:
    norm, maps, weights = make_norm(shape)
    maps.requires_grad_()
    groups = batch_groups(shape[0], bn_group)
    out = by_hand(maps, norm, groups)
    (out * weights).sum().backward()
    plain = make_norm(shape)[0]
    moved = []
    for part in maps.detach().split(groups):
        once = make_norm(shape)[0]
        once(part)
        moved.append((once.running_mean, once.running_var))
    state = plain.state_dict()
    state["running_mean"] = torch.stack([mean for mean, _ in moved]).mean(0)
    state["running_var"] = torch.stack([variance for _, variance in moved]).mean(0)
    state["num_batches_tracked"] += 1
    return {"out": out.detach(), "maps": maps.grad, "weight": norm.weight.grad, "bias": norm.bias.grad, "state": state}


# whole batch; groups that fall to one worker each; one that both hold; more groups than workers
BATCHES = [((8, 3, 4, 2), 0), ((7, 5), 0), ((8, 3, 2, 2), 4), ((7, 3), 6), ((9, 3, 2, 2), 3)]


def normalize_all(workers: WorkerGroup) -> list[dict[str, Any]]:
    return [normalize(workers, shape, bn_group) for shape, bn_group in BATCHES]


def assert_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in ("out", "maps", "weight", "bias"):
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-12)
    for name, tensor in wanted["state"].items():
        torch.testing.assert_close(found["state"][f"0.{name}"], tensor, rtol=0, atol=1e-12)


def test_batch_norm_on_two_workers_is_that_of_the_global_batch(tmp_path: Path) -> None:
    for answers in on_workers(2, normalize_all, folder=tmp_path):
        for (shape, bn_group), found in zip(BATCHES, answers, strict=True):
            assert_close(found, expected(shape, bn_group))


def count_messages(workers: WorkerGroup) -> list[int]:
    """Count the messages of a network with two norms, forward, under statistics of the whole batch and of groups."""
    counts = []
    for bn_group in (0, 4):
        network, cut = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)), BatchSplit(workers, bn_group)
        replace_batch_norms(network, cut)
        cut.set_batch(8)
        messages = [mock.patch.object(dist, name, wraps=getattr(dist, name)) for name in ("all_gather", "all_reduce")]
        with messages[0] as gather, messages[1] as reduce:
            network(torch.rand(4, 3))
            cut.sync_running_stats()
        counts.append(gather.call_count + reduce.call_count)
    return counts


def test_groups_that_nobody_divides_cost_one_message_for_all_norms(tmp_path: Path) -> None:
    assert on_workers(2, count_messages, folder=tmp_path) == [[2, 1], [2, 1]]


@pytest.mark.parametrize(("shape", "bn_group"), [((8, 3, 2, 2), 4), ((7, 3), 2), ((5, 3), 5)])
def test_batch_norm_by_groups_on_one_worker_follows_the_definition(shape: tuple[int, ...], bn_group: int) -> None:
    assert_close(normalize(WorkerGroup(), shape, bn_group), expected(shape, bn_group))


def test_batch_norm_by_groups_passes_gradcheck() -> None:
    norm, maps, _ = make_norm((6, 2, 2, 1))
    network, cut = nn.Sequential(norm), BatchSplit(WorkerGroup(), 3)
    replace_batch_norms(network, cut)
    cut.set_batch(6)
    assert torch.autograd.gradcheck(network, (maps.requires_grad_(),))


def test_batch_norm_in_evaluation_is_torchs() -> None:
    norm, maps, _ = make_norm((6, 2))
    plain = make_norm((6, 2))[0].eval()
    network = nn.Sequential(norm)
    replace_batch_norms(network, BatchSplit(WorkerGroup(), 3))
    assert torch.equal(network.eval()(maps), plain(maps))


# -- the loop -------------------------------------------------------------------------------------


def run(workers: WorkerGroup, root: Path, overrides: tuple[str, ...]) -> dict[str, Any]:
    """Train on the tiny data set; return the state, the losses and figures of each epoch.

    In float64: a rounding in another order moves a float32 loss by 1e-7, and a hard negative that changes places
    for it makes 1e-3 of that within two epochs. In float64 nothing but a mistake is above 1e-9.
    """
    config: Config = load_config("demo", overrides=(*TINY, *overrides), values={"data": {"root": root}})
    dataset = load_dataset(config.data, cache_dir=Path("unused"))
    rows: list[dict[str, Any]] = []

    def after_epoch(trainer: Trainer) -> None:
        rows.append(epoch_row(trainer))

    trainer = Trainer(config, dataset, device=CPU, hooks=Hooks(after_epoch=after_epoch), workers=workers)
    trainer.fill_memory()
    fit(trainer)
    state = trainer.state
    images = torch.arange(len(dataset.train))
    return {
        "rows": rows,
        "memory": state.memory.features,
        "positives": state.positives.mask(images),
        "backbone": state.backbone.state_dict(),
        "gcn": state.gcn.state_dict(),
    }


@contextlib.contextmanager
def in_float64() -> Iterator[None]:
    plain = features.image_batches

    def doubled(*args: Any, **kwargs: Any) -> Iterator[Tensor]:
        return (images.double() for images in plain(*args, **kwargs))

    torch.set_default_dtype(torch.float64)
    features.image_batches = doubled
    try:
        yield
    finally:
        features.image_batches = plain
        torch.set_default_dtype(torch.float32)


def run_all(workers: WorkerGroup, root: Path) -> list[dict[str, Any]]:
    with in_float64():
        return [run(workers, root, overrides) for overrides in RUNS]


def run_plain(workers: WorkerGroup, root: Path) -> dict[str, Any]:
    return run(workers, root, CALM)


# a rate at which rounding does not grow
CALM = ("train.lr_new=0.002",)


# 7 does not divide 24, so that batches are uneven and no worker's share is the same as the next
RUNS = [
    (),
    ("train.batch_size=7", "pairs.refresh=epoch", "memory.start_mode=train", "backbone.recalibrate_bn=true"),
    ("backbone.bn_group=4", "neighbors.source=mean", "pairs.decide=agreement", "pairs.mu=0.1"),
    ("backbone.bn_group=6", "pairs.labeller=mplp", "memory.update=before"),
]


@pytest.fixture(scope="module")
def two(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], list[dict]]:
    first, second = on_workers(2, run_all, tiny_root, folder=tmp_path_factory.mktemp("two"))
    return first, second


@pytest.mark.parametrize("number", range(len(RUNS)))
def test_two_workers_end_where_one_does(number: int, two: tuple[list[dict], list[dict]], tiny_root: Path) -> None:
    with in_float64():
        alone = run(WorkerGroup(), tiny_root, RUNS[number])
    first, second = (answers[number] for answers in two)
    assert_same_run(alone, first, atol=1e-8)
    # the workers themselves hold the same bits
    for part in ("backbone", "gcn"):
        assert all(torch.equal(tensor, second[part][name]) for name, tensor in first[part].items())
    assert torch.equal(first["memory"], second["memory"])
    assert torch.equal(first["positives"], second["positives"])


def assert_same_run(alone: dict[str, Any], shared: dict[str, Any], *, atol: float) -> None:
    torch.testing.assert_close(shared["memory"], alone["memory"], rtol=0, atol=atol)
    assert torch.equal(shared["positives"], alone["positives"])
    assert len(alone["rows"]) == len(shared["rows"]) == 3
    for one, other in zip(alone["rows"], shared["rows"], strict=True):
        for name in ("cnn_loss", "gcn_loss", "mAP", "label_free_score", "pair_precision", "gcn_auc", "neighbors"):
            wanted = None if one.get(name) is None else pytest.approx(one[name], abs=atol)
            assert other.get(name) == wanted, name
    for part in ("backbone", "gcn"):
        for name, tensor in alone[part].items():
            torch.testing.assert_close(shared[part][name], tensor, rtol=0, atol=atol, msg=name)


def test_two_workers_end_within_1e_4_of_one_in_float32(tiny_root: Path, tmp_path: Path) -> None:
    alone = run(WorkerGroup(), tiny_root, CALM)
    for shared in on_workers(2, run_plain, tiny_root, folder=tmp_path)[:1]:
        assert_same_run(alone, shared, atol=1e-4)


def test_more_workers_than_images_in_a_batch_are_refused(tiny_config: Config) -> None:
    dataset = load_dataset(tiny_config.data, cache_dir=Path("unused"))
    with pytest.raises(UserError, match=r"train\.batch_size: a batch of 8 is too small for 9 workers"):
        Trainer(tiny_config, dataset, device=CPU, hooks=Hooks(), workers=WorkerGroup(0, 9))


def test_a_group_of_one_image_is_refused() -> None:
    with pytest.raises(UserError, match=r"backbone\.bn_group must be 0 or at least 2"):
        load_config("demo", overrides=("backbone.bn_group=1",))
