"""Search a gallery of unit features, exactly or through an index."""

# Q queries, N images, D feature size, K results of a query, B rows of a block
from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor

from mprd.errors import UserError
from mprd.feature_file import Rows, feature_schema, open_features, rows_to_table, write_features
from mprd.neighbors.approximate import import_faiss
from mprd.search.index import BLOCK_ROWS, CodeIndex, blocks, evenly_spaced

logger = logging.getLogger("mprd")

IndexKind = Literal["exact", "pq"]
UNKNOWN = np.iinfo(np.int64).min
"""The identity or camera of an image whose name has none."""
LARGE_BLOCK_ROWS = 2**17
"""Block size where a block takes little memory: fewer blocks synchronize threads less often."""
FEW_QUERIES = 16
"""Up to this many queries are multiplied in float16 if the features are; for more, converting to float32 pays off."""
HALF_ERROR = 2.0**-9
"""Bound on the error of a cosine in float16: query and result are rounded to 11 bits, the sum is float32."""
SPARE = 64
"""Images kept of a float16 scan beyond twice the wanted number, to be rescored in float32."""
SAMPLE_QUERIES = 16
"""Images of the gallery on which the recall of an index is measured."""
NO_ROWS = np.empty(0, np.int64)


class TopK(NamedTuple):
    """The nearest rows of each query: cosines `values` and int64 `ids`, [Q, K] each, nearest first."""

    values: Tensor
    ids: Tensor


class RankedRows(NamedTuple):
    """The nearest images of each query, nearest first; padded with -1 and infinity."""

    rows: np.ndarray
    """int64 [Q, K], positions in the gallery."""
    distances: np.ndarray
    """float32 [Q, K], 1 - cosine, in [0, 2]."""


