"""Features by actors: each holds the network, and extracts part after part of a long list of files."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError

from mprd.errors import UserError
from mprd.extraction import Batches, Job, PartStream, stream_parts
from mprd.model import Model, load_model
from mprd.ray_data import check_budget, join_ray

FLAG = "--num-workers"
PARTS_IN_FLIGHT = 2
"""Parts that an actor has before it."""

Part = list[list[str]]
"""Paths, batch by batch: images are read where they are looked at."""


def has_gpus(num_workers: int) -> bool:
    """Join or start Ray for so many actors; say whether there are GPUs in it."""
    join_ray(num_workers)
    return ray.cluster_resources().get("GPU", 0) > 0


def stream_on_actors(
    _model: Model, job: Job, paths: Sequence[str], parts: Sequence[Batches], *, num_workers: int
) -> PartStream:
    """Extract parts on so many actors, and yield them in order: what `stream_parts` yields, to the bit on one thread.

    Raises UserError where the actors do not fit, one of them dies, or finds a mistake of the person's.
    """
    items = ([[paths[index] for index in batch] for batch in part] for part in parts)
    for part, (rows, features) in zip(parts, map_parts(job, items, num_workers=num_workers), strict=True):
        yield np.fromiter(chain.from_iterable(part), np.int64)[rows], features


def map_parts(job: Job, parts: Iterator[Part], *, num_workers: int) -> PartStream:
    """Hand parts to the actors in turn, a few ahead of the reader, and end the actors with the last."""
    join_ray(num_workers)
    check_budget(num_workers, setting=FLAG)
    num_gpus = int(ray.cluster_resources().get("GPU", 0)) if job.device.startswith("cuda") else 0
    if job.device.startswith("cuda") and num_gpus < num_workers:
        raise UserError(f"{FLAG}: {num_workers} actors need a GPU each, but Ray has {num_gpus}; or give --device cpu")
    remote: Any = ray.remote(num_cpus=1, num_gpus=min(1, num_gpus), scheduling_strategy="SPREAD")(Extractor)
    actors = [remote.remote(job) for _ in range(num_workers)]
    waiting: deque[Any] = deque()
    try:
        for number, part in enumerate(parts):
            waiting.append(actors[number % num_workers].extract.remote(part))
            if len(waiting) > PARTS_IN_FLIGHT * num_workers:
                yield take(waiting.popleft())
        while waiting:
            yield take(waiting.popleft())
    finally:
        for actor in actors:
            ray.kill(actor)


def take(result: Any) -> tuple[np.ndarray, np.ndarray]:
    """Wait for a part; raise the UserError that came in its place, or one that says that an actor has died."""
    try:
        value = ray.get(result)
    except RayActorError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{FLAG}: an actor died ({reason}); what is done is kept, the same command goes on") from None
    if isinstance(value, UserError):
        raise value
    return value


class Extractor:
    """An actor."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(1)
        self.job = job
        self.model: Model | None = None

    def extract(self, part: Part) -> tuple[np.ndarray, np.ndarray] | UserError:
        """Return the places of the readable images in the part `[m]` and their features `[m, D]`.

        A mistake of the person's is a value: raised, it would come with a traceback around it.
        """
        try:
            self.model = self.model or load_model(self.job.run, best=self.job.best, device=self.job.device)
            paths = list(chain.from_iterable(part))
            places = iter(range(len(paths)))
            batches = [list(islice(places, len(batch))) for batch in part]
            return next(stream_parts(self.model, self.job, paths, [batches]))
        except UserError as error:
            return error
