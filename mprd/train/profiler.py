"""Where a run spends its time: wall seconds of its spans, and a trace of a few steps.

On an accelerator each span syncs at both ends, so that its time is its own; the whole run is then slower.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mprd.engine.callbacks import Callbacks
from mprd.engine.trainer import Trainer
from mprd.runtime import spans

PARTS = {
    "load": "waiting for images",
    "network": "forward, backward and step of the CNN",
    "loss": "Eq. 2 against the memory",
    "memory": "Eq. 1",
    "labels": "pair graphs, GCN and Eq. 7",
    "neighbors": "the lists NN_k of a GCN epoch",
    "GCN": "drawing pairs, steps of the GCN",
    "extraction": "features of training images outside of the steps",
    "evaluation": "query against gallery, the row, the curves",
    "saving": "checkpoints",
}
TRACED = range(5, 10)
"""CNN steps of the trace: the first ones warm up."""


class Profile:
    """Seconds of each span; a span inside another is subtracted from it."""

    def __init__(self, device: torch.device, trace_file: Path) -> None:
        self.device, self.trace_file = device, trace_file
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.inner: list[float] = []
        """Seconds of finished spans inside each open one."""
        self.num_steps = 0
        self.trace: Any = None
        self.started = time.perf_counter()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Time the spans of this process while the block runs; a run of few steps ends the trace."""
        try:
            with spans.listening(self.part):
                yield
        finally:
            self.end_trace()

    def traced(self, callbacks: Callbacks) -> Callbacks:
        """Return the callbacks, with a trace of some CNN steps."""

        def after_step(trainer: Trainer, num_steps: int) -> None:
            if trainer.state.phase == "cnn":
                self.count_step()
            callbacks.after_step(trainer, num_steps)

        return replace(callbacks, after_step=after_step)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block."""
        self.sync()
        begun = time.perf_counter()
        self.inner.append(0.0)
        try:
            yield
        finally:
            self.sync()
            took = time.perf_counter() - begun
            self.seconds[name] += took - self.inner.pop()
            self.calls[name] += 1
            if self.inner:
                self.inner[-1] += took

    def sync(self) -> None:
        """Wait until the device has finished its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def count_step(self) -> None:
        """Start the trace before the first traced step, write it behind the last."""
        self.num_steps += 1
        if self.num_steps == TRACED.start:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.trace = torch.profiler.profile(activities=kinds)
            self.trace.__enter__()
        elif self.num_steps == TRACED.stop:
            self.end_trace()

    def end_trace(self) -> None:
        """Write the trace, if one is being taken."""
        trace, self.trace = self.trace, None
        if trace is not None:
            trace.__exit__(None, None, None)
            trace.export_chrome_trace(str(self.trace_file))

    def table(self) -> str:
        """Return the parts with seconds, share and calls; `other` is what no span covers."""
        whole = time.perf_counter() - self.started
        rows = [(name, self.seconds[name], self.calls[name], what) for name, what in PARTS.items()]
        rows.append(("other", max(0.0, whole - sum(self.seconds.values())), 1, "start, order, whatever else"))
        lines = [f"{'part':<12}{'seconds':>9}{'share':>8}{'calls':>8}"]
        lines += [f"{name:<12}{took:>9.2f}{took / whole:>8.1%}{calls:>8}  {what}" for name, took, calls, what in rows]
        return "\n".join(lines) + "\n"
