"""An index for large galleries: four-bit codes of all features, which say which few are worth a true look."""

# Q queries, N images, D feature size, C candidates of a query
from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from mprd.errors import UserError
from mprd.runtime.checkpoint import disk_reason
from mprd.runtime.device import num_cores

logger = logging.getLogger("mprd")

FORMAT = 1
PART_SIZE = 4
"""Numbers of a feature that share a code of four bits: a bit a number, a 16th or a 32nd of the feature."""
TRAINING_ROWS = 4096
TRAINING_ROUNDS = 10
SHARD_ROWS = 2**17
"""Rows of a shard; a query searches the shards side by side."""
BLOCK_ROWS = 2**14
LEAST_CANDIDATES = 4000
CANDIDATE_SHARE = 128
"""One image in so many is a candidate: random features, the hardest there are, then have a recall@10 above 0.95."""


class CodeIndex:
    """Codes of all features of a gallery, scanned in full for each query."""

    def __init__(self, shards: list[Any], *, num_images: int, num_features: int) -> None:
        self.shards = shards
        self.num_images = num_images
        self.num_features = num_features

    @classmethod
    def build(cls, features: np.ndarray) -> CodeIndex:
        """Code unit features [N, D], float32 or float16, in blocks; a million of 2,048 take 256 MB.

        Raises UserError where faiss is missing.
        """
        faiss = import_faiss()
        num_images, num_features = features.shape
        num_parts = -(-num_features // PART_SIZE)
        blank = faiss.IndexPQFastScan(num_parts * PART_SIZE, num_parts, 4, faiss.METRIC_INNER_PRODUCT)
        blank.pq.cp.niter = TRAINING_ROUNDS
        # few images are few points for 16 centers; they are then merely coded less well
        blank.pq.cp.min_points_per_centroid = 1
        with one_thread(faiss):
            blank.train(pad(enough(features[spread(num_images, TRAINING_ROWS)])))
        shards = []
        for rows in blocks(num_images, SHARD_ROWS):
            shard = faiss.clone_index(blank)
            for block in blocks(rows.stop - rows.start, BLOCK_ROWS):
                shard.add(pad(features[rows][block]))
            shards.append(shard)
        return cls(shards, num_images=num_images, num_features=num_features)

    def candidates(self, queries: np.ndarray, *, least: int) -> np.ndarray:
        """Return the images worth a look for each query [Q, D] float32: int64 [Q, C], -1 where there are none.

        C is `least` and more: a share of the gallery, and each shard gives its share of that.
        """
        wanted = max(least, LEAST_CANDIDATES, self.num_images // CANDIDATE_SHARE)
        padded = pad(queries)
        with ThreadPoolExecutor(min(len(self.shards), num_cores())) as pool:
            found = pool.map(lambda shard: self.search_shard(shard, padded, wanted=wanted, least=least), self.shards)
            starts = range(0, self.num_images, SHARD_ROWS)
            return np.concatenate(
                [np.where(ids < 0, -1, ids + start) for ids, start in zip(found, starts, strict=True)], axis=1
            )

    def search_shard(self, shard: Any, queries: np.ndarray, *, wanted: int, least: int) -> np.ndarray:
        """Search one shard for its share of the candidates."""
        share = max(least, -(-wanted * shard.ntotal // self.num_images))
        return shard.search(queries, min(share, shard.ntotal))[1]

    def save(self, path: Path, *, key: str, **facts: Any) -> None:
        """Write the index as a whole, with the key of the features it was built for and what else is to be told."""
        faiss = import_faiss()
        parts = [faiss.serialize_index(shard) for shard in self.shards]
        head = {"format": FORMAT, "key": key, "num_images": self.num_images, "num_features": self.num_features}
        head |= {"bytes": [len(part) for part in parts], **facts}
        temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
        try:
            with temporary.open("wb") as file:
                file.write(json.dumps(head).encode() + b"\n")
                for part in parts:
                    file.write(part.data)
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"{path}: cannot write the index: {disk_reason(error)}") from None
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path, *, key: str) -> tuple[CodeIndex, dict[str, Any]] | None:
        """Read an index and what it says of itself; None, with a line in the log, where it is not of these features."""
        if not path.is_file():
            return None
        faiss = import_faiss()
        try:
            with path.open("rb") as file:
                head = json.loads(file.readline())
                if head["format"] != FORMAT or head["key"] != key:
                    logger.info("%s: an index of other features, building it anew", path)
                    return None
                parts = [np.frombuffer(file.read(size), np.uint8) for size in head["bytes"]]
            shards = [faiss.deserialize_index(part) for part in parts]
        except (OSError, ValueError, KeyError, TypeError, RuntimeError):
            logger.warning("%s: not a readable index, building it anew", path)
            return None
        return cls(shards, num_images=head["num_images"], num_features=head["num_features"]), head


def import_faiss() -> Any:
    """Import faiss; raise UserError where it is missing."""
    logging.getLogger("faiss").setLevel(logging.WARNING)
    try:
        import faiss
    except ModuleNotFoundError:
        raise UserError("an index needs faiss (pip install faiss-cpu); or search exactly (--index exact)") from None
    return faiss


@contextmanager
def one_thread(faiss: Any) -> Iterator[None]:
    """Keep faiss to one thread: it trains hundreds of tiny clusterings, and threads wait for each other in each."""
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(threads)


def pad(features: np.ndarray) -> np.ndarray:
    """Turn features into float32 rows whose length is a multiple of the part size."""
    missing = -features.shape[1] % PART_SIZE
    rows = np.ascontiguousarray(features, dtype=np.float32)
    return np.pad(rows, ((0, 0), (0, missing))) if missing else rows


def enough(rows: np.ndarray) -> np.ndarray:
    """Repeat rows until there is one for each of the 16 centers."""
    return np.resize(rows, (max(16, len(rows)), rows.shape[1]))


def spread(num_rows: int, wanted: int) -> np.ndarray:
    """Choose rows evenly."""
    wanted = min(wanted, num_rows)
    return np.arange(wanted) * num_rows // wanted


def blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Cut rows into blocks."""
    return (slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size))