class Gallery:
    """Unit features of N images, searched exactly or through an index.

    >>> import numpy as np
    >>> from mprd.search import Gallery
    >>> gallery = Gallery.from_features(np.eye(3), paths=["a.jpg", "b.jpg", "c.jpg"], camids=[1, 1, 2])
    >>> rows, distances = gallery.search(np.array([[0.8, 0.0, 0.6]]), top=2)
    >>> [f"{gallery.paths[row]} {distance:.2f}" for row, distance in zip(rows[0], distances[0])]
    ['a.jpg 0.20', 'c.jpg 0.40']
    """

    def __init__(
        self,
        features: np.ndarray,
        paths: Sequence[str],
        pids: np.ndarray,
        camids: np.ndarray,
        *,
        run: str = "",
        weights: str = "",
    ) -> None:
        self.features = features
        """float32 or float16 [N, D], unit length."""
        self.paths = paths
        self.pids = pids
        """int64 [N], or UNKNOWN."""
        self.camids = camids
        """int64 [N], as numbered in file names, or UNKNOWN."""
        self.run = run
        """Name of the run that the features come from."""
        self.weights = weights
        """`Model.fingerprint` of its network; empty where it is not known."""
        self.index: CodeIndex | None = None
        self.recall: float | None = None
        """Recall@10 of the index against exact search, on a sample of the gallery's images."""

    def __len__(self) -> int:
        return len(self.features)

    @classmethod
    def from_features(
        cls,
        features: np.ndarray,
        *,
        paths: Sequence[str] | None = None,
        pids: Sequence[int | None] | np.ndarray | None = None,
        camids: Sequence[int | None] | np.ndarray | None = None,
        run: str = "",
    ) -> Gallery:
        """Make a gallery of unit features [N, D]; float16 and float32 are not copied, others become float32.

        Paths default to row numbers, identities and cameras to unknown. Raises UserError for sizes that do not match
        and for rows that are not of unit length.
        """
        features = np.asarray(features)
        if features.ndim != 2 or not features.size:
            raise UserError(f"features must be [N, D], but got shape {features.shape}")
        if features.dtype not in (np.float16, np.float32):
            features = features.astype(np.float32)
        paths = [str(row) for row in range(len(features))] if paths is None else paths
        for name, values in (("paths", paths), ("pids", pids), ("camids", camids)):
            if values is not None and len(values) != len(features):
                raise UserError(f"{name} must have one entry per feature, {len(features)}, but got {len(values)}")
        lengths = np.linalg.norm(features[evenly_spaced(len(features), 1000)].astype(np.float32), axis=1)
        if not np.allclose(lengths, 1, atol=0.01):
            raise UserError(f"features must have unit length, but got {lengths[np.abs(lengths - 1).argmax()]}")
        return cls(features, paths, as_ids(pids, len(features)), as_ids(camids, len(features)), run=run)

    @classmethod
    def open(cls, path: Path | str, *, index: IndexKind = "exact") -> Gallery:
        """Read a feature file; an index is read from the file beside it, or built and written there.

        Raises UserError for another kind of file, and if an index needs faiss and it is not installed.
        """
        check_index_kind(index)
        path = Path(path)
        file = open_features(path)
        if not file.num_rows:
            raise UserError(f"{path}: holds no features")
        features = np.empty((file.num_rows, file.num_features), file.dtype)
        paths: list[str] = []
        pids, camids = (np.full(file.num_rows, UNKNOWN) for _ in range(2))
        for batch in file.batches():
            rows = slice(len(paths), len(paths) + len(batch.paths))
            features[rows] = batch.features
            pids[rows], camids[rows] = as_ids(batch.pids, len(batch.paths)), as_ids(batch.camids, len(batch.paths))
            paths += batch.paths
        gallery = cls(features, paths, pids, camids, run=file.run, weights=file.weights)
        if index == "pq":
            gallery.open_index(path)
        return gallery

    def save(self, path: Path | str) -> None:
        """Write a feature file; an existing file is replaced only once the new one is complete."""
        dtype: Literal["float16", "float32"] = "float16" if self.features.dtype == np.float16 else "float32"
        schema = feature_schema(run=self.run, num_features=self.features.shape[1], dtype=dtype, weights=self.weights)
        tables = (
            rows_to_table(
                Rows(list(self.paths[r]), as_optional(self.pids[r]), as_optional(self.camids[r]), self.features[r]),
                schema,
            )
            for r in blocks(len(self), BLOCK_ROWS)
        )
        write_features(Path(path), tables, schema)

    def open_index(self, path: Path) -> None:
        """Read the index beside a feature file, or build and write it if it is missing or stale."""
        import_faiss()
        status = path.stat()
        key = f"{status.st_size} bytes of {status.st_mtime_ns}"
        file = path.with_name(f"{path.name}.pq")
        found = CodeIndex.load(file, key=key)
        if found is not None:
            self.index, self.recall = found[0], found[1].get("recall")
        else:
            logger.info("building an index of %d images", len(self))
            self.build_index().save(file, key=key, recall=self.recall)
        logger.info("%s: recall@10 %.3f against exact search for a sample of the gallery", file, self.recall or 0.0)

    def build_index(self) -> CodeIndex:
        """Build an index, measure its recall, and use it for all later searches."""
        self.index = None
        queries = self.features[evenly_spaced(len(self), SAMPLE_QUERIES)]
        exact = self.search(queries, top=10).rows
        self.index = CodeIndex.build(self.features)
        self.recall = recall(self.search(queries, top=10).rows, exact)
        return self.index

    def search(
        self, query_features: np.ndarray, top: int = 10, *, leave_out: Sequence[np.ndarray] | None = None
    ) -> RankedRows:
        """Rank the gallery for queries [Q, D] (scaled to unit length) by cosine; equal cosines by row.

        Without an index the result is exact for the features as stored. K is min(`top`, N).

        Args:
            leave_out: for each query the rows, int64, to leave out of the result.

        Raises UserError for shapes that do not match.
        """
        queries = self.check_queries(query_features)
        if top < 1:
            raise UserError(f"top must be at least 1, but got {top}")
        width = min(top, len(self))
        banned = [np.unique(rows) for rows in leave_out] if leave_out is not None else [NO_ROWS] * len(queries)
        if len(banned) != len(queries):
            raise UserError(f"leave_out must have rows for each of {len(queries)} queries, but got {len(banned)}")
        best = self.search_codes(queries, width, banned) if self.index else self.search_all(queries, width, banned)
        is_found = best.values > -torch.inf
        # rounding may take a cosine beyond 1
        distances = torch.where(is_found, (1 - best.values).clamp(0, 2), torch.inf)
        return RankedRows(torch.where(is_found, best.ids, -1).numpy(), distances.numpy())

    def check_queries(self, query_features: np.ndarray) -> Tensor:
        """Return queries as unit float32 rows [Q, D]; raise UserError for another D, NaN and infinity."""
        queries = torch.from_numpy(np.array(query_features, dtype=np.float32))
        if queries.ndim != 2 or queries.shape[1] != self.features.shape[1]:
            raise UserError(
                f"query features must be [Q, {self.features.shape[1]}] as the gallery's are, but got "
                f"{tuple(queries.shape)}"
            )
        if not queries.isfinite().all():
            raise UserError("query features must be finite, but hold NaN or infinity")
        return torch.nn.functional.normalize(queries, dim=1)

    def search_all(self, queries: Tensor, width: int, banned: Sequence[np.ndarray]) -> TopK:
        """Rank all features exactly; float16 features are scanned roughly first, and the best rescored in float32."""
        features = torch.from_numpy(self.features)
        if features.dtype == torch.float32 or len(queries) > FEW_QUERIES:
            return in_order(scan(queries, features, width, banned, in_float32=True))
        rough = scan(queries, features, min(2 * width + SPARE, len(self)), banned, in_float32=False)
        best = rescore(queries, features, rough.ids, is_banned=rough.values == -torch.inf, width=width)
        # a row that the scan dropped has at most the rough cosine of the last row kept
        is_sure = (best.values[:, -1] > rough.values[:, -1] + HALF_ERROR) | (rough.ids.shape[1] == len(self))
        unsure = (~is_sure).nonzero().squeeze(1)
        if len(unsure):
            again = scan(queries[unsure], features, width, [banned[row] for row in unsure], in_float32=True)
            best.values[unsure], best.ids[unsure] = in_order(again)
        return best

    def search_codes(self, queries: Tensor, width: int, banned: Sequence[np.ndarray]) -> TopK:
        """Rank the candidates that the index returns by their features."""
        assert self.index is not None
        features = torch.from_numpy(self.features)
        candidates = self.index.candidates(queries.numpy(), least=width)
        rankings = []
        for row, rows in enumerate(banned):
            query = queries[row : row + 1]
            ids = candidates[row][(candidates[row] >= 0) & ~np.isin(candidates[row], rows)]
            if len(ids) >= width:
                with one_torch_thread():
                    rankings.append(rank_candidates(query, features, ids, width))
            else:  # too many candidates are banned
                rankings.append(self.search_all(query, width, [rows]))
        return TopK(torch.cat([best.values for best in rankings]), torch.cat([best.ids for best in rankings]))


