"""Features of a set of images under the backbone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeGuard

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from mprd.backbone.batch_norm import BatchCut
from mprd.backbone.network import Backbone
from mprd.data.images import PlainImages, TrainImages, make_loader
from mprd.runtime.device import more_threads, send, send_pixels
from mprd.runtime.distributed import BatchShard

AT_ONCE = 512
"""Images that an accelerator augments in one go."""


def ordered_batches(ids: Tensor, batch_size: int) -> list[list[int]]:
    """Cut ids, in their order, into batches of nearly equal size, none larger than `batch_size`."""
    num_batches = -(-len(ids) // batch_size)
    return [chunk.tolist() for chunk in ids.tensor_split(num_batches)] if num_batches else []


def image_batches(
    images: Dataset, batches: Sequence[Sequence[int]], *, num_workers: int, device: torch.device
) -> Iterator[Tensor]:
    """Yield images `[B, 3, H, W]` on the device, in the order of `batches`."""
    if is_made_here(images, device):
        yield from made_on_device(images, batches, device=device)
        return
    for batch, _ in make_loader(images, batches, num_workers=num_workers):
        yield send_pixels(batch, device)


def is_made_here(images: Dataset, device: torch.device) -> TypeGuard[TrainImages | PlainImages]:
    """Say whether batches are made in this process and not by the loader's."""
    return isinstance(images, TrainImages | PlainImages) and images.is_batched(device)


def made_on_device(
    images: TrainImages | PlainImages, batches: Sequence[Sequence[int]], *, device: torch.device
) -> Iterator[Tensor]:
    """Yield batches made on the device, several in one go so that an accelerator is not kept waiting for launches."""
    many = 1 if device.type == "cpu" or not batches else max(1, AT_ONCE // max(1, len(batches[0])))
    for start in range(0, len(batches), many):
        group = batches[start : start + many]
        ids = np.concatenate([np.asarray(batch, dtype=np.int64) for batch in group])
        yield from images.batch(ids, device).split([*map(len, group)])


def shared_batches(
    images: Dataset, batches: list[list[int]], cut: BatchCut, *, num_workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield this worker's images of each global batch, and the ids of the whole batch `[B]`, on the device.

    The cut is set to the batch before it is handed out; a batch without an image for this worker is left out.
    """
    own = [batch[cut.shard(len(batch)).own] for batch in batches]
    held = [number for number, ids in enumerate(own) if ids]
    stream = image_batches(images, [own[number] for number in held], num_workers=num_workers, device=device)
    everyones = send([index for batch in batches for index in batch], device, dtype=torch.int64)
    ids = everyones.split([*map(len, batches)])
    for number, shown in zip(held, stream, strict=True):
        cut.set_batch(len(batches[number]))
        yield shown, ids[number]


@torch.inference_mode()
def stream_features(
    backbone: Backbone, images: Dataset, batches: Sequence[Sequence[int]], *, num_workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the ids `[B]` on the CPU and the unit features `[B, D]` of batch after batch, in one process.

    The backbone is used in the mode it is in.
    """
    for shown, ids in make_loader(images, batches, num_workers=num_workers):
        yield ids, backbone(send_pixels(shown, device))


@torch.no_grad()
def extract(
    backbone: Backbone,
    images: Dataset,
    *,
    batch_size: int,
    num_workers: int,
    device: torch.device,
    ids: Tensor | None = None,
    mode: str = "eval",
) -> tuple[Tensor, Tensor]:
    """Return unit features after and before the appended batch norm, each `[n, D]`, in the order of `ids`.

    Each worker extracts its share of every batch, and all get all features.

    Args:
        ids: `[n]`, which images; all when None.
        mode: `eval`, or `train` for batch statistics (and then the running ones move).
    """
    was_training = backbone.training
    backbone.train(mode == "train")
    wanted = torch.arange(len(images)) if ids is None else ids.cpu()  # type: ignore[arg-type]
    batches = ordered_batches(wanted, batch_size)
    shards = [backbone.cut.shard(len(batch)) for batch in batches]
    num_own = sum(shard.counts[shard.rank] for shard in shards)
    after = torch.empty(num_own, backbone.num_features, device=device)
    before = torch.empty_like(after)
    start = 0
    # what is made here leaves the loader's processes idle; statistics of a batch would depend on the number of threads
    with more_threads(num_workers if mode == "eval" and is_made_here(images, device) else 0):
        for batch, _ in shared_batches(images, batches, backbone.cut, num_workers=num_workers, device=device):
            rows = slice(start, start + len(batch))
            after[rows], before[rows] = backbone.features(batch)
            start += len(batch)
    backbone.train(was_training)
    return collect(after, shards, backbone.cut), collect(before, shards, backbone.cut)


def collect(rows: Tensor, shards: list[BatchShard], cut: BatchCut) -> Tensor:
    """Gather rows that each worker has of every batch, and put them in the order of the batches."""
    workers = cut.workers
    if workers.size == 1:
        return rows
    parts = [[shard.counts[rank] for shard in shards] for rank in range(workers.size)]
    gathered = workers.gather(rows, [sum(counts) for counts in parts])
    by_worker = [part.split(counts) for part, counts in zip(gathered.split([*map(sum, parts)]), parts, strict=True)]
    return torch.cat([rows[:0], *(piece for pieces in zip(*by_worker, strict=True) for piece in pieces)])
