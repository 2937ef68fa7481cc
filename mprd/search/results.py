"""The result of a search: for each query the ranked gallery, with the identities and cameras in its names."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from mprd.errors import UserError
from mprd.extract.stream import whitened_name
from mprd.metrics import JUNK_PID
from mprd.model import Model
from mprd.neighbors.re_ranking import re_rank
from mprd.search.gallery import UNKNOWN, Gallery, RankedRows

Cameras = Literal["all", "others", "protocol"]
MAX_RE_RANKED = 30_000
"""Re-ranking compares every image with every other, which takes minutes at this size on two cores."""


@dataclass(frozen=True)
class QueryImage:
    """A query, with the ids in its name."""

    path: str
    pid: int | None
    camid: int | None
    """Camera as numbered in file names."""


@dataclass(frozen=True)
class SearchHit:
    """A gallery image among the nearest of a query."""

    rank: int
    """From 1."""
    path: str
    pid: int | None
    camid: int | None
    distance: float
    is_right: bool | None
    """Whether its identity is the query's; None if either is unknown or junk."""


@dataclass(frozen=True)
class Answer:
    """The nearest gallery images of one query."""

    query: QueryImage
    hits: tuple[SearchHit, ...]

    @property
    def first_right(self) -> int | None:
        """Rank of the first right image; None if no hit is right."""
        return next((hit.rank for hit in self.hits if hit.is_right), None)

    @property
    def can_be_judged(self) -> bool:
        """Whether any hit is known to be right or wrong."""
        return any(hit.is_right is not None for hit in self.hits)


@dataclass(frozen=True)
class SearchResult:
    """The answers to all queries, and how they were found."""

    run: str
    gallery: str
    num_images: int
    index: str
    cameras: Cameras
    distance: str
    """Description of the distance."""
    answers: list[Answer]
    camera_names: dict[int, str] = field(default_factory=dict)
    """The names of the training's cameras in file names, by number."""

    def camera_name(self, camid: int | None) -> str:
        """Return a camera as file names have it; a dash for None."""
        return "-" if camid is None else self.camera_names.get(camid, str(camid))

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        answers = [{**asdict(answer), "first_right": answer.first_right} for answer in self.answers]
        return asdict(self) | {"answers": answers}


def answer_queries(
    gallery: Gallery, queries: Sequence[QueryImage], features: np.ndarray, *, top: int, cameras: Cameras, rerank: bool
) -> list[Answer]:
    """Rank the gallery for queries with features [Q, D]; a query's own file is never among its hits.

    Raises UserError if `cameras` needs ids that a name lacks, or the gallery is too large to re-rank.
    """
    rows_of: dict[str, list[int]] = {}
    for row, path in enumerate(gallery.paths):
        rows_of.setdefault(path, []).append(row)
    leave_out = [excluded_rows(gallery, query, rows_of.get(query.path, []), cameras=cameras) for query in queries]
    if rerank:
        ranked = search_re_ranked(gallery, features, top, leave_out=leave_out)
    else:
        ranked = gallery.search(features, top, leave_out=leave_out)
    return [
        Answer(query, tuple(describe_hits(gallery, query, rows, distances)))
        for query, rows, distances in zip(queries, *ranked, strict=True)
    ]


def whiten_gallery(gallery: Gallery, features: np.ndarray, model: Model) -> tuple[Gallery, np.ndarray]:
    """Return the gallery and the queries' features [Q, D], both as training compares them.

    A gallery that was extracted with --whiten is taken as it is. Raises UserError where the run has no whitening.
    """
    wanted = model.whiten(features)
    if gallery.run == whitened_name(model):
        return gallery, wanted
    seen = model.whiten(np.asarray(gallery.features, np.float32))
    return Gallery(seen, gallery.paths, gallery.pids, gallery.camids, run=gallery.run), wanted


def excluded_rows(gallery: Gallery, query: QueryImage, own_rows: Sequence[int], *, cameras: Cameras) -> np.ndarray:
    """Return the gallery rows that must not answer a query, int64.

    Args:
        own_rows: rows of the query's own file.
    """
    if cameras == "all":
        return np.array(own_rows, np.int64)
    if query.camid is None or (cameras == "protocol" and query.pid is None):
        missing = "camera" if cameras == "others" else "camera or no identity"
        raise UserError(f"{query.path}: no {missing} in its name, which --cameras {cameras} needs (--name-pattern)")
    is_excluded = gallery.camids == query.camid
    if cameras == "protocol":
        is_excluded = (is_excluded & (gallery.pids == query.pid)) | (gallery.pids == JUNK_PID)
    is_excluded[list(own_rows)] = True
    return np.flatnonzero(is_excluded)


def search_re_ranked(
    gallery: Gallery, features: np.ndarray, top: int, *, leave_out: Sequence[np.ndarray]
) -> RankedRows:
    """Rank by the k-reciprocal distance, which compares all images with each other."""
    if len(gallery) > MAX_RE_RANKED:
        raise UserError(f"--rerank compares all images with each other: at most {MAX_RE_RANKED}, got {len(gallery)}")
    distances = re_rank(features.astype(np.float32), gallery.features.astype(np.float32))
    for row, ids in enumerate(leave_out):
        distances[row, ids] = np.inf
    rows = np.argsort(distances, axis=1, kind="stable")[:, : min(top, len(gallery))]
    distances = np.take_along_axis(distances, rows, axis=1)
    return RankedRows(np.where(np.isfinite(distances), rows, -1), distances)


def describe_hits(gallery: Gallery, query: QueryImage, rows: np.ndarray, distances: np.ndarray) -> list[SearchHit]:
    """Return the ranked rows [K] of a query as hits, up to the first row of -1."""
    hits = []
    for rank, (row, distance) in enumerate(zip(rows.tolist(), distances.tolist(), strict=True), 1):
        if row < 0:
            break
        pid, camid = (None if ids[row] == UNKNOWN else int(ids[row]) for ids in (gallery.pids, gallery.camids))
        is_judged = None not in (query.pid, pid) and JUNK_PID not in (query.pid, pid)
        is_right = query.pid == pid if is_judged else None
        hits.append(SearchHit(rank, gallery.paths[row], pid, camid, round(distance, 6), is_right))
    return hits


def count_first_right(answers: Sequence[Answer]) -> tuple[int, int]:
    """Count the queries whose first image is right, and the queries that can be judged."""
    judged = [answer for answer in answers if answer.can_be_judged]
    return sum(answer.first_right == 1 for answer in judged), len(judged)


def relative_names(paths: Sequence[str]) -> dict[str, str]:
    """Map each path to its name relative to the common folder of all."""
    folders = [os.path.dirname(path) for path in paths]
    try:
        base = os.path.commonpath(folders) if folders else ""
    except ValueError:  # relative and absolute paths are mixed
        base = ""
    return {path: os.path.relpath(path, base) if base else path for path in paths}


def check_cameras(cameras: str) -> Cameras:
    """Narrow the type; raise UserError for an unknown choice."""
    for choice in get_args(Cameras):
        if cameras == choice:
            return choice
    raise UserError(f"--cameras must be {', '.join(get_args(Cameras))}, but got {cameras!r}")
