"""Choose the serial or the Ray backend for building pair graphs; results are the same.

Ray is imported only if the settings name it, or if a timed sample shows that it may be faster.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from mprd.config.schema import SubgraphsConfig
from mprd.errors import UserError
from mprd.subgraphs import SubgraphBatch, SubgraphBuilder, build_serially, build_subgraphs, grouped

if TYPE_CHECKING:
    from mprd.parallel.ray_subgraphs import RayBuilder

logger = logging.getLogger("mprd")

SAMPLE_PAIRS = 4096
"""Pairs of the timed sample."""
WAIT_SECONDS = 20
"""Limit of `auto` for the start of actors, which other jobs may leave no CPU."""
START_SECONDS = 3.0
"""Assumed time of a Ray Data execution until its first graphs, before one was measured."""


def choose_builder(config: SubgraphsConfig, *, num_workers: int = 1) -> SubgraphBuilder:
    """Return the builder of each of `num_workers` training workers; raise UserError if Ray or its CPUs lack."""
    if config.executor == "serial":
        return build_serially
    if config.executor == "auto":
        return AutoBuilder(config.num_actors, num_workers=num_workers)
    check_ray("subgraphs.executor=ray")
    from mprd.parallel.ray_subgraphs import RayBuilder

    return RayBuilder(config.num_actors, num_workers=num_workers)


def check_ray(setting: str) -> None:
    """Raise UserError naming the setting if Ray is not installed."""
    if not has_ray():
        raise UserError(f"{setting} needs Ray: pip install 'ray[data]'")


def has_ray() -> bool:
    """Return whether Ray and Arrow are installed, without importing them."""
    return all(importlib.util.find_spec(name) is not None for name in ("ray", "pyarrow"))


class AutoBuilder:
    """Build serially or on Ray, whichever a timed sample predicts to be faster; log each change of the choice."""

    def __init__(self, num_actors: int, *, num_workers: int = 1) -> None:
        self.num_actors = num_actors
        self.num_workers = num_workers
        self.choice: str | None = None
        self.ray_builder: RayBuilder | None = None
        self.failure: str | None = None
        """Why Ray did not build."""

    def __call__(self, pairs: Tensor, neighbor_ids: Tensor, sizes: Sequence[int]) -> Iterator[SubgraphBatch]:
        """Build with the chosen builder, serially from then on where Ray's actors do not start."""
        try:
            batches = iter(self.choose(pairs, neighbor_ids, sizes)(pairs, neighbor_ids, sizes))
            first = [next(batches)] if sizes else []
        except UserError as error:
            self.failure = str(error)
            batches, first = self.select("serial", self.failure)(pairs, neighbor_ids, sizes), []
        yield from first
        yield from batches

    def choose(self, pairs: Tensor, neighbor_ids: Tensor, sizes: Sequence[int]) -> SubgraphBuilder:
        """Time a sample; without starting Ray if building serially takes less than the start of Ray."""
        num_sampled = len(next(grouped(sizes, SAMPLE_PAIRS), []))
        sample = pairs[: sum(sizes[:num_sampled])]
        serial = best_seconds(lambda: consume(build_serially(sample, neighbor_ids, sizes[:num_sampled])))
        serial *= len(pairs) / max(1, len(sample))
        start = self.start_seconds()
        if serial <= start:
            return self.select("serial", f"{serial:.2g} s for {len(pairs)} pairs, Ray needs {start:.2g} s to start")
        if self.failure is not None or not has_ray():
            return self.select("serial", self.failure or "Ray is not installed")
        from mprd.parallel.ray_actors import count_spare

        num_actors = min(self.num_actors, count_spare(self.num_workers))
        if num_actors == 0:
            return self.select("serial", "no CPU is free for actors")
        on_ray = start + len(pairs) * ray_rate(sample, neighbor_ids, sizes[:num_sampled], num_actors)
        seconds = f"{serial:.2g} s here, {on_ray:.2g} s with {num_actors} actors"
        return self.select("ray" if on_ray < serial else "serial", seconds, num_actors)

    def start_seconds(self) -> float:
        """Return the measured or assumed start time of Ray."""
        return (self.ray_builder and self.ray_builder.start_seconds) or START_SECONDS

    def select(self, choice: str, why: str, num_actors: int = 0) -> SubgraphBuilder:
        """Return the builder of a choice, and log it if it differs from the last."""
        if choice != self.choice:
            logger.info("subgraphs.executor = auto: %s (%s)", choice, why)
        self.choice = choice
        if choice == "serial":
            return build_serially
        from mprd.parallel.ray_subgraphs import RayBuilder

        if self.ray_builder is None or self.ray_builder.num_actors != num_actors:
            self.ray_builder = RayBuilder(num_actors, num_workers=self.num_workers, wait_seconds=WAIT_SECONDS)
        return self.ray_builder


def ray_rate(pairs: Tensor, neighbor_ids: Tensor, sizes: Sequence[int], num_actors: int) -> float:
    """Estimate the seconds per pair on Ray, where actors build in parallel while this process converts from Arrow."""
    from mprd.parallel.arrow import from_arrow, to_arrow

    pairs, neighbor_ids = pairs.cpu(), neighbor_ids.cpu()
    packed = [to_arrow(batch) for batch in build_serially(pairs, neighbor_ids, sizes)]
    built = best_seconds(lambda: to_arrow(build_subgraphs(pairs, neighbor_ids)))
    unpacked = best_seconds(lambda: [from_arrow(table) for table in packed])
    return max(built / num_actors, unpacked) / max(1, len(pairs))


def consume(batches: Iterator[SubgraphBatch]) -> None:
    """Build all batches, and sync with an accelerator."""
    for batch in batches:
        batch.link.sum().item()


def best_seconds(function: Callable[[], object]) -> float:
    """Return the shorter wall time of two calls; the first may fill caches."""
    seconds = []
    for _ in range(2):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
