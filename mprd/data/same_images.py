"""Whether images are those of an earlier time: by name, size and time of change, or by name and content."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mprd.data.decode import reading_pool
from mprd.errors import UserError
from mprd.text import read_text

if TYPE_CHECKING:
    from mprd.config.schema import DataConfig
    from mprd.data.datasets import ReidDataset

Compare = Literal["times", "content", "sizes"]
"""`sizes` is for drawn pedestrians, which are the same wherever and whenever they are drawn."""


def digest_files(paths: Iterable[Path | str], *facts: object) -> str:
    """Return a digest of facts and of each file's absolute path, size and time of change, 16 hexadecimal digits."""
    digest = hashlib.sha256(" ".join(map(str, facts)).encode())
    for path in paths:
        digest.update(b"\n%s %d %d" % (os.path.abspath(os.fsencode(path)), *look_at(path, "times")))
    return digest.hexdigest()[:16]


@dataclass(frozen=True, eq=False)
class ImageRecord:
    """What is known of a set of image files, N of them."""

    compare: Compare
    names: list[str]
    """Paths below the root of the data set."""
    sizes: np.ndarray
    """Bytes, int64 `[N]`."""
    marks: np.ndarray
    """Times of change in nanoseconds, or digests of contents, int64 `[N]`; zeros under `sizes`."""

    @classmethod
    def of(cls, paths: Sequence[Path], root: Path, *, compare: Compare) -> ImageRecord:
        """Look at files; under `content` they are read. A file that cannot be looked at has size -1."""
        names = [os.path.relpath(path, root) for path in paths]
        with reading_pool() as pool:
            found = np.array([*pool.map(lambda path: look_at(path, compare), paths)], np.int64).reshape(-1, 2)
        return cls(compare, names, found[:, 0], found[:, 1])

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values; names are bytes."""
        # local, as the process of a study keeps its record without torch
        import torch

        names = np.frombuffer(b"\0".join(map(os.fsencode, self.names)), np.uint8)
        return {
            "compare": self.compare,
            "names": torch.from_numpy(names.copy()),
            "sizes": torch.from_numpy(self.sizes),
            "marks": torch.from_numpy(self.marks),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> ImageRecord:
        names = state["names"].numpy().tobytes()
        parts = [os.fsdecode(name) for name in names.split(b"\0")] if len(state["sizes"]) else []
        return cls(state["compare"], parts, state["sizes"].numpy(), state["marks"].numpy())

    def to_json(self) -> str:
        sizes, marks = self.sizes.tolist(), self.marks.tolist()
        return json.dumps({"compare": self.compare, "names": self.names, "sizes": sizes, "marks": marks})

    @classmethod
    def read_json(cls, file: Path) -> ImageRecord:
        """Read what `to_json` returned; raise UserError where the file is damaged."""
        try:
            state = json.loads(read_text(file))
            sizes, marks = (np.array(state[name], np.int64) for name in ("sizes", "marks"))
            return cls(state["compare"], [*map(str, state["names"])], sizes, marks)
        except (ValueError, TypeError, KeyError):
            raise UserError(f"{file}: damaged; remove it to go on without a comparison of images") from None


def record_images(dataset: ReidDataset, config: DataConfig) -> ImageRecord:
    """Return what checkpoints and studies keep of the training images; drawn ones are compared without their times."""
    compare = "sizes" if dataset.name == "synthetic" else config.compare
    return ImageRecord.of(dataset.train.paths, dataset.root, compare=compare)


def look_at(path: Path | str, compare: Compare) -> tuple[int, int]:
    """Return the size of a file and its mark; size -1 where it cannot be looked at."""
    try:
        status = os.stat(path)
        if compare != "content":
            return status.st_size, status.st_mtime_ns if compare == "times" else 0
        digest = hashlib.blake2b(Path(path).read_bytes(), digest_size=8).digest()
        return status.st_size, int.from_bytes(digest, "big", signed=True)
    except OSError:
        return -1, 0


@dataclass(frozen=True)
class ImageChanges:
    """How one set of images differs from an earlier one."""

    added: list[str]
    gone: list[str]
    renamed: dict[str, str]
    """Earlier names by present ones."""
    replaced: list[str]
    """Names whose files have another size or content."""
    rewritten: list[str]
    """Names whose files have another time and the same size."""
    rows: np.ndarray
    """For each present image its earlier row, int64 `[N]`; -1 if it had none, or was replaced."""

    @property
    def are_others(self) -> bool:
        """Whether names, sizes or contents differ, rather than times alone."""
        return bool(self.added or self.gone or self.renamed or self.replaced)

    def __bool__(self) -> bool:
        return self.are_others or bool(self.rewritten) or self.rows.tolist() != [*range(len(self.rows))]

    def __str__(self) -> str:
        renamed = [f"{old} to {new}" for new, old in self.renamed.items()]
        parts = (
            ("added", self.added),
            ("gone", self.gone),
            ("renamed", renamed),
            ("with another content", self.replaced),
            ("written again since, of the same size", self.rewritten),
        )
        return ", ".join(f"{len(names):,} {what} (first {names[0]})" for what, names in parts if names)


def find_changes(earlier: ImageRecord, now: ImageRecord) -> ImageChanges:
    """Compare two records; a file of another name is renamed where size and mark are those of one that is gone."""
    old = {name: row for row, name in enumerate(earlier.names)}
    has_marks = earlier.compare == now.compare != "sizes"
    renamed = find_renamed(earlier, now) if has_marks else {}
    rows = np.array([old.get(renamed.get(name, name), -1) for name in now.names], np.int64)
    replaced, rewritten = [], []
    for row, (name, earlier_row) in enumerate(zip(now.names, rows.tolist(), strict=True)):
        if earlier_row < 0:
            continue
        has_same_mark = not has_marks or now.marks[row] == earlier.marks[earlier_row]
        if now.sizes[row] != earlier.sizes[earlier_row] or (now.compare == "content" and not has_same_mark):
            replaced.append(name)
            rows[row] = -1
        elif not has_same_mark:
            rewritten.append(name)
    there = {*now.names, *renamed.values()}
    added = [name for name in now.names if name not in old and name not in renamed]
    gone = [name for name in earlier.names if name not in there]
    return ImageChanges(added, gone, renamed, replaced, rewritten, rows)


def find_renamed(earlier: ImageRecord, now: ImageRecord) -> dict[str, str]:
    """Return earlier names by present ones, of the files that no other has the size and mark of."""
    known, there = set(earlier.names), set(now.names)
    old = {key: name for name, key in unique_keys(earlier) if name not in there}
    return {name: old[key] for name, key in unique_keys(now) if name not in known and key in old}


def unique_keys(record: ImageRecord) -> list[tuple[str, tuple[int, int]]]:
    """Return name and (size, mark) of the files whose size and mark no other has."""
    keys = [*zip(record.sizes.tolist(), record.marks.tolist(), strict=True)]
    counts = Counter(keys)
    return [(name, key) for name, key in zip(record.names, keys, strict=True) if counts[key] == 1]
