"""Extract parts of a long list of files on Ray actors, each with a copy of the network."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, islice

import numpy as np
import torch

from mprd.errors import UserError
from mprd.extract.parts import Batches
from mprd.extract.stream import ExtractOptions, PartStream, stream_parts
from mprd.model import Model
from mprd.parallel.ray_actors import count_gpus, map_on_actors

FLAG = "--num-workers"


def stream_on_actors(
    _model: Model,
    options: ExtractOptions,
    paths: Sequence[str],
    cameras: Sequence[int | None],
    parts: Sequence[Batches],
    *,
    num_workers: int,
) -> PartStream:
    """Extract parts on actors, and yield them in order, bit-identical to `stream_parts` on one thread.

    Raises UserError if the actors do not fit, an actor dies or raises UserError.
    """
    on_gpu = options.device.startswith("cuda")
    if on_gpu and (num_gpus := count_gpus(num_workers)) < num_workers:
        raise UserError(f"{FLAG}: {num_workers} actors need a GPU each, but Ray has {num_gpus}; or give --device cpu")
    items = ([[(paths[index], cameras[index]) for index in batch] for batch in part] for part in parts)
    found = map_on_actors(Extractor, options, items, num_actors=num_workers, num_gpus=int(on_gpu), setting=FLAG)
    for part, (rows, features) in zip(parts, found, strict=True):
        yield np.fromiter(chain.from_iterable(part), np.int64)[rows], features


class Extractor:
    """Extract parts in an actor; the network is loaded for the first one."""

    def __init__(self, options: ExtractOptions) -> None:
        torch.set_num_threads(1)
        self.options = options
        self.model: Model | None = None

    def __call__(self, part: list[list[tuple[str, int | None]]]) -> tuple[np.ndarray, np.ndarray] | UserError:
        """Extract a part, given as paths and cameras batch by batch.

        Returns the positions int64 `[m]` of the readable images in the part and their features `[m, D]`. A UserError is
        returned as a value, since Ray would wrap a raised one.
        """
        try:
            options = self.options
            self.model = self.model or options.load_model()
            paths, cameras = zip(*chain.from_iterable(part), strict=True)
            positions = iter(range(len(paths)))
            batches = [list(islice(positions, len(batch))) for batch in part]
            return next(stream_parts(self.model, options, paths, cameras, [batches]))
        except UserError as error:
            return error
