"""Batch norm over the images of a global batch, or fixed groups of them, however many workers hold them.

torch's SyncBatchNorm does the first on CUDA only, and plain batch norm takes whatever a worker holds: the
reason why results in this field depend on the number of GPUs.

Shapes: C channels, G groups, R workers.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mprd.runtime.distributed import BatchShard, WorkerGroup, batch_groups, edges_of


class BatchCut:
    """How the batch that is passing through a network is cut into groups and into workers' shares."""

    def __init__(self, workers: WorkerGroup, bn_group: int) -> None:
        self.workers = workers
        self.bn_group = bn_group
        self.groups: list[int] = []
        self.counts = torch.zeros(0)
        """`[R, G]`, each worker's images of each group."""
        self.is_whole = True
        """Whether no group is divided between workers."""
        self.untracked: list[tuple[GlobalBatchNorm, Tensor, int]] = []
        """Norms whose running statistics still lack the other workers' groups, their moments `[G, 2, C]`, 0 for groups
        held elsewhere, and the cells of a map."""

    def shard(self, num_images: int) -> BatchShard:
        """Say which images of a batch each worker holds."""
        return self.workers.shard(num_images, groups=batch_groups(num_images, self.bn_group))

    def set_batch(self, num_images: int) -> None:
        """Prepare for the forward and backward pass of a global batch of so many images."""
        self.groups = batch_groups(num_images, self.bn_group)
        ends, edges = edges_of(self.groups), self.shard(num_images).edges
        groups = list(pairwise(ends))
        held = [
            [max(0, min(stop, end) - max(start, begin)) for begin, end in groups] for start, stop in pairwise(edges)
        ]
        self.counts = torch.tensor(held, dtype=torch.float64)
        self.is_whole = set(edges) <= set(ends)
        self.untracked = []

    def track_all(self) -> None:
        """Bring the running statistics up to date, those of all norms in one message; every worker must call it."""
        if not self.untracked:
            return
        norms, moments, cells = zip(*self.untracked, strict=True)
        # of each group all workers but one hold zeros
        whole = self.workers.sum(torch.cat([part.flatten() for part in moments]))
        parts = whole.split([part.numel() for part in moments])
        for norm, own, part, cells_of_norm in zip(norms, moments, parts, cells, strict=True):
            norm.track(part.view_as(own), cells=cells_of_norm)
        self.untracked = []

    @property
    def own(self) -> list[int]:
        """This worker's images of each group."""
        return [int(count) for count in self.counts[self.workers.rank]]


class GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm that takes its training statistics as `cut` says; evaluation is torch's.

    Where no group is divided, the running statistics move when the batch is through: `cut.track_all`.
    """

    cut: BatchCut

    def _check_input_dim(self, maps: Tensor) -> None:
        assert maps.ndim in (2, 4)

    def forward(self, maps: Tensor) -> Tensor:
        if not self.training:
            return super().forward(maps)
        moments, cells = own_moments(maps, self.cut), maps[0, 0].numel()
        if self.cut.is_whole:
            # what others hold is needed for the running statistics alone, which can wait until the batch is through
            self.cut.untracked.append((self, moments, cells))
        else:
            moments = merge_moments(moments, self.cut)
            self.track(moments, cells=cells)
        return Normalize.apply(maps, self.weight, self.bias, moments, self.eps, self.cut)

    @torch.no_grad()
    def track(self, moments: Tensor, *, cells: int) -> None:
        """Move the running statistics towards the mean over the groups, as torch does for one."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        sizes = torch.tensor(self.cut.groups, dtype=moments.dtype, device=moments.device)[:, None] * cells
        unbiased = moments[:, 1] * sizes / (sizes - 1)
        self.running_mean.lerp_(moments[:, 0].mean(0).to(self.running_mean.dtype), step)
        self.running_var.lerp_(unbiased.mean(0).to(self.running_var.dtype), step)


@torch.no_grad()
def own_moments(maps: Tensor, cut: BatchCut) -> Tensor:
    """Return mean and biased variance of this worker's part of each group, `[G, 2, C]`; 0 where it has none."""
    own = maps.new_zeros(len(cut.groups), 2, maps.shape[1], dtype=wide(maps.dtype))
    for group, part in enumerate(maps.split(cut.own)):
        if len(part):
            own[group, 0], own[group, 1] = mean_and_variance(part.to(own.dtype))
    return own


