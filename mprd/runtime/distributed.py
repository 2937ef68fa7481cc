"""The processes that train one model together: which rows of a batch each holds, and what they share.

The batch is global: its images, their order and all that is computed from it are the same however many
processes divide it. One process alone sends nothing and copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

GATHERED = 2**18
"""Numbers up to which a sum is taken of what everybody gathers: gloo needs less than half the time of its own sum."""


@dataclass(frozen=True)
class BatchShard:
    """Who holds which rows: worker r those from `edges[r]` up to `edges[r + 1]`."""

    edges: tuple[int, ...]
    rank: int

    @property
    def own(self) -> slice:
        """The rows of this worker."""
        return slice(self.edges[self.rank], self.edges[self.rank + 1])

    @property
    def weight(self) -> float:
        """This worker's part of all rows."""
        return (self.own.stop - self.own.start) / max(1, self.edges[-1])

    @property
    def counts(self) -> list[int]:
        """Rows of each worker."""
        return [stop - start for start, stop in pairwise(self.edges)]


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of one model. Every worker must make the same calls in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this worker is the one that writes and prints."""
        return self.rank == 0

    def shard(self, num_rows: int, *, groups: list[int] | None = None) -> BatchShard:
        """Divide rows evenly and in order; whole groups of them where there are enough groups to go round."""
        if groups is None or len(groups) < self.size:
            return BatchShard(edges_of(split_evenly(num_rows, self.size)), self.rank)
        ends = edges_of(groups)
        return BatchShard(tuple(ends[group] for group in edges_of(split_evenly(len(groups), self.size))), self.rank)

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Put the rows `[n_r, ...]` of all workers one behind the other; `counts` are their n_r."""
        if self.size == 1:
            return rows
        padded = F.pad(rows.detach(), (0, 0) * (rows.ndim - 1) + (0, max(counts) - len(rows)))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def join(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Gather rows; gradients flow into this worker's own alone, so that their sum is the whole gradient."""
        if self.size == 1:
            return rows
        parts = list(self.gather(rows, counts).split(counts))
        parts[self.rank] = rows
        return torch.cat(parts)

    def sum(self, value: Tensor) -> Tensor:
        """Add up a tensor over the workers; it must be the same shape everywhere."""
        if self.size == 1:
            return value
        if value.numel() <= GATHERED:
            return self.gather(value[None], [1] * self.size).sum(0)
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def sum_number(self, value: float) -> float:
        """Add up a number over the workers."""
        return value if self.size == 1 else float(self.sum(torch.tensor(value, device=self.device)))

    def any(self, flag: bool) -> bool:
        """Say whether any worker's flag is up."""
        return self.sum_number(float(flag)) > 0

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor], part: Tensor) -> Tensor:
        """Replace each gradient by its sum over the workers, and return that of their parts of the loss, in one."""
        if self.size == 1:
            return part.detach()
        trained = [parameter for parameter in parameters if parameter.requires_grad]
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([*(gradient.flatten() for gradient in gradients), part.detach().reshape(1)])
        *totals, whole = self.sum(flat).split([*(parameter.numel() for parameter in trained), 1])
        for parameter, total in zip(trained, totals, strict=True):
            parameter.grad = total.view_as(parameter)
        return whole[0]


def joined_workers(device: torch.device) -> WorkerGroup:
    """Return the workers of torch's process group, or that of one process where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return WorkerGroup(device=device)
    return WorkerGroup(dist.get_rank(), dist.get_world_size(), device)


def split_evenly(num_rows: int, num_parts: int) -> list[int]:
    """Divide a number into parts that differ by at most one, the larger ones first."""
    low, extra = divmod(num_rows, num_parts)
    return [low + (part < extra) for part in range(num_parts)]


def edges_of(sizes: list[int]) -> tuple[int, ...]:
    """Return where parts of these sizes begin and end: 0, and each running sum."""
    return (0, *accumulate(sizes))


def batch_groups(num_images: int, bn_group: int) -> list[int]:
    """Return the sizes of the groups that batch norm takes its statistics over.

    The whole batch under 0; otherwise nearly equal groups of at least `bn_group` images, so that none is tiny.
    """
    return split_evenly(num_images, max(1, num_images // bn_group) if bn_group else 1)
