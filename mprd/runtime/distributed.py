"""The processes that train one model: their shards of a batch, and the collectives between them.

The batch is global: its images, their order and all results are the same for every number of workers. A single worker
communicates and copies nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

GATHER_LIMIT = 2**18
"""Elements up to which `sum` uses all_gather, which beats gloo's all_reduce."""


@dataclass(frozen=True)
class BatchShard:
    """The shards of a batch: rank r holds the rows `edges[r]` to `edges[r + 1]`."""

    edges: tuple[int, ...]
    rank: int

    @property
    def own(self) -> slice:
        """The rows of this rank."""
        return slice(self.edges[self.rank], self.edges[self.rank + 1])

    @property
    def weight(self) -> float:
        """The share of the rows that this rank holds, in [0, 1]."""
        return (self.own.stop - self.own.start) / max(1, self.edges[-1])

    @property
    def counts(self) -> list[int]:
        """The number of rows of each rank."""
        return [stop - start for start, stop in pairwise(self.edges)]


@dataclass(frozen=True)
class WorkerGroup:
    """The workers of one model. Every worker must call the same methods in the same order."""

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which writes and prints."""
        return self.rank == 0

    def shard(self, num_rows: int, *, groups: list[int] | None = None) -> BatchShard:
        """Shard rows evenly and in order, by whole groups where there are at least as many groups as workers.

        Args:
            groups: sizes of consecutive groups of rows.
        """
        if groups is None or len(groups) < self.size:
            return BatchShard(edges_of(split_evenly(num_rows, self.size)), self.rank)
        ends = edges_of(groups)
        return BatchShard(tuple(ends[group] for group in edges_of(split_evenly(len(groups), self.size))), self.rank)

    def gather(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Concatenate the rows `[n_r, ...]` of all ranks, detached; `counts` are their n_r."""
        if self.size == 1:
            return rows.detach()
        padded = F.pad(rows.detach(), (0, 0) * (rows.ndim - 1) + (0, max(counts) - len(rows)))
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded.contiguous())
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    def join(self, rows: Tensor, counts: list[int]) -> Tensor:
        """Gather rows with gradients for this rank's own alone, so that the sum over ranks is the whole gradient."""
        if self.size == 1:
            return rows
        parts = list(self.gather(rows, counts).split(counts))
        parts[self.rank] = rows
        return torch.cat(parts)

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over the ranks; shapes must agree."""
        if self.size == 1:
            return value
        if value.numel() <= GATHER_LIMIT:
            return self.gather(value[None], [1] * self.size).sum(0)
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def any(self, flag: bool) -> bool:
        """Return whether any rank's flag is true."""
        return flag if self.size == 1 else bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor], part: Tensor) -> Tensor:
        """Sum the gradients over the ranks, in place, and return the sum of the loss parts, in one collective."""
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
    """Return the workers of torch's process group, or a single worker without one."""
    if not (dist.is_available() and dist.is_initialized()):
        return WorkerGroup(device=device)
    return WorkerGroup(dist.get_rank(), dist.get_world_size(), device)


def split_evenly(num_rows: int, num_parts: int) -> list[int]:
    """Split a number into parts that differ by at most one, larger parts first."""
    low, extra = divmod(num_rows, num_parts)
    return [low + (part < extra) for part in range(num_parts)]


def edges_of(sizes: list[int]) -> tuple[int, ...]:
    """Return the boundaries of consecutive parts of these sizes: 0 and the running sums."""
    return (0, *accumulate(sizes))


def batch_groups(num_images: int, bn_group: int) -> list[int]:
    """Return the sizes of the batch-norm groups: the batch for 0, else nearly equal ones of `bn_group` or more."""
    return split_evenly(num_images, max(1, num_images // bn_group) if bn_group else 1)