@torch.no_grad()
def merge_moments(own: Tensor, cut: BatchCut) -> Tensor:
    """Return mean and biased variance of each group over all workers, `[G, 2, C]`, from each worker's."""
    parts = cut.workers.gather(own[None], [1] * cut.workers.size)
    weights = (cut.counts / cut.counts.sum(0)).to(parts)[:, :, None]
    means, variances = parts.unbind(2)
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean) ** 2)).sum(0)
    return torch.stack([mean, variance], dim=1)


def mean_and_variance(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, `[C]`."""
    if maps.device.type == "cpu":
        # batch norm's own kernel: on a CPU var_mean takes twenty times as long for channels-last maps
        return torch.batch_norm_update_stats(maps, None, None, 0.0)
    axes = tuple(axis for axis in range(maps.ndim) if axis != 1)
    variance, mean = torch.var_mean(maps, dim=axes, correction=0)
    return mean, variance


def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type that statistics of maps are taken in: bfloat16 has too few digits."""
    return torch.float32 if dtype == torch.bfloat16 else dtype


class Normalize(torch.autograd.Function):
    """Normalize each group by its statistics, which depend on the images of all workers."""

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, eps: float, cut: BatchCut
    ) -> Tensor:
        ctx.save_for_backward(maps, weight, moments)
        ctx.eps, ctx.cut, ctx.own, ctx.groups = eps, cut, cut.own, cut.groups
        parts = [
            F.batch_norm(part, mean, variance, weight, bias, training=False, eps=eps) if len(part) else part
            for part, (mean, variance) in zip(maps.split(ctx.own), moments, strict=True)
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight, moments = ctx.saved_tensors
        parts = [
            local_gradients(dy, x, weight, *moment, eps=ctx.eps)
            for dy, x, moment in zip(grad.split(ctx.own), maps.split(ctx.own), moments, strict=True)
        ]
        # sums over a group of dy x_hat and of dy, [G, 2, C]
        own = torch.stack([torch.stack(part[1:]) for part in parts])
        sums = own if ctx.cut.is_whole else ctx.cut.workers.sum(own)
        shape = (1, -1) + (1,) * (maps.ndim - 2)
        grads = []
        for group, (x, part) in enumerate(zip(maps.split(ctx.own), parts, strict=True)):
            count = ctx.groups[group] * maps[0, 0].numel()
            scale, shift = through_statistics(weight, moments[group], sums[group] / count, eps=ctx.eps)
            through = torch.addcmul(shift.view(shape), x.to(scale.dtype), scale.view(shape))
            grads.append(part[0].add_(through.to(part[0].dtype)))
        total = own.sum(0)
        return grads[0] if len(grads) == 1 else torch.cat(grads), total[0], total[1], None, None, None


def local_gradients(
    grad: Tensor, maps: Tensor, weight: Tensor, mean: Tensor, variance: Tensor, *, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of maps, weight and bias with the statistics held fixed."""
    if len(maps) == 0:
        # torch's kernel divides by the number of images
        return grad, torch.zeros_like(weight), torch.zeros_like(weight)
    return torch.ops.aten.native_batch_norm_backward(
        grad, maps, weight, mean, variance, None, None, False, eps, [True, True, True]
    )


def through_statistics(weight: Tensor, moments: Tensor, mean_sums: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return scale and shift `[C]` of the gradient's part that goes through mean and variance: scale x + shift.

    With x_hat = (x - mean) / std it is -(weight / std) (mean of dy + x_hat mean of dy x_hat).
    """
    inverse_std = (moments[1] + eps).rsqrt()
    scale = -weight * inverse_std**2 * mean_sums[0]
    return scale, -weight * inverse_std * mean_sums[1] - scale * moments[0]


def share_statistics(network: nn.Module, cut: BatchCut) -> None:
    """Let all batch norms below a module take their statistics as `cut` says, in place; parameters stay.

    One worker with one group keeps torch's own.
    """
    if cut.workers.size == 1 and cut.bn_group == 0:
        return
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, globally(child, cut))


def globally(norm: nn.BatchNorm1d | nn.BatchNorm2d, cut: BatchCut) -> GlobalBatchNorm:
    """Return a global batch norm with a plain one's parameters and running statistics."""
    new = GlobalBatchNorm(norm.num_features, eps=norm.eps, momentum=norm.momentum, device=norm.weight.device)
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.cut = cut
    new.train(norm.training)
    return new
