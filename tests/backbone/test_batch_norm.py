"""Batch norm over the global batch and over groups, on one worker and on two, against its definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mprd.backbone.batch_norm import BatchSplit, replace_batch_norms
from mprd.runtime.distributed import WorkerGroup, batch_groups
from tests.workers import on_workers


def by_hand(maps: Tensor, norm: nn.Module, groups: list[int]) -> Tensor:
    """Normalize each group by the definition, with plain differentiable operations."""
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
    """Normalize this worker's shard, and backpropagate a weighted sum of it."""
    norm, maps, weights = make_norm(shape)
    network, batch_split = nn.Sequential(norm), BatchSplit(workers, bn_group)
    replace_batch_norms(network, batch_split)
    shard = batch_split.shard(shape[0])
    batch_split.set_batch(shape[0])
    own = maps[shard.own].clone().requires_grad_()
    out = network(own)
    batch_split.sync_running_stats()
    (out * weights[shard.own]).sum().backward()
    workers.sum_gradients(network.parameters(), out.sum())
    return {
        "out": workers.gather(out, shard.counts).detach(),
        "maps": workers.gather(own.grad, shard.counts),
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


# the whole batch; groups within a worker; a group that spans both; more groups than workers
BATCHES = [((8, 3, 4, 2), 0), ((7, 5), 0), ((8, 3, 2, 2), 4), ((7, 3), 6), ((9, 3, 2, 2), 3)]


def normalize_all(workers: WorkerGroup) -> list[dict[str, Any]]:
    return [normalize(workers, shape, bn_group) for shape, bn_group in BATCHES]


def assert_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for name in ("out", "maps", "weight", "bias"):
        torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-12)
    for name, tensor in wanted["state"].items():
        torch.testing.assert_close(found["state"][f"0.{name}"], tensor, rtol=0, atol=1e-12)


def test_batch_norm_on_two_workers_is_that_of_the_global_batch(tmp_path: Path) -> None:
    for results in on_workers(2, normalize_all, folder=tmp_path):
        for (shape, bn_group), found in zip(BATCHES, results, strict=True):
            assert_close(found, expected(shape, bn_group))


@pytest.mark.parametrize(("shape", "bn_group"), [((8, 3, 2, 2), 4), ((7, 3), 2), ((5, 3), 5)])
def test_batch_norm_by_groups_on_one_worker_follows_the_definition(shape: tuple[int, ...], bn_group: int) -> None:
    assert_close(normalize(WorkerGroup(), shape, bn_group), expected(shape, bn_group))


def test_batch_norm_by_groups_passes_gradcheck() -> None:
    norm, maps, _ = make_norm((6, 2, 2, 1))
    network, batch_split = nn.Sequential(norm), BatchSplit(WorkerGroup(), 3)
    replace_batch_norms(network, batch_split)
    batch_split.set_batch(6)
    assert torch.autograd.gradcheck(network, (maps.requires_grad_(),))


def test_batch_norm_in_evaluation_is_torchs() -> None:
    norm, maps, _ = make_norm((6, 2))
    plain = make_norm((6, 2))[0].eval()
    network = nn.Sequential(norm)
    replace_batch_norms(network, BatchSplit(WorkerGroup(), 3))
    assert torch.equal(network.eval()(maps), plain(maps))


@pytest.mark.parametrize("shape", [(5, 3), (5, 3, 4, 2)])
@pytest.mark.parametrize("bn_group", [0, 2])
def test_evaluation_takes_the_statistics_of_each_images_camera(shape: tuple[int, ...], bn_group: int) -> None:
    norm, maps, _ = make_norm(shape)
    network, split = nn.Sequential(norm), BatchSplit(WorkerGroup(), bn_group)
    replace_batch_norms(network, split, by_camera=True)
    moments = torch.rand(3, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 0.5
    network[0].camera_moments = moments
    split.cameras = torch.tensor([0, 2, 1, 1, 0])
    found = network.eval()(maps)
    for image, camera, row in zip(maps, split.cameras, found, strict=True):
        mean, variance = (part.view(-1, *(1,) * (maps.ndim - 2)) for part in moments[camera])
        weight, bias = (part.view_as(mean) for part in (norm.weight, norm.bias))
        torch.testing.assert_close(row, (image - mean) / (variance + norm.eps).sqrt() * weight + bias)
    # bfloat16 maps are rounded once, not scale and shift as well
    coarse = maps.bfloat16()
    exact = network(coarse.double())
    torch.testing.assert_close(network.float()(coarse), exact.bfloat16(), atol=0, rtol=2**-9)
    network.double()
    # training does not read them
    split.set_batch(5)
    trained = network.train()(maps)
    network[0].camera_moments, split.cameras = None, None
    assert torch.equal(network(maps), trained)


def test_one_worker_without_groups_keeps_torchs_batch_norm() -> None:
    network = nn.Sequential(nn.BatchNorm2d(2))
    replace_batch_norms(network, BatchSplit(WorkerGroup(), 0))
    assert type(network[0]) is nn.BatchNorm2d
