"""The parts of a feature file: written one by one, so that an interrupted extraction resumes, and then joined."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mprd.backbone.features import ordered_batches
from mprd.data.decode import VERSION
from mprd.data.same_images import digest_files
from mprd.errors import UserError
from mprd.feature_file import Rows, join_files, open_features, rows_to_table, write_features
from mprd.runs.folder import parse_object, write_text
from mprd.text import read_text

if TYPE_CHECKING:
    import pyarrow as pa

PART_IMAGES = 1024
"""Approximate images per part; a stop loses less than one part."""

Batches = Sequence[Sequence[int]]


def cut_parts(num_images: int, batch_size: int) -> list[Batches]:
    """Cut images into the batches that evaluation makes, and group these into parts."""
    batches = ordered_batches(torch.arange(num_images), batch_size)
    step = max(1, PART_IMAGES // batch_size)
    return [batches[start : start + step] for start in range(0, len(batches), step)]


def count_images(part: Batches) -> int:
    return sum(len(batch) for batch in part)


class Parts:
    """The parts of a feature file, in a hidden folder beside it until all are complete."""

    def __init__(self, out: Path, batches: list[Batches], schema: pa.Schema, paths: Sequence[str]) -> None:
        self.out, self.batches, self.schema, self.paths = out, batches, schema, paths
        self.folder = out.with_name(f".{out.name}.parts")
        self.files = [self.folder / f"{number:06d}.parquet" for number in range(len(batches))]
        self.settings = self.folder / "settings.json"

    def prepare(self, settings: dict[str, Any]) -> None:
        """Create the folder; raise UserError if it exists with other settings."""
        if not self.settings.is_file():
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"{self.folder}: cannot write there: {error.strerror}") from None
            write_text(self.settings, json.dumps(settings, indent=1) + "\n")
            return
        found = parse_object(read_text(self.settings))
        if found is None:
            raise UserError(f"{self.settings}: damaged; remove {self.folder} to start anew")
        different = [key for key, value in settings.items() if found.get(key) != value]
        if different:
            key = different[0]
            raise UserError(
                f"{self.folder}: begun with other settings ({key} {found.get(key)}, now {settings[key]}); give the "
                "same to go on, or remove the folder to start anew"
            )

    def missing(self, *, skip_bad: bool) -> list[int]:
        """Return the numbers of the parts that are missing or damaged, or whose images have changed since.

        Raises UserError if complete parts lack unreadable images and `skip_bad` is not set.
        """
        missing, num_bad = [], 0
        for number, (part, file) in enumerate(zip(self.batches, self.files, strict=True)):
            try:
                num_rows = open_features(file).num_rows
            except UserError:
                num_rows = -1
            if num_rows < 0 or self.read_digest(number) != self.digest(number):
                missing.append(number)
            else:
                num_bad += count_images(part) - num_rows
        if num_bad and not skip_bad:
            raise UserError(
                f"{self.folder}: begun with --skip-bad, which left out {num_bad} images; give it again, or remove "
                "the folder to start anew"
            )
        return missing

    def write(self, number: int, rows: Rows) -> None:
        """Write a part, and the digest of its images."""
        write_features(self.files[number], [rows_to_table(rows, self.schema)], self.schema)
        write_text(self.files[number].with_suffix(".digest"), self.digest(number))

    def digest(self, number: int) -> str:
        """Return a digest of a part's images as they are now."""
        return digest_files((self.paths[index] for batch in self.batches[number] for index in batch), VERSION)

    def read_digest(self, number: int) -> str:
        """Return the digest of a part's images when it was written; empty where it is missing."""
        file = self.files[number].with_suffix(".digest")
        return file.read_text() if file.is_file() else ""

    def count_rows(self) -> int:
        """Count the images that could be read."""
        return sum(open_features(file).num_rows for file in self.files)

    def join(self) -> int:
        """Write the feature file, remove the parts, and return the number of rows."""
        num_rows = join_files(self.files, self.out, self.schema)
        self.remove()
        return num_rows

    def remove(self) -> None:
        shutil.rmtree(self.folder)
