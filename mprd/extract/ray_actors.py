"""Extraction by actors: each holds the network, and extracts part after part of a long list of files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

import numpy as np
import torch

from mprd.errors import UserError
from mprd.extract.stream import Batches, Job, PartStream, stream_parts
from mprd.model import Model, load_model
from mprd.parallel.ray_actors import count_gpus, map_on_actors

FLAG = "--num-workers"

Part = list[list[str]]
"""Paths, batch by batch: images are read where they are looked at."""


def stream_on_actors(
    _model: Model, job: Job, paths: Sequence[str], parts: Sequence[Batches], *, num_workers: int
) -> PartStream:
    """Extract parts on so many actors, and yield them in order: what `stream_parts` yields, to the bit on one thread.

    Raises UserError where the actors do not fit, one of them dies, or finds a mistake of the person's.
    """
    on_gpu = job.device.startswith("cuda")
    if on_gpu and (num_gpus := count_gpus(num_workers)) < num_workers:
        raise UserError(f"{FLAG}: {num_workers} actors need a GPU each, but Ray has {num_gpus}; or give --device cpu")
    items = ([[paths[index] for index in batch] for batch in part] for part in parts)
    found = map_on_actors(Extractor, job, items, num_actors=num_workers, num_gpus=int(on_gpu), setting=FLAG)
    for part, (rows, features) in zip(parts, found, strict=True):
        yield np.fromiter(chain.from_iterable(part), np.int64)[rows], features


class Extractor:
    """What an actor keeps: the job, and the network once it has been asked for."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(1)
        self.job = job
        self.model: Model | None = None

    def __call__(self, part: Part) -> tuple[np.ndarray, np.ndarray] | UserError:
        """Return the places of the readable images in the part `[m]` and their features `[m, D]`, or the mistake."""
        try:
            self.model = self.model or load_model(self.job.run, best=self.job.best, device=self.job.device)
            paths = list(chain.from_iterable(part))
            places = iter(range(len(paths)))
            batches = [list(islice(places, len(batch))) for batch in part]
            return next(stream_parts(self.model, self.job, paths, [batches]))
        except UserError as error:
            return error
