"""Training passes recorded once as CUDA graphs, forward and backward, and replayed (not in the paper).

A batch of 32 keeps a fast GPU busy for less time than the host needs to launch its hundreds of kernels one by one; a
graph launches all of them at once. Numbers are those of the same kernels launched one by one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class Whole(nn.Module):
    """Stands around a network whose own `forward` must stay what it is: recording replaces the one of this."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class RecordedPasses:
    """Run a network, its training passes as CUDA graphs: each size of batch is recorded when it first comes.

    The network's weights must stay where they are, and autocast around it must not cache what it casts.
    """

    def __init__(self, network: nn.Module) -> None:
        self.network = network
        self.replays: dict[torch.Size, Callable[[Tensor], Any]] = {}

    def __call__(self, images: Tensor) -> Tensor:
        """Return what the network returns for images `[B, 3, H, W]`; the next batch of that size overwrites it."""
        if not (self.network.training and torch.is_grad_enabled()):
            return self.network(images)
        if images.shape not in self.replays:
            self.replays[images.shape] = self.record(images)
        return self.replays[images.shape](images)

    @torch.no_grad()
    def record(self, images: Tensor) -> Callable[[Tensor], Any]:
        """Record a batch of this size, whose pixels do not matter, and leave the network as it was."""
        # it is run a few times, which moves running statistics
        before = [buffer.clone() for buffer in self.network.buffers()]
        with torch.enable_grad():
            replay = torch.cuda.make_graphed_callables(Whole(self.network), (images.clone(),))
        for buffer, value in zip(self.network.buffers(), before, strict=True):
            buffer.copy_(value)
        return replay
