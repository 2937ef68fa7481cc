"""Answers exclude images by the choice of cameras, and are right or wrong only where both identities are known."""

from __future__ import annotations

import numpy as np
import pytest

from mprd.errors import UserError
from mprd.search import Gallery
from mprd.search.results import (
    Answer,
    Cameras,
    QueryImage,
    answer_queries,
    count_first_right,
    relative_names,
)


@pytest.fixture
def street() -> Gallery:
    """Return images a to f, each nearer to the query (1, 0) than the next."""
    angles = np.radians([0, 10, 20, 30, 40, 50])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return Gallery.from_features(features, paths=list("abcdef"), pids=[7, 7, 8, 7, -1, None], camids=[1, 1, 1, 2, 2, 2])


def ask(
    gallery: Gallery,
    *queries: QueryImage,
    at: tuple[float, float] = (1.0, 0.0),
    cameras: Cameras = "all",
    **options: int,
) -> list[Answer]:
    rerank, top = bool(options.get("rerank")), options.get("top", 6)
    return answer_queries(gallery, queries, np.array([at] * len(queries)), top=top, cameras=cameras, rerank=rerank)


@pytest.mark.parametrize(("cameras", "found"), [("all", "bcdef"), ("others", "def"), ("protocol", "cdf")])
def test_the_choice_of_cameras_excludes_images(street: Gallery, cameras: Cameras, found: str) -> None:
    (answer,) = ask(street, QueryImage("a", 7, 1), cameras=cameras)
    assert "".join(hit.path for hit in answer.hits) == found
    assert [hit.rank for hit in answer.hits] == list(range(1, len(found) + 1))


def test_hits_are_judged_only_where_both_identities_are_known(street: Gallery) -> None:
    known, unknown = ask(street, QueryImage("x", 7, 1), QueryImage("y", None, None), at=(0.0, 1.0))
    judged = [("f", None), ("e", None), ("d", True), ("c", False), ("b", True), ("a", True)]
    assert [(hit.path, hit.is_right) for hit in known.hits] == judged
    assert {hit.is_right for hit in unknown.hits} == {None}
    assert (known.first_right, unknown.first_right) == (3, None)
    assert count_first_right([known, unknown]) == (0, 1)


def test_re_ranking_orders_by_its_own_distance_and_excludes_as_well(street: Gallery) -> None:
    (answer,) = ask(street, QueryImage("a", 7, 1), top=3, rerank=True)
    distances = [hit.distance for hit in answer.hits]
    assert len(distances) == 3
    assert distances == sorted(distances)
    assert "a" not in {hit.path for hit in answer.hits}


def test_choices_that_need_missing_ids_are_refused(street: Gallery) -> None:
    query = QueryImage("x.jpg", 7, None)
    for cameras, missing in (
        ("others", "no camera in its name, which"),
        ("protocol", "no camera or no identity in its name, which"),
    ):
        with pytest.raises(UserError, match=f"x.jpg: {missing} --cameras {cameras} needs"):
            ask(street, query, cameras=cameras)  # type: ignore[arg-type]


def test_a_large_gallery_is_not_re_ranked(street: Gallery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mprd.search.results.MAX_RE_RANKED", 5)
    with pytest.raises(UserError, match="at most 5, got 6"):
        ask(street, QueryImage("x", 7, 1), rerank=True)


def test_names_are_relative_to_the_common_folder() -> None:
    assert relative_names(["/a/b/c.jpg", "/a/b/d/e.jpg"]) == {"/a/b/c.jpg": "c.jpg", "/a/b/d/e.jpg": "d/e.jpg"}
    assert relative_names(["0", "1"]) == {"0": "0", "1": "1"}
    assert relative_names(["/a/0", "1"]) == {"/a/0": "/a/0", "1": "1"}
