"""Batch norms with statistics of each camera in evaluation, and of the global batch in training.

torch's SyncBatchNorm takes the latter on CUDA only; plain batch norm takes the statistics of each worker's shard, and
results depend on the number of GPUs.

Shapes: C channels, G groups, R workers, K cameras, B images of this worker.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mprd.runtime.distributed import BatchShard, WorkerGroup, batch_groups, edges_of


class BatchSplit:
    """The split of the current global batch into normalization groups and into the workers' shards."""

    def __init__(self, workers: WorkerGroup, bn_group: int) -> None:
        self.workers = workers
        self.bn_group = bn_group
        self.groups: list[int] = []
        self.counts = torch.zeros(0)
        """`[R, G]`, each worker's images of each group."""
        self.is_whole = True
        """Whether every group lies within one worker's shard."""
        self.cameras: Tensor | None = None
        """`[B]`, the row of each image's camera in the statistics of `CameraBatchNorm`; None: those of all images."""
        self.pending: list[tuple[GlobalBatchNorm, Tensor, int]] = []
        """Norms whose running statistics lack the other workers' groups, the local moments `[G, 2, C]` (0 for groups of
        other workers), and the number of cells of a map."""

    def shard(self, num_images: int) -> BatchShard:
        """Return the rows of a batch that each worker holds."""
        return self.workers.shard(num_images, groups=batch_groups(num_images, self.bn_group))

    def set_batch(self, num_images: int) -> None:
        """Set the size of the global batch; call it before each forward pass in training mode."""
        self.groups = batch_groups(num_images, self.bn_group)
        ends, edges = edges_of(self.groups), self.shard(num_images).edges
        groups = list(pairwise(ends))
        held = [
            [max(0, min(stop, end) - max(start, begin)) for begin, end in groups] for start, stop in pairwise(edges)
        ]
        self.counts = torch.tensor(held, dtype=torch.float64)
        self.is_whole = set(edges) <= set(ends)
        self.pending = []

    def sync_running_stats(self) -> None:
        """Update the pending running statistics with one collective for all norms; every worker must call it."""
        if not self.pending:
            return
        norms, moments, cells = zip(*self.pending, strict=True)
        # all workers but one hold zeros for a group
        whole = self.workers.sum(torch.cat([part.flatten() for part in moments]))
        parts = whole.split([part.numel() for part in moments])
        for norm, own, part, cells_of_norm in zip(norms, moments, parts, cells, strict=True):
            norm.update_running_stats(part.view_as(own), cells=cells_of_norm)
        self.pending = []

    @property
    def own(self) -> list[int]:
        """This worker's images of each group."""
        return [int(count) for count in self.counts[self.workers.rank]]