def scan(queries: Tensor, features: Tensor, width: int, banned: Sequence[np.ndarray], *, in_float32: bool) -> TopK:
    """Return the best rows of each query [Q, `width`], scanning block by block; banned rows come last, with -inf."""
    best = TopK(queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64))
    is_small = len(queries) <= FEW_QUERIES and not (in_float32 and features.dtype == torch.float16)
    for rows in blocks(len(features), LARGE_BLOCK_ROWS if is_small else BLOCK_ROWS):
        block_BD = features[rows].float() if in_float32 else features[rows]
        sim_QB = (queries.to(block_BD.dtype) @ block_BD.T).float()
        for row, ids in enumerate(banned):
            inside = ids[np.searchsorted(ids, rows.start) : np.searchsorted(ids, rows.stop)] - rows.start
            sim_QB[row, torch.from_numpy(inside)] = -torch.inf
        values, order = sim_QB.topk(min(width, sim_QB.shape[1]), dim=1)
        values, found = torch.cat([best.values, values], 1), torch.cat([best.ids, order + rows.start], 1)
        values, order = values.topk(min(width, values.shape[1]), dim=1)
        best = TopK(values, found.gather(1, order))
    return best


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Use one torch thread: for a few thousand rows, synchronizing threads costs more than they save."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def rank_candidates(query: Tensor, features: Tensor, candidates: np.ndarray, width: int) -> TopK:
    """Rank the candidates of one query [1, D]: all in the dtype of the features, the best again in float32."""
    ids = torch.from_numpy(candidates)
    rows = torch.from_numpy(features.numpy().take(candidates, axis=0))
    rough = (rows @ query[0].to(rows.dtype)).float().topk(min(2 * width + SPARE, len(ids)))
    is_banned = torch.zeros(1, len(rough.values), dtype=torch.bool)
    return rescore(query, features, ids[rough.indices][None], is_banned=is_banned, width=width)


def rescore(queries: Tensor, features: Tensor, ids: Tensor, *, is_banned: Tensor, width: int) -> TopK:
    """Rank each query's candidates [Q, C] in float32; banned ones come last, with -inf."""
    values = torch.empty(ids.shape)
    for row, candidates in enumerate(ids):
        values[row] = features[candidates].float() @ queries[row]
    values[is_banned] = -torch.inf
    best = in_order(TopK(values, ids))
    return TopK(best.values[:, :width].contiguous(), best.ids[:, :width].contiguous())


def in_order(best: TopK) -> TopK:
    """Sort by descending value, equal values by row."""
    ids, by_id = best.ids.sort(dim=1)
    values, order = best.values.gather(1, by_id).sort(dim=1, descending=True, stable=True)
    return TopK(values, ids.gather(1, order))


def recall(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the share of the wanted rows [Q, K] that were found."""
    return float((wanted[:, :, None] == found[:, None, :]).any(2).mean())


def as_ids(ids: Sequence[int | None] | np.ndarray | None, num_images: int) -> np.ndarray:
    """Return identities or cameras as int64 [N], with UNKNOWN for None."""
    if ids is None:
        return np.full(num_images, UNKNOWN)
    if isinstance(ids, np.ndarray):
        return ids.astype(np.int64)
    return np.array([UNKNOWN if number is None else number for number in ids], np.int64)


def as_optional(ids: np.ndarray) -> list[int | None]:
    """Return ids with None for UNKNOWN."""
    return [None if number == UNKNOWN else number for number in ids.tolist()]


def check_index_kind(index: str) -> IndexKind:
    """Narrow the type; raise UserError for an unknown index."""
    for kind in get_args(IndexKind):
        if index == kind:
            return kind
    raise UserError(f"--index must be {' or '.join(get_args(IndexKind))}, but got {index!r}")
