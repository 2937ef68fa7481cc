"""Stream features of many files into one feature file; an interrupted extraction resumes at the part it stopped in."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mprd.data.images import PlainImages
from mprd.errors import Interrupted, UserError
from mprd.extract.inputs import ImageList, ids_from_name
from mprd.extract.parts import Batches, Parts, count_images, cut_parts
from mprd.feature_file import Dtype, Rows, feature_schema
from mprd.model import Model, load_model

logger = logging.getLogger("mprd")

PartStream = Iterator[tuple[np.ndarray, np.ndarray]]
"""For each part the ids int64 `[m]` of its readable images and their features `[m, D]`."""
StreamFn = Callable[[Model, "ExtractOptions", Sequence[str], Sequence[int | None], Sequence[Batches]], PartStream]
"""A function that extracts parts of the given paths under the given cameras."""


@dataclass(frozen=True)
class ExtractOptions:
    """The network, and how images are passed to it."""

    run: Path
    best: bool
    device: str
    """`cpu`, `cuda` or `cuda:N`."""
    batch_size: int
    skip_bad: bool
    """Leave out files that cannot be read."""
    decoders: int
    """Decoding processes; 0 decodes in the process that computes."""
    whiten: bool = False
    """Write the features that training compares."""
    other_cameras: bool = False
    """The images' cameras are not those trained on, whatever their numbers."""

    def load_model(self) -> Model:
        """Load the network."""
        return load_model(self.run, best=self.best, device=self.device, other_cameras=self.other_cameras)


def extract_to_file(
    model: Model,
    options: ExtractOptions,
    images: ImageList,
    out: Path,
    *,
    dtype: Dtype,
    patterns: Sequence[re.Pattern[str]],
    stream: StreamFn,
    on_images: Callable[[int, bool], None],
) -> int:
    """Extract features into a file, resuming an earlier call with the same settings; return the number of rows.

    Args:
        stream: `stream_parts` or `stream_on_actors`.
        on_images: called with a number of completed images, and whether an earlier call completed them.

    Raises UserError for unreadable images and for parts with other settings; Interrupted on Ctrl-C. An existing `out`
    is replaced.
    """
    name = whitened_name(model) if options.whiten else model.name
    schema = feature_schema(run=name, num_features=model.num_features, dtype=dtype, weights=model.fingerprint)
    parts = Parts(out, cut_parts(len(images.paths), options.batch_size), schema, images.paths)
    parts.prepare(describe_settings(options, model, images, dtype=dtype, patterns=patterns))
    ids_of = [ids_from_name(name, patterns, model.camera_number) for name in images.names]
    cameras = [camid for _, camid in ids_of]
    model.tell_cameras(cameras)
    missing = parts.missing(skip_bad=options.skip_bad)
    on_images(len(images.paths) - sum(count_images(parts.batches[number]) for number in missing), True)
    streamed = stream(model, options, images.paths, cameras, [parts.batches[number] for number in missing])
    try:
        for number, (ids, features) in zip(missing, streamed, strict=True):
            warn_of_bad(images, parts.batches[number], ids)
            if options.whiten:
                features = model.whiten(features)
            shown = ids.tolist()
            pids, camids = ([ids_of[row][part] for row in shown] for part in (0, 1))
            parts.write(number, Rows([images.paths[row] for row in shown], pids, camids, features))
            on_images(count_images(parts.batches[number]), False)
        if not parts.count_rows():
            parts.remove()
            raise UserError(f"{images.paths[0]}: cannot read this image, nor any other of the {len(images.paths)}")
        return parts.join()
    except KeyboardInterrupt:
        raise Interrupted("stopped; what is done is kept, and the same command goes on from there") from None


def whitened_name(model: Model) -> str:
    """Return the run's name as the header of whitened features has it: they compare with whitened features alone."""
    model.need_whitening()
    return f"{model.name}, whitened"


def describe_settings(
    options: ExtractOptions, model: Model, images: ImageList, *, dtype: Dtype, patterns: Sequence[re.Pattern[str]]
) -> dict[str, Any]:
    """Return everything that the rows depend on: only parts with the same settings are joined."""
    return {
        "version": 1,
        "run": model.name,
        "weights": model.fingerprint,
        "images": len(images.paths),
        "paths": hashlib.sha256("\n".join(images.paths).encode(errors="surrogateescape")).hexdigest()[:16],
        "--batch-size": options.batch_size,
        "--dtype": dtype,
        "--device": options.device.partition(":")[0],
        "--whiten": options.whiten,
        "--name-pattern": " or ".join(pattern.pattern for pattern in patterns),
    }


def stream_parts(
    model: Model,
    options: ExtractOptions,
    paths: Sequence[str],
    cameras: Sequence[int | None],
    parts: Sequence[Batches],
) -> PartStream:
    """Extract parts in this process; decoding runs ahead across their boundaries."""
    hint = "--skip-bad leaves such files out"
    images = PlainImages(paths, model.config.data, skip_bad=options.skip_bad, hint=hint)
    batches = [batch for part in parts for batch in part]
    stream = model.stream(images, batches, cameras=cameras, num_workers=options.decoders)
    for part in parts:
        try:
            ids, features = zip(*islice(stream, len(part)), strict=True)
        except torch.OutOfMemoryError:
            message = f"out of memory on {options.device}; give a --batch-size below {options.batch_size}"
            raise UserError(message) from None
        shown = np.concatenate(ids)
        # PlainImages marks an unreadable file by a negative id
        yield shown[shown >= 0], np.concatenate(features)[shown >= 0]


def warn_of_bad(images: ImageList, part: Batches, ids: np.ndarray) -> None:
    """Log the images of a part that are not among the ids read."""
    for index in sorted({index for batch in part for index in batch} - set(ids.tolist())):
        logger.warning("%s: cannot be read, left out", images.paths[index])
