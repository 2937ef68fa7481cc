"""Features of many files into one feature file: streamed, in parts that outlive a stop."""

from __future__ import annotations

import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from mprd.backbone.features import ordered_batches
from mprd.data.images import InferenceImages
from mprd.errors import Interrupted, UserError
from mprd.extract.inputs import Pictures, ids_of
from mprd.feature_file import Dtype, Rows, feature_schema, join_files, open_features, to_table, write_features
from mprd.model import Model
from mprd.runs.folder import write_text

if TYPE_CHECKING:
    import pyarrow as pa

logger = logging.getLogger("mprd")

PART_IMAGES = 1024
"""About so many images are kept at a time; a stop loses what came after the last of them."""

Batches = Sequence[Sequence[int]]
PartStream = Iterator[tuple[np.ndarray, np.ndarray]]
"""For part after part the ids `[m]` of its readable images and their features `[m, D]`."""
Stream = Callable[[Model, "Job", Sequence[str], Sequence[Batches]], PartStream]
"""Who extracts parts of some paths."""


@dataclass(frozen=True)
class Job:
    """How features are extracted, whoever does it."""

    run: Path
    best: bool
    device: str
    """Where it runs: `cpu`, `cuda` or `cuda:N`."""
    batch_size: int
    """Most images a forward pass."""
    skip_bad: bool
    """Leave out files that cannot be read."""
    decoders: int
    """Processes that decode; 0 decodes in the process that computes."""


def extract_to_file(
    model: Model,
    job: Job,
    pictures: Pictures,
    out: Path,
    *,
    dtype: Dtype,
    patterns: Sequence[re.Pattern[str]],
    stream: Stream,
    on_images: Callable[[int, bool], None],
) -> int:
    """Extract features into a file, going on where an earlier call with the same settings stopped; count its rows.

    Args:
        stream: `stream_parts`, or another that extracts the same elsewhere.
        on_images: called with a number of images that are done, and whether an earlier call has done them.

    Raises UserError where an image cannot be read, or settings differ from those of the parts that are there;
    Interrupted when Ctrl-C asked to stop. A file of this name is replaced.
    """
    schema = feature_schema(run=model.name, num_features=model.num_features, dtype=dtype)
    parts = Parts(out, cut_parts(len(pictures.paths), job.batch_size), schema)
    parts.prepare(describe(job, model, pictures, dtype=dtype, patterns=patterns))
    todo = parts.missing(skip_bad=job.skip_bad)
    on_images(len(pictures.paths) - sum(count(parts.batches[number]) for number in todo), True)
    wanted = [parts.batches[number] for number in todo]
    try:
        for number, (ids, features) in zip(todo, stream(model, job, pictures.paths, wanted), strict=True):
            warn_of_bad(pictures, parts.batches[number], ids)
            parts.write(number, to_rows(pictures, ids.tolist(), features, patterns))
            on_images(count(parts.batches[number]), False)
        if not parts.count_rows():
            shutil.rmtree(parts.folder)
            num_images = len(pictures.paths)
            raise UserError(f"{pictures.paths[0]}: cannot read this image, nor any other of the {num_images}")
        return parts.join()
    except KeyboardInterrupt:
        raise Interrupted("stopped; what is done is kept, and the same command goes on from there") from None


def count(part: Batches) -> int:
    """Count the images of a part."""
    return sum(len(batch) for batch in part)


