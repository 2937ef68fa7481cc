"""Where a run goes: wall time by its parts, and a trace of a few steps.

The parts are timed by wrapping the trainer's own methods, so that a run without a profile pays nothing. On an
accelerator each part waits for the device at both ends, so that its time is its own; the whole is then slower.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mprd.engine.trainer import Trainer

PARTS = {
    "load": "waiting for images",
    "network": "forward, backward and step of the CNN",
    "loss": "Eq. 2 against the memory",
    "memory": "Eq. 1",
    "labels": "pair graphs, GCN and Eq. 7 for the batches",
    "neighbors": "the lists NN_k",
    "GCN": "drawing pairs, steps of the GCN",
    "extraction": "features of training images outside the steps",
    "evaluation": "query against gallery, the row, the curves",
    "saving": "checkpoints and the live line",
}
TRACED = range(5, 10)
"""Steps of the CNN that a trace is kept of: the first ones warm up."""


class Profile:
    """Seconds of the parts of a run; a part inside another is taken off it."""

    def __init__(self, device: torch.device, trace_file: Path) -> None:
        self.device, self.trace_file = device, trace_file
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.inner: list[float] = []
        """Seconds of finished parts inside each open one."""
        self.num_steps = 0
        self.trace: Any = None
        self.started = time.perf_counter()

    def attach(self, trainer: Trainer) -> None:
        """Time the methods of a trainer, in place."""
        state, hooks = trainer.state, trainer.hooks
        trainer.hooks = replace(
            hooks,
            after_step=self.timed("saving", hooks.after_step),
            after_epoch=self.timed("evaluation", hooks.after_epoch),
            checkpoint=self.timed("saving", hooks.checkpoint),
        )
        wrapped: Any = trainer
        wrapped.extract = self.timed("extraction", trainer.extract)
        wrapped.cnn_loss = self.timed("loss", trainer.cnn_loss)
        wrapped.set_positives = self.timed("labels", trainer.set_positives)
        wrapped.label_all = self.timed("labels", trainer.label_all)
        wrapped.train_gcn_epoch = self.timed("GCN", trainer.train_gcn_epoch)
        lists = ("refresh", "search", "search_outside")
        wrapped.lists = self.attached(trainer.lists, "neighbors", lists, self.timed)
        wrapped.build_labeller = self.attached(trainer.build_labeller, "labels", ("begin",), self.timed_twice)
        wrapped.descend = self.timed_steps(trainer.descend)
        make_batches = trainer.batches
        wrapped.batches = lambda *args: self.timed_items("load", make_batches(*args))
        network: Any = state.backbone
        network.forward = self.timed("network", network.forward)
        self.watch_memory(trainer)

    def watch_memory(self, trainer: Trainer) -> None:
        """Time the updates of the memory, which is a new one once it is filled."""
        fill = trainer.fill_memory

        def fill_and_watch() -> None:
            fill()
            memory: Any = trainer.state.memory
            memory.update = self.timed("memory", memory.update)

        memory: Any = trainer.state.memory
        memory.update = self.timed("memory", memory.update)
        trainer.fill_memory = fill_and_watch  # type: ignore[method-assign]

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function whose calls are timed as a part."""

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with self.part(name):
                return function(*args, **kwargs)

        return call

    def timed_twice(self, name: str, function: Callable[..., Callable[..., Any]]) -> Callable[..., Any]:
        """Return a function whose calls are timed as a part, and so are those of the function that it returns."""
        begin = self.timed(name, function)
        return lambda *args, **kwargs: self.timed(name, begin(*args, **kwargs))

    def attached(
        self, make: Callable[[], Any], part: str, methods: tuple[str, ...], timed: Callable[..., Any]
    ) -> Callable[[], Any]:
        """Return a maker of objects some of whose methods are timed as a part."""

        def make_timed() -> Any:
            made = make()
            for method in methods:
                # frozen dataclasses among them
                object.__setattr__(made, method, timed(part, getattr(made, method)))
            return made

        return make_timed

    def timed_items(self, name: str, items: Iterable[Any]) -> Iterator[Any]:
        """Hand on items, the waiting for each timed."""
        iterator = iter(items)
        while True:
            with self.part(name):
                item = next(iterator, None)
            if item is None:
                return
            yield item

    def timed_steps(self, descend: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Time the steps of both networks, and keep the trace of some of the CNN's."""

        def call(*args: Any, name: str, **kwargs: Any) -> Tensor:
            with self.part("GCN" if name == "GCN" else "network"):
                whole = descend(*args, name=name, **kwargs)
            if name == "CNN":
                self.count_step()
            return whole

        return call

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Time a block."""
        self.wait()
        begun = time.perf_counter()
        self.inner.append(0.0)
        try:
            yield
        finally:
            self.wait()
            took = time.perf_counter() - begun
            self.seconds[name] += took - self.inner.pop()
            self.calls[name] += 1
            if self.inner:
                self.inner[-1] += took

    def wait(self) -> None:
        """Let the device finish what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def count_step(self) -> None:
        """Count a step; begin the trace before the first that is traced, write it behind the last."""
        self.num_steps += 1
        if self.num_steps == TRACED.start:
            kinds = [torch.profiler.ProfilerActivity.CPU]
            kinds += [torch.profiler.ProfilerActivity.CUDA] * (self.device.type == "cuda")
            self.trace = torch.profiler.profile(activities=kinds)
            self.trace.__enter__()
        elif self.num_steps == TRACED.stop:
            self.trace.__exit__(None, None, None)
            self.trace.export_chrome_trace(str(self.trace_file))

    def table(self) -> str:
        """Return the parts with seconds, share and calls; what no part claims is `other`."""
        whole = time.perf_counter() - self.started
        rows = [(name, self.seconds[name], self.calls[name], what) for name, what in PARTS.items()]
        rows.append(("other", max(0.0, whole - sum(self.seconds.values())), 1, "start, order, whatever else"))
        lines = [f"{'part':<12}{'seconds':>9}{'share':>8}{'calls':>8}"]
        lines += [f"{name:<12}{took:>9.2f}{took / whole:>8.1%}{calls:>8}  {what}" for name, took, calls, what in rows]
        return "\n".join(lines) + "\n"