def register_optional(module: nn.Module, name: str, value: Tensor | None) -> None:
    """Register a buffer of a module that may be None, for which a checkpoint that holds it makes room."""

    def make_room(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        saved = state.get(prefix + name)
        if saved is not None and getattr(module, name) is None:
            setattr(module, name, torch.zeros_like(saved, device=next(module.parameters()).device))

    module.register_buffer(name, value)
    module.register_load_state_dict_pre_hook(make_room)


class CameraBatchNorm(nn.modules.batchnorm._BatchNorm):
    """A batch norm that evaluates each image by the statistics of its camera, and trains as torch's.

    Camera-based batch normalization (Zhuang et al., ECCV 2020). Without statistics of cameras, or under
    `batch_split.cameras` of None, it evaluates as torch's too.
    """

    batch_split: BatchSplit
    camera_moments: Tensor | None
    """`[K + 1, 2, C]`, mean and variance of each camera, and in the last row of all images."""

    def __init__(
        self, num_features: int, batch_split: BatchSplit, *, activation: nn.Module | None = None, **options: Any
    ) -> None:
        super().__init__(num_features, **options)
        self.batch_split = batch_split
        # without parameters, so that checkpoints are those of the norm that it replaces
        self.activation = activation
        # only a run has cameras, so the network is built without their statistics
        register_optional(self, "camera_moments", None)

    def _check_input_dim(self, maps: Tensor) -> None:
        assert maps.ndim in (2, 4)

    def forward(self, maps: Tensor) -> Tensor:
        normalized = self.normalize(maps) if self.training else self.evaluate(maps)
        return normalized if self.activation is None else self.activation(normalized)

    def normalize(self, maps: Tensor) -> Tensor:
        """Normalize by the statistics of the batch, and update the running ones."""
        return super().forward(maps)

    def evaluate(self, maps: Tensor) -> Tensor:
        """Normalize each image by the statistics of its camera."""
        cameras = self.batch_split.cameras
        if self.camera_moments is None or cameras is None:
            return super().forward(maps)
        mean, variance = self.camera_moments.unbind(1)
        scale = self.weight * (variance + self.eps).rsqrt()
        shift = self.bias - mean * scale
        shape = (-1, self.num_features) + (1,) * (maps.ndim - 2)
        scale, shift = (part[cameras].view(shape) for part in (scale, shift))
        # rounded to bfloat16, scale and shift would move a channel as a whole
        return torch.addcmul(shift, maps, scale).to(maps.dtype)


class GlobalBatchNorm(CameraBatchNorm):
    """A batch norm with the training statistics of `batch_split`.

    Where no group spans workers, the running statistics change in `BatchSplit.sync_running_stats`, after the forward
    pass.
    """

    def normalize(self, maps: Tensor) -> Tensor:
        """Normalize by the statistics of the batch, and update the running ones."""
        moments, cells = local_moments(maps, self.batch_split), maps[0, 0].numel()
        if self.batch_split.is_whole:
            # only the running statistics need the other workers' groups: defer them to one collective for all norms
            self.batch_split.pending.append((self, moments, cells))
        else:
            moments = merge_moments(moments, self.batch_split)
            self.update_running_stats(moments, cells=cells)
        return Normalize.apply(maps, self.weight, self.bias, moments, self.eps, self.batch_split)

    @torch.no_grad()
    def update_running_stats(self, moments: Tensor, *, cells: int) -> None:
        """Move the running statistics towards the mean over the groups, `[G, 2, C]`, as torch does for one group."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        step = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        sizes = torch.tensor(self.batch_split.groups, dtype=moments.dtype, device=moments.device)[:, None] * cells
        unbiased = moments[:, 1] * sizes / (sizes - 1)
        self.running_mean.lerp_(moments[:, 0].mean(0).to(self.running_mean.dtype), step)
        self.running_var.lerp_(unbiased.mean(0).to(self.running_var.dtype), step)


@torch.no_grad()
def local_moments(maps: Tensor, batch_split: BatchSplit) -> Tensor:
    """Return mean and biased variance of this worker's part of each group, `[G, 2, C]`; 0 for an empty part."""
    # statistics of bfloat16 maps are taken in float32
    dtype = torch.float32 if maps.dtype == torch.bfloat16 else maps.dtype
    own = maps.new_zeros(len(batch_split.groups), 2, maps.shape[1], dtype=dtype)
    for group, part in enumerate(maps.split(batch_split.own)):
        if len(part):
            own[group, 0], own[group, 1] = mean_and_variance(part.to(dtype))
    return own


@torch.no_grad()
def merge_moments(own: Tensor, batch_split: BatchSplit) -> Tensor:
    """Return mean and biased variance of each group over all workers, `[G, 2, C]`, from each worker's."""
    parts = batch_split.workers.gather(own[None], [1] * batch_split.workers.size)
    weights = (batch_split.counts / batch_split.counts.sum(0)).to(parts)[:, :, None]
    means, variances = parts.unbind(2)
    mean = (weights * means).sum(0)
    variance = (weights * (variances + (means - mean) ** 2)).sum(0)
    return torch.stack([mean, variance], dim=1)


def mean_and_variance(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance of each channel, `[C]`."""
    if maps.device.type == "cpu":
        # batch norm's own kernel: var_mean is slow on a CPU for channels-last maps
        return torch.batch_norm_update_stats(maps, None, None, 0.0)
    axes = tuple(axis for axis in range(maps.ndim) if axis != 1)
    variance, mean = torch.var_mean(maps, dim=axes, correction=0)
    return mean, variance


class Normalize(torch.autograd.Function):
    """Normalize each group by its statistics; the gradient through them is summed over the workers."""

    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, moments: Tensor, eps: float, batch_split: BatchSplit
    ) -> Tensor:
        ctx.save_for_backward(maps, weight, moments)
        ctx.eps, ctx.batch_split, ctx.own, ctx.groups = eps, batch_split, batch_split.own, batch_split.groups
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
        sums = own if ctx.batch_split.is_whole else ctx.batch_split.workers.sum(own)
        shape = (1, -1) + (1,) * (maps.ndim - 2)
        grads = []
        for group, (x, part) in enumerate(zip(maps.split(ctx.own), parts, strict=True)):
            count = ctx.groups[group] * maps[0, 0].numel()
            scale, shift = statistics_gradient(weight, moments[group], sums[group] / count, eps=ctx.eps)
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


def statistics_gradient(weight: Tensor, moments: Tensor, mean_sums: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return scale and shift `[C]` of the part of the maps' gradient that passes through mean and variance.

    The part is `scale x + shift = -(weight / std) (mean of dy + x_hat mean of dy x_hat)`, x_hat = (x - mean) / std.
    """
    inverse_std = (moments[1] + eps).rsqrt()
    scale = -weight * inverse_std**2 * mean_sums[0]
    return scale, -weight * inverse_std * mean_sums[1] - scale * moments[0]


def replace_batch_norms(network: nn.Module, batch_split: BatchSplit, *, by_camera: bool = False) -> None:
    """Replace all batch norms below a module by global ones, in place; parameters and buffers are kept.

    One worker without groups trains with torch's own, which with `by_camera` know the statistics of cameras.
    """
    is_local = batch_split.workers.size == 1 and batch_split.bn_group == 0
    if is_local and not by_camera:
        return
    kind = CameraBatchNorm if is_local else GlobalBatchNorm
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
                setattr(parent, name, replaced(child, kind, batch_split))


def replaced(
    norm: nn.BatchNorm1d | nn.BatchNorm2d, kind: type[CameraBatchNorm], batch_split: BatchSplit
) -> CameraBatchNorm:
    """Return a batch norm that shares the parameters and buffers of a plain one."""
    # timm's norms activate their result
    parts = [part for name, part in norm.named_children() if name in ("drop", "act")]
    activation = nn.Sequential(*parts) if parts else None
    new = kind(
        norm.num_features,
        batch_split,
        activation=activation,
        eps=norm.eps,
        momentum=norm.momentum,
        device=norm.weight.device,
    )
    new.weight, new.bias = norm.weight, norm.bias
    new.running_mean, new.running_var = norm.running_mean, norm.running_var
    new.num_batches_tracked = norm.num_batches_tracked
    new.train(norm.training)
    return new