def cut_parts(num_images: int, batch_size: int) -> list[Batches]:
    """Cut images into the batches of an evaluation of them, and these into parts that are kept together."""
    batches = ordered_batches(torch.arange(num_images), batch_size)
    step = max(1, PART_IMAGES // batch_size)
    return [batches[start : start + step] for start in range(0, len(batches), step)]


def describe(
    job: Job, model: Model, pictures: Pictures, *, dtype: Dtype, patterns: Sequence[re.Pattern[str]]
) -> dict[str, Any]:
    """Return all that the rows depend on: parts of other settings are not to be joined with ours."""
    return {
        "version": 1,
        "run": model.name,
        "weights": model.fingerprint(),
        "images": len(pictures.paths),
        "paths": hashlib.sha256("\n".join(pictures.paths).encode(errors="surrogateescape")).hexdigest()[:16],
        "--batch-size": job.batch_size,
        "--dtype": dtype,
        "--device": job.device.partition(":")[0],
        "--name-pattern": " or ".join(pattern.pattern for pattern in patterns),
    }


class Parts:
    """The parts of a feature file, kept in a hidden folder beside it until all are there."""

    def __init__(self, out: Path, batches: list[Batches], schema: pa.Schema) -> None:
        self.out, self.batches, self.schema = out, batches, schema
        self.folder = out.with_name(f".{out.name}.parts")
        self.files = [self.folder / f"{number:06d}.parquet" for number in range(len(batches))]
        self.settings = self.folder / "settings.json"

    def prepare(self, described: dict[str, Any]) -> None:
        """Make the folder, or see that the one that is there was begun with the same settings."""
        if not self.settings.is_file():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{self.folder}: cannot write there: {error.strerror}") from None
            write_text(self.settings, json.dumps(described, indent=1) + "\n")
            return
        try:
            found = json.loads(self.settings.read_text())
            different = [key for key, value in described.items() if found.get(key) != value]
        except (ValueError, AttributeError):
            raise UserError(f"{self.settings}: damaged; remove {self.folder} to start anew") from None
        if different:
            key = different[0]
            raise UserError(
                f"{self.folder}: begun with other settings ({key} {found.get(key)}, now {described[key]}); give the "
                "same to go on, or remove the folder to start anew"
            )

    def missing(self, *, skip_bad: bool) -> list[int]:
        """Number the parts that are still to be extracted; a damaged one is."""
        missing, num_bad = [], 0
        for number, (part, file) in enumerate(zip(self.batches, self.files, strict=True)):
            try:
                num_bad += count(part) - open_features(file).num_rows
            except UserError:
                missing.append(number)
        if num_bad and not skip_bad:
            raise UserError(
                f"{self.folder}: begun with --skip-bad, which left out {num_bad} images; give it again, or remove "
                "the folder to start anew"
            )
        return missing

    def write(self, number: int, rows: Rows) -> None:
        """Keep a part."""
        write_features(self.files[number], [to_table(rows, self.schema)], self.schema)

    def count_rows(self) -> int:
        """Count the images that could be read."""
        return sum(open_features(file).num_rows for file in self.files)

    def join(self) -> int:
        """Write the whole file, remove the parts, and return the number of rows."""
        num_rows = join_files(self.files, self.out, self.schema)
        shutil.rmtree(self.folder)
        return num_rows


def stream_parts(model: Model, job: Job, paths: Sequence[str], parts: Sequence[Batches]) -> PartStream:
    """Extract part after part in this process, decoding ahead across their borders."""
    hint = "--skip-bad leaves such files out"
    images = InferenceImages(paths, model.config.data, skip_bad=job.skip_bad, hint=hint)
    stream = model.stream(images, [batch for part in parts for batch in part], num_workers=job.decoders)
    for part in parts:
        try:
            ids, features = zip(*islice(stream, len(part)), strict=True)
        except torch.OutOfMemoryError:
            raise UserError(f"out of memory on {job.device}; give a --batch-size below {job.batch_size}") from None
        shown = np.concatenate(ids)
        yield shown[shown >= 0], np.concatenate(features)[shown >= 0]


def warn_of_bad(pictures: Pictures, part: Batches, ids: np.ndarray) -> None:
    """Name the images of a part that are not among those read."""
    for index in sorted({index for batch in part for index in batch} - set(ids.tolist())):
        logger.warning("%s: cannot be read, left out", pictures.paths[index])


def to_rows(pictures: Pictures, ids: list[int], features: np.ndarray, patterns: Sequence[re.Pattern[str]]) -> Rows:
    """Put features beside the paths of their images and the ids in their names."""
    known = [ids_of(pictures.names[index], patterns) for index in ids]
    pids, camids = [pid for pid, _ in known], [camid for _, camid in known]
    return Rows([pictures.paths[index] for index in ids], pids, camids, features)
