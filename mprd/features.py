"""Features of a set of images under the backbone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Dataset

from mprd.backbone import Backbone
from mprd.data.images import make_loader


def ordered_batches(ids: Tensor, batch_size: int) -> list[list[int]]:
    """Cut ids, in their order, into batches of nearly equal size, none larger than `batch_size`."""
    num_batches = -(-len(ids) // batch_size)
    return [chunk.tolist() for chunk in ids.tensor_split(num_batches)] if num_batches else []


def image_batches(
    images: Dataset, batches: list[list[int]], *, num_workers: int, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield images `[B, 3, H, W]` and their ids `[B]` on the device, in the order of `batches`."""
    for batch, batch_ids in make_loader(images, batches, num_workers=num_workers):
        yield batch.to(device, non_blocking=True), batch_ids.to(device, non_blocking=True)


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

    Args:
        ids: `[n]`, which images; all when None.
        mode: `eval`, or `train` for batch statistics (and then the running ones move).
    """
    was_training = backbone.training
    backbone.train(mode == "train")
    wanted = torch.arange(len(images)) if ids is None else ids.cpu()  # type: ignore[arg-type]
    after = torch.empty(len(wanted), backbone.num_features, device=device)
    before = torch.empty_like(after)
    start = 0
    batches = ordered_batches(wanted, batch_size)
    for batch, _ in image_batches(images, batches, num_workers=num_workers, device=device):
        rows = slice(start, start + len(batch))
        after[rows], before[rows] = backbone.features(batch)
        start += len(batch)
    backbone.train(was_training)
    return after, before
