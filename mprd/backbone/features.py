"""Batches of images on a device, and the features of a set of images."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor

from mprd.backbone.batch_norm import BatchSplit
from mprd.backbone.network import Backbone, estimate_camera_bn
from mprd.data.images import PlainImages, TrainImages
from mprd.data.loaders import ImageLoader, Images
from mprd.runtime.device import more_threads, send, send_pixels
from mprd.runtime.distributed import BatchShard, WorkerGroup

AUGMENT_IMAGES = 512
"""Images augmented together on an accelerator, to amortize kernel launches."""


def ordered_batches(ids: Tensor, batch_size: int, *, is_normalized: bool = False) -> list[list[int]]:
    """Split ids, in their order, into batches of nearly equal size, none larger than `batch_size`.

    Args:
        is_normalized: whether a batch norm in training mode sees the batches: one image has no variance, so a batch
            then has at least two, and one of them an image more than `batch_size` where need be.
    """
    num_batches = -(-len(ids) // batch_size)
    if is_normalized:
        num_batches = min(num_batches, max(1, len(ids) // 2))
    return [chunk.tolist() for chunk in ids.tensor_split(num_batches)] if num_batches else []


def image_batches(
    images: Images, batches: Sequence[Sequence[int]], *, num_workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield images `[B, 3, H, W]` on the device, in the order of `batches`."""
    if needs_no_loader(images, device):
        yield from device_batches(images, batches, device=device)
        return
    for batch, _ in ImageLoader(images, batches, num_workers=num_workers, pin=device.type == "cuda"):
        yield send_pixels(batch, device)


def needs_no_loader(images: Images, device: torch.device) -> TypeGuard[TrainImages | PlainImages]:
    """Return whether batches are built on the device, in this process, from packed images."""
    return isinstance(images, TrainImages | PlainImages) and images.is_batched(device)


def device_batches(
    images: TrainImages | PlainImages, batches: Sequence[Sequence[int]], *, device: torch.device
) -> Iterator[Tensor]:
    """Yield batches built on the device, on an accelerator several together."""
    many = 1 if device.type == "cpu" or not batches else max(1, AUGMENT_IMAGES // max(1, len(batches[0])))
    for start in range(0, len(batches), many):
        group = batches[start : start + many]
        ids = np.concatenate([np.asarray(batch, dtype=np.int64) for batch in group])
        yield from images.batch(ids, device).split([*map(len, group)])


def sharded_batches(
    images: Images, batches: list[list[int]], batch_split: BatchSplit, *, num_workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this worker's shard of each global batch, and the ids `[B]` of the whole batch, on the device.

    `batch_split` is set to each batch before it is yielded. Batches of which this worker has no image are skipped.
    """
    own = [batch[batch_split.shard(len(batch)).own] for batch in batches]
    held = [number for number, ids in enumerate(own) if ids]
    stream = image_batches(images, [own[number] for number in held], num_workers=num_workers, device=device)
    ids = send([index for batch in batches for index in batch], device, dtype=torch.int64).split([*map(len, batches)])
    for number, shown in zip(held, stream, strict=True):
        batch_split.set_batch(len(batches[number]))
        yield shown, ids[number]


@torch.inference_mode()
def stream_features(
    backbone: Backbone,
    images: Images,
    batches: Sequence[Sequence[int]],
    *,
    num_workers: int,
    device: torch.device,
    cameras: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the ids `[B]` on the CPU and the unit features `[B, D]` of each batch, in one process.

    The backbone's mode is not changed.

    Args:
        cameras: of all images, see `Backbone.forward`.
    """
    for shown, ids in ImageLoader(images, batches, num_workers=num_workers, pin=device.type == "cuda"):
        # PlainImages marks an unreadable file by a negative id
        rows = None if cameras is None else cameras[ids.where(ids >= 0, ~ids)].to(device)
        yield ids, backbone(send_pixels(shown, device), rows)


@torch.no_grad()
def extract(
    backbone: Backbone,
    images: Images,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    ids: Tensor | None = None,
    cameras: Tensor | None = None,
    mode: str = "eval",
) -> tuple[Tensor, Tensor]:
    """Return unit features after and before the appended batch norm, each `[n, D]`, in the order of `ids`.

    Each worker extracts its shard of every batch; all workers return all features.

    Args:
        ids: `[n]`, the images; all when None.
        cameras: of all images, see `Backbone.forward`.
        mode: `eval`, or `train` for batch statistics, which also updates the running ones.
    """
    was_training = backbone.training
    backbone.train(mode == "train")
    wanted = torch.arange(len(images)) if ids is None else ids.cpu()
    batches = ordered_batches(wanted, batch_size, is_normalized=mode == "train")
    batch_split = backbone.batch_split
    shards = [batch_split.shard(len(batch)) for batch in batches]
    own = [row for batch, shard in zip(batches, shards, strict=True) for row in batch[shard.own]]
    own_cameras = None if cameras is None else cameras[own].to(device)
    after = torch.empty(len(own), backbone.num_features, device=device)
    before = torch.empty_like(after)
    start = 0
    # without loader processes their cores are free; batch statistics would depend on the number of threads
    with more_threads(num_workers if mode == "eval" and needs_no_loader(images, device) else 0):
        for batch, _ in sharded_batches(images, batches, batch_split, num_workers=num_workers, device=device):
            rows = slice(start, start + len(batch))
            after[rows], before[rows] = backbone.features(batch, None if own_cameras is None else own_cameras[rows])
            start += len(batch)
    backbone.train(was_training)
    return gather_batches(after, shards, batch_split.workers), gather_batches(before, shards, batch_split.workers)


def recalibrate(
    backbone: Backbone,
    images: Images,
    samples: Sequence[Tensor],
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    on_images: Callable[[int], None] = lambda _: None,
) -> None:
    """Estimate batch-norm statistics by `estimate_camera_bn`, given ids of each camera's images and last of all.

    Args:
        on_images: called after each batch with the number of its images.
    """

    def batches(ids: Tensor) -> Iterator[Tensor]:
        many, split = ordered_batches(ids, batch_size, is_normalized=True), backbone.batch_split
        for shown, _ in sharded_batches(images, many, split, num_workers=num_workers, device=device):
            yield shown
            on_images(len(shown))

    estimate_camera_bn(backbone, [(len(ids), batches(ids)) for ids in samples])


def gather_batches(rows: Tensor, shards: list[BatchShard], workers: WorkerGroup) -> Tensor:
    """Gather each worker's rows of every batch, and return them in the order of the batches."""
    if workers.size == 1:
        return rows
    parts = [[shard.counts[rank] for shard in shards] for rank in range(workers.size)]
    gathered = workers.gather(rows, [sum(counts) for counts in parts])
    by_worker = [part.split(counts) for part, counts in zip(gathered.split([*map(sum, parts)]), parts, strict=True)]
    return torch.cat([rows[:0], *(piece for pieces in zip(*by_worker, strict=True) for piece in pieces)])
