"""An index for large galleries: four-bit product-quantization codes that select the candidates to be ranked."""

# Q queries, N images, D feature size, C candidates of a query
from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mprd.neighbors.approximate import import_faiss
from mprd.runtime.files import replaced
from mprd.runtime.machine import num_cores

logger = logging.getLogger("mprd")

INDEX_FORMAT = 1
PART_SIZE = 4
"""Dimensions that share a four-bit code: one bit a dimension, 1/16 of a float16 and 1/32 of a float32 feature."""
TRAINING_ROWS = 4096
TRAINING_ROUNDS = 10
SHARD_ROWS = 2**17
"""Rows of a shard; a query searches the shards in parallel."""
BLOCK_ROWS = 2**14
MIN_CANDIDATES = 4000
CANDIDATE_SHARE = 128
"""One image in this many is a candidate, which keeps recall@10 above 0.95 even for random features."""


class CodeIndex:
    """Codes of all features of a gallery; every query scans all of them."""

    def __init__(self, shards: list[Any], *, num_images: int, num_features: int) -> None:
        self.shards = shards
        self.num_images = num_images
        self.num_features = num_features

    @classmethod
    def build(cls, features: np.ndarray) -> CodeIndex:
        """Encode unit features [N, D], float32 or float16, into D/8 bytes each.

        Raises UserError if faiss is not installed.
        """
        faiss = import_faiss()
        num_images, num_features = features.shape
        num_parts = -(-num_features // PART_SIZE)
        empty = faiss.IndexPQFastScan(num_parts * PART_SIZE, num_parts, 4, faiss.METRIC_INNER_PRODUCT)
        empty.pq.cp.niter = TRAINING_ROUNDS
        # faiss would refuse a small gallery, whose codes are only less accurate
        empty.pq.cp.min_points_per_centroid = 1
        with one_faiss_thread(faiss):
            empty.train(pad(repeat_to_16(features[evenly_spaced(num_images, TRAINING_ROWS)])))
        shards = []
        for rows in blocks(num_images, SHARD_ROWS):
            shard = faiss.clone_index(empty)
            for block in blocks(rows.stop - rows.start, BLOCK_ROWS):
                shard.add(pad(features[rows][block]))
            shards.append(shard)
        return cls(shards, num_images=num_images, num_features=num_features)

    def candidates(self, queries: np.ndarray, *, least: int) -> np.ndarray:
        """Return candidates for queries [Q, D] float32: int64 [Q, C], padded with -1.

        C is at least `least`, and grows with the gallery; every shard contributes in proportion to its size.
        """
        wanted = max(least, MIN_CANDIDATES, self.num_images // CANDIDATE_SHARE)
        padded = pad(queries)
        with ThreadPoolExecutor(min(len(self.shards), num_cores())) as pool:
            found = pool.map(lambda shard: self.search_shard(shard, padded, wanted=wanted, least=least), self.shards)
            starts = range(0, self.num_images, SHARD_ROWS)
            return np.concatenate(
                [np.where(ids < 0, -1, ids + start) for ids, start in zip(found, starts, strict=True)], axis=1
            )

    def search_shard(self, shard: Any, queries: np.ndarray, *, wanted: int, least: int) -> np.ndarray:
        """Return the candidates of one shard."""
        share = max(least, -(-wanted * shard.ntotal // self.num_images))
        return shard.search(queries, min(share, shard.ntotal))[1]

    def save(self, path: Path, *, key: str, **facts: Any) -> None:
        """Write the index, replacing an existing file only once the new one is complete.

        Args:
            key: identifies the features; `load` refuses an index of another key.
            facts: further entries of the header.
        """
        faiss = import_faiss()
        parts = [faiss.serialize_index(shard) for shard in self.shards]
        head = {"format": INDEX_FORMAT, "key": key, "num_images": self.num_images, "num_features": self.num_features}
        head |= {"bytes": [len(part) for part in parts], **facts}
        with replaced(path, "write the index") as temporary, temporary.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            for part in parts:
                file.write(part.data)

    @classmethod
    def load(cls, path: Path, *, key: str) -> tuple[CodeIndex, dict[str, Any]] | None:
        """Read an index and its header; return None, and log why, if it is damaged or of other features."""
        if not path.is_file():
            return None
        faiss = import_faiss()
        try:
            with path.open("rb") as file:
                head = json.loads(file.readline())
                if head["format"] != INDEX_FORMAT or head["key"] != key:
                    logger.info("%s: an index of other features, building it anew", path)
                    return None
                parts = [np.frombuffer(file.read(size), np.uint8) for size in head["bytes"]]
            shards = [faiss.deserialize_index(part) for part in parts]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            logger.warning("%s: not a readable index, building it anew", path)
            return None
        return cls(shards, num_images=head["num_images"], num_features=head["num_features"]), head


@contextmanager
def one_faiss_thread(faiss: Any) -> Iterator[None]:
    """Use one faiss thread: training is hundreds of tiny clusterings, each too small to share."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def pad(features: np.ndarray) -> np.ndarray:
    """Return features as float32 with zero columns up to a multiple of PART_SIZE."""
    missing = -features.shape[1] % PART_SIZE
    rows = np.ascontiguousarray(features, dtype=np.float32)
    return np.pad(rows, ((0, 0), (0, missing))) if missing else rows


def repeat_to_16(rows: np.ndarray) -> np.ndarray:
    """Repeat rows up to at least 16, the number of centers of a four-bit code."""
    return np.resize(rows, (max(16, len(rows)), rows.shape[1]))


def evenly_spaced(num_rows: int, wanted: int) -> np.ndarray:
    """Return up to `wanted` row numbers, evenly spaced."""
    wanted = min(wanted, num_rows)
    return np.arange(wanted) * num_rows // wanted


def blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Return consecutive slices of at most `size` rows."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
