"""What a search finds: for each query the ranked gallery, as a person or a program reads it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np
import torch

from mprd.errors import UserError
from mprd.evaluate.evaluation import without_cameras
from mprd.metrics import JUNK_PID
from mprd.neighbors.jaccard import re_rank
from mprd.search.gallery import UNKNOWN, Gallery, Ranking

Cameras = Literal["all", "others", "protocol"]
MOST_RE_RANKED = 30_000
"""Re-ranking compares every image with every other: minutes at this size on two cores."""


@dataclass(frozen=True)
class Picture:
    """An image and what its name tells."""

    path: str
    pid: int | None
    camid: int | None
    """Camera as numbered in file names."""


@dataclass(frozen=True)
class Hit:
    """A gallery image in its place of a ranking."""

    rank: int
    """From 1."""
    path: str
    pid: int | None
    camid: int | None
    distance: float
    is_right: bool | None
    """Whether it is of the query's identity; None where either is unknown."""


@dataclass(frozen=True)
class Answer:
    """The nearest gallery images of one query."""

    query: Picture
    hits: tuple[Hit, ...]

    @property
    def first_right(self) -> int | None:
        """Return the rank of the first right image; None where none is among the hits."""
        return next((hit.rank for hit in self.hits if hit.is_right), None)

    @property
    def can_be_judged(self) -> bool:
        """Say whether any hit is known to be right or wrong."""
        return any(hit.is_right is not None for hit in self.hits)


@dataclass(frozen=True)
class Search:
    """All answers, and how they were found."""

    run: str
    gallery: str
    num_images: int
    index: str
    cameras: Cameras
    distance: str
    """What a distance is."""
    answers: list[Answer]

    def to_dict(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        answers = [{**asdict(answer), "first_right": answer.first_right} for answer in self.answers]
        return asdict(self) | {"answers": answers}


def answer(
    gallery: Gallery, queries: Sequence[Picture], features: np.ndarray, *, top: int, cameras: Cameras, rerank: bool
) -> list[Answer]:
    """Rank the gallery for queries with features [Q, D]; a query's own file never comes back.

    Raises UserError where cameras are unknown that the choice needs, or the gallery is too large to re-rank.
    """
    rows_of: dict[str, list[int]] = {}
    for row, path in enumerate(gallery.paths):
        rows_of.setdefault(path, []).append(row)
    leave_out = [left_out(gallery, query, rows_of.get(query.path, []), cameras=cameras) for query in queries]
    if rerank:
        ranking = search_re_ranked(gallery, features, top, leave_out=leave_out)
    else:
        ranking = gallery.search(features, top, leave_out=leave_out)
    return [
        Answer(query, tuple(hits(gallery, query, rows, distances)))
        for query, rows, distances in zip(queries, *ranking, strict=True)
    ]


def standardise_gallery(
    gallery: Gallery, queries: Sequence[Picture], features: np.ndarray
) -> tuple[Gallery, np.ndarray]:
    """Return the gallery and the queries' features [Q, D] standardised within each camera of the gallery.

    Raises UserError where a name tells no camera.
    """
    for path, camid in (*zip(gallery.paths, gallery.camids, strict=True), *((q.path, q.camid) for q in queries)):
        if camid is None or camid == UNKNOWN:
            raise UserError(f"{path}: its name tells no camera, which --standardise needs (--name-pattern)")
    numbers = np.concatenate([[query.camid for query in queries], gallery.camids]).astype(np.int64)
    places = np.unique(numbers, return_inverse=True)[1]
    wanted, seen = (torch.from_numpy(np.asarray(rows, np.float32)) for rows in (features, gallery.features))
    wanted, seen = without_cameras(wanted, seen, places[: len(queries)], places[len(queries) :])
    return Gallery(seen.numpy(), gallery.paths, gallery.pids, gallery.camids, run=gallery.run), wanted.numpy()


def left_out(gallery: Gallery, query: Picture, own_rows: Sequence[int], *, cameras: Cameras) -> np.ndarray:
    """Return the rows that a query must not be answered with, int64."""
    if cameras == "all":
        return np.array(own_rows, np.int64)
    if query.camid is None or (cameras == "protocol" and query.pid is None):
        wanted = "camera" if cameras == "others" else "camera or no identity"
        raise UserError(f"{query.path}: its name tells no {wanted}, which --cameras {cameras} needs (--name-pattern)")
    is_out = gallery.camids == query.camid
    if cameras == "protocol":
        is_out = (is_out & (gallery.pids == query.pid)) | (gallery.pids == JUNK_PID)
    is_out[list(own_rows)] = True
    return np.flatnonzero(is_out)


def search_re_ranked(gallery: Gallery, features: np.ndarray, top: int, *, leave_out: Sequence[np.ndarray]) -> Ranking:
    """Rank by the k-reciprocal distance, which compares the whole gallery with itself."""
    if len(gallery) > MOST_RE_RANKED:
        raise UserError(f"--rerank compares all images with each other: at most {MOST_RE_RANKED}, got {len(gallery)}")
    distances = re_rank(features.astype(np.float32), gallery.features.astype(np.float32))
    for row, ids in enumerate(leave_out):
        distances[row, ids] = np.inf
    rows = np.argsort(distances, axis=1, kind="stable")[:, : min(top, len(gallery))]
    distances = np.take_along_axis(distances, rows, axis=1)
    return Ranking(np.where(np.isfinite(distances), rows, -1), distances)


def hits(gallery: Gallery, query: Picture, rows: np.ndarray, distances: np.ndarray) -> list[Hit]:
    """Describe the images that were found for a query."""
    found = []
    for rank, (row, distance) in enumerate(zip(rows.tolist(), distances.tolist(), strict=True), 1):
        if row < 0:
            break
        pid, camid = (None if ids[row] == UNKNOWN else int(ids[row]) for ids in (gallery.pids, gallery.camids))
        is_judged = None not in (query.pid, pid) and JUNK_PID not in (query.pid, pid)
        is_right = query.pid == pid if is_judged else None
        found.append(Hit(rank, gallery.paths[row], pid, camid, round(distance, 6), is_right))
    return found


def count_first_right(answers: Sequence[Answer]) -> tuple[int, int]:
    """Count the queries whose first image is right, and those for which that can be told."""
    judged = [answer for answer in answers if answer.can_be_judged]
    return sum(answer.first_right == 1 for answer in judged), len(judged)


def short_names(paths: Sequence[str]) -> dict[str, str]:
    """Name files below the folder that they have in common."""
    folders = [os.path.dirname(path) for path in paths]
    try:
        base = os.path.commonpath(folders) if folders else ""
    except ValueError:  # relative paths beside absolute ones
        base = ""
    return {path: os.path.relpath(path, base) if base else path for path in paths}


def check_cameras(cameras: str) -> Cameras:
    """Return the choice; raise UserError for one that does not exist."""
    for choice in get_args(Cameras):
        if cameras == choice:
            return choice
    raise UserError(f"--cameras must be {', '.join(get_args(Cameras))}, but got {cameras!r}")
