"""Searching a gallery: exact whatever the dtype, through an index, by the rules of cameras, and what a person sees."""

from __future__ import annotations

import doctest
import json
import logging
import os
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from mprd.errors import UserError
from mprd.search import Gallery
from mprd.search import gallery as gallery_module
from mprd.search.cli import app
from mprd.search.gallery import UNKNOWN
from mprd.search.page import render_search
from mprd.search.results import (
    Answer,
    Hit,
    Picture,
    Search,
    answer,
    count_first_right,
    short_names,
    standardise_gallery,
)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw(num_rows: int, num_features: int, *, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(num_rows, num_features)))


def slow_ranking(queries: np.ndarray, features: np.ndarray, top: int) -> list[list[int]]:
    """Rank in float64, equals in the order of the rows."""
    rankings = []
    for query in queries.astype(np.float64):
        cosines = [float(feature.astype(np.float64) @ query) for feature in features]
        rankings.append(sorted(range(len(features)), key=lambda row: (-cosines[row], row))[:top])
    return rankings


def test_the_example_of_the_gallery_runs() -> None:
    assert doctest.testmod(gallery_module) == (0, 5)


def test_distances_are_one_minus_cosine_and_equals_come_in_the_order_of_the_rows() -> None:
    gallery = Gallery.from_features(np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
    rows, distances = gallery.search(np.array([[2.0, 0.0]]), top=9)
    assert rows.tolist() == [[1, 2, 0, 3]]
    assert distances.tolist() == [[0.0, 0.0, 1.0, 2.0]]


@pytest.mark.parametrize("num_queries", [3, 20])
def test_float16_features_are_ranked_as_float64_would_rank_them(num_queries: int) -> None:
    features = draw(3000, 24).astype(np.float16)
    queries = draw(num_queries, 24, seed=1)
    rows, _ = Gallery.from_features(features).search(queries, top=10)
    assert rows.tolist() == slow_ranking(queries, features, 10)


def test_features_too_close_for_float16_arithmetic_are_still_told_apart() -> None:
    center, noise = draw(1, 64), draw(800, 64, seed=1)
    features = unit(center + 0.02 * noise).astype(np.float16)
    rows, _ = Gallery.from_features(features).search(center, top=5)
    assert rows.tolist() == slow_ranking(center, features, 5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_rows_left_out_never_come_back(dtype: type) -> None:
    features = draw(6, 8).astype(dtype)
    rows, distances = Gallery.from_features(features).search(
        features[:2], top=4, leave_out=[np.array([0, 3, 4]), np.array([1, 2, 3, 4, 5, 5])]
    )
    assert sorted(rows[0, :3].tolist()) == [1, 2, 5]
    assert rows[:, 3].tolist() == [-1, -1]
    assert rows[1].tolist() == [0, -1, -1, -1]
    assert np.isinf(distances[1, 1:]).all()


def test_an_index_whose_candidates_are_all_images_ranks_as_exact_search_does() -> None:
    features, queries = draw(300, 10).astype(np.float16), draw(4, 10, seed=1)
    gallery = Gallery.from_features(features)
    banned = [np.array([], np.int64), np.array([1, 2]), np.arange(295), np.arange(300)]
    exact = gallery.search(queries, top=7, leave_out=banned)
    gallery.build_index()
    through_index = gallery.search(queries, top=7, leave_out=banned)
    assert gallery.recall == 1.0
    np.testing.assert_array_equal(through_index.rows, exact.rows)
    np.testing.assert_allclose(through_index.distances, exact.distances, atol=1e-6)


def test_an_index_looks_at_a_part_of_a_large_gallery_and_finds_nearly_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mprd.search.index.LEAST_CANDIDATES", 400)
    monkeypatch.setattr("mprd.search.index.SHARD_ROWS", 1500)
    features, queries = draw(4000, 256).astype(np.float16), draw(10, 256, seed=1)
    gallery = Gallery.from_features(features)
    exact = gallery.search(queries).rows
    index = gallery.build_index()
    candidates = index.candidates(queries.astype(np.float32), least=10)
    assert candidates.shape == (10, 400 * 3000 // 4000 + 100)
    assert len(np.unique(candidates[0])) == 400
    found = gallery.search(queries).rows
    assert sum(len({*a} & {*b}) for a, b in zip(found.tolist(), exact.tolist(), strict=True)) >= 95


def test_a_gallery_survives_its_file(tmp_path: Path) -> None:
    gallery = Gallery.from_features(
        draw(3, 5).astype(np.float16), paths=["a", "b", "c"], pids=[4, None, -1], camids=None, run="mine"
    )
    gallery.save(tmp_path / "g.parquet")
    again = Gallery.open(tmp_path / "g.parquet")
    assert (list(again.paths), again.pids.tolist(), again.run) == (["a", "b", "c"], [4, UNKNOWN, -1], "mine")
    assert again.camids.tolist() == [UNKNOWN] * 3
    assert again.features.dtype == np.float16
    np.testing.assert_array_equal(again.features, gallery.features)


def test_an_index_is_kept_beside_the_features_and_built_anew_when_they_change(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mprd")
    file, index = tmp_path / "g.parquet", tmp_path / "g.parquet.pq"
    Gallery.from_features(draw(30, 8)).save(file)
    Gallery.open(file, index="pq")
    assert "building an index of 30 images" in caplog.text
    assert "recall@10 1.000" in caplog.text
    first = index.read_bytes()
    caplog.clear()
    kept = Gallery.open(file, index="pq")
    assert "building" not in caplog.text
    assert kept.recall == 1.0
    assert kept.search(draw(1, 8), top=1).rows.shape == (1, 1)
    file.unlink()
    Gallery.from_features(draw(31, 8)).save(file)
    assert Gallery.open(file, index="pq").index is not None
    assert "g.parquet.pq: an index of other features, building it anew" in caplog.text
    assert index.read_bytes() != first
    index.write_bytes(index.read_bytes()[:200])
    Gallery.open(file, index="pq")
    assert "g.parquet.pq: not a readable index, building it anew" in caplog.text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.parquet", "g.parquet.pq"]


def test_without_faiss_exact_search_works_and_an_index_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Gallery.from_features(draw(5, 8)).save(tmp_path / "g.parquet")
    monkeypatch.setitem(sys.modules, "faiss", None)
    assert Gallery.open(tmp_path / "g.parquet").search(draw(1, 8)).rows.shape == (1, 5)
    with pytest.raises(UserError, match=r"an index needs faiss \(pip install faiss-cpu\)"):
        Gallery.open(tmp_path / "g.parquet", index="pq")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gallery.from_features(np.zeros((0, 4))), r"got shape \(0, 4\)"),
        (lambda: Gallery.from_features(np.full((2, 4), 3.0)), "unit length, but got 6.0"),
        (lambda: Gallery.from_features(np.eye(2), pids=[1]), "one of pids for each feature, 2, got 1"),
        (lambda: Gallery.from_features(np.eye(2)).search(np.eye(3)), r"must be \[Q, 2\]"),
        (lambda: Gallery.from_features(np.eye(2)).search(np.array([[np.nan, 0]])), "must be finite"),
        (lambda: Gallery.from_features(np.eye(2)).search(np.eye(2), top=0), "top must be at least 1"),
        (lambda: Gallery.open("g.parquet", index="ivf"), "--index must be exact or pq, but got 'ivf'"),  # type: ignore[arg-type]
    ],
)
def test_features_that_do_not_fit_are_refused(make: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()  # type: ignore[operator]


@pytest.fixture
def street() -> Gallery:
    """Return images a to f, each nearer to the query (1, 0) than the next."""
    angles = np.radians([0, 10, 20, 30, 40, 50])
    features = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return Gallery.from_features(features, paths=list("abcdef"), pids=[7, 7, 8, 7, -1, None], camids=[1, 1, 1, 2, 2, 2])


@pytest.mark.parametrize(
    ("cameras", "found"), [("all", "bcdef"), ("others", "def"), ("protocol", "cdf")], ids=["all", "others", "protocol"]
)
def test_the_choice_of_cameras_decides_what_is_left_out(street: Gallery, cameras: str, found: str) -> None:
    query = Picture("a", 7, 1)
    (result,) = answer(street, [query], np.array([[1.0, 0.0]]), top=6, cameras=cameras, rerank=False)  # type: ignore[arg-type]
    assert "".join(hit.path for hit in result.hits) == found
    assert [hit.rank for hit in result.hits] == list(range(1, len(found) + 1))


def test_right_and_wrong_are_told_only_where_both_identities_are_known(street: Gallery) -> None:
    queries = [Picture("x", 7, 1), Picture("y", None, None)]
    known, unknown = answer(street, queries, np.array([[0.0, 1.0]] * 2), top=6, cameras="all", rerank=False)
    assert [(hit.path, hit.is_right) for hit in known.hits] == [
        ("f", None), ("e", None), ("d", True), ("c", False), ("b", True), ("a", True)
    ]  # fmt: skip
    assert {hit.is_right for hit in unknown.hits} == {None}
    assert (known.first_right, unknown.first_right) == (3, None)
    assert count_first_right([known, unknown]) == (0, 1)


def test_re_ranking_orders_by_its_own_distance_and_leaves_out_as_well(street: Gallery) -> None:
    (result,) = answer(street, [Picture("a", 7, 1)], np.array([[1.0, 0.0]]), top=3, cameras="all", rerank=True)
    assert len(result.hits) == 3
    assert "a" not in {hit.path for hit in result.hits}
    distances = [hit.distance for hit in result.hits]
    assert distances == sorted(distances)


def test_taking_cameras_out_finds_people_that_cameras_hid() -> None:
    draw = np.random.default_rng(0)
    people, views = draw.normal(size=(12, 16)), 5 * draw.normal(size=(2, 16))
    # twelve people under camera 40, and under camera 7, which shifts every feature far more than a person does
    features = np.concatenate([people + view for view in views])
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    cameras = np.repeat([40, 7], 12)
    paths = [str(row) for row in range(24)]
    gallery = Gallery.from_features(features, paths=paths, pids=[*range(12)] * 2, camids=cameras)
    queries = [Picture(str(row), row, 40) for row in range(12)]
    plain = answer(gallery, queries, features[:12], top=1, cameras="all", rerank=False)
    opened, wanted = standardise_gallery(gallery, queries, features[:12])
    found = answer(opened, queries, wanted, top=1, cameras="all", rerank=False)
    assert count_first_right(plain)[0] == 0
    assert count_first_right(found)[0] >= 11


def test_taking_cameras_out_wants_a_camera_in_every_name(street: Gallery) -> None:
    with pytest.raises(UserError, match=r"^x\.jpg: its name tells no camera, which --standardise needs"):
        standardise_gallery(street, [Picture("x.jpg", 7, None)], np.array([[1.0, 0.0]]))


def test_a_choice_of_cameras_that_names_do_not_allow_is_refused(street: Gallery) -> None:
    for cameras, wanted in (("others", "no camera, which"), ("protocol", "no camera or no identity, which")):
        with pytest.raises(UserError, match=f"x.jpg: its name tells {wanted} --cameras {cameras} needs"):
            answer(street, [Picture("x.jpg", 7, None)], np.array([[1.0, 0.0]]), top=1, cameras=cameras, rerank=False)


def test_names_are_shown_below_the_folder_they_share() -> None:
    assert short_names(["/a/b/c.jpg", "/a/b/d/e.jpg"]) == {"/a/b/c.jpg": "c.jpg", "/a/b/d/e.jpg": "d/e.jpg"}
    assert short_names(["0", "1"]) == {"0": "0", "1": "1"}


def ask(run: Path, root: Path, *more: object, query: str = "query") -> list[str]:
    gallery = root / "bounding_box_test"
    return [str(part) for part in (run, "--gallery", gallery, "--query", root / query, "--device", "cpu", *more)]


def call(capfd: pytest.CaptureFixture[str], args: list[str]) -> tuple[str, str]:
    """Run the command; return what it printed."""
    app(args, standalone_mode=False)
    return capfd.readouterr()


def test_a_folder_is_extracted_once_and_again_when_it_changes(
    tiny_run: Path, tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "mprd")
    root = tmp_path / "data"
    shutil.copytree(tiny_root, root)
    args = ask(tiny_run, root, "--json", "--top", 3, "--features-dir", tmp_path / "kept")
    found = json.loads(call(capfd, args)[0])
    assert "extracting 8 images of the gallery" in caplog.text
    assert (found["num_images"], len(found["answers"]), found["index"]) == (8, 8, "exact")
    first = found["answers"][0]
    assert (first["query"]["pid"], first["query"]["camid"]) == (7, 1)
    assert [hit["rank"] for hit in first["hits"]] == [1, 2, 3]
    assert all(hit["is_right"] == (hit["pid"] == 7) for hit in first["hits"])
    (file,) = (tmp_path / "kept").iterdir()
    caplog.clear()
    assert json.loads(call(capfd, args)[0]) == found
    assert "extracting" not in caplog.text
    os.utime(next((root / "bounding_box_test").iterdir()), ns=(1, 1))
    assert json.loads(call(capfd, args)[0]) == found
    assert "the folder or the network has changed; extracting" in caplog.text
    (again,) = (tmp_path / "kept").iterdir()
    assert again.name != file.name


def test_tables_name_the_query_and_say_how_many_are_right(
    tiny_run: Path, tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    images = sorted((tiny_root / "query").iterdir())
    args = ask(tiny_run, tiny_root, images[1], "--features-dir", tmp_path, query=f"query/{images[0].name}")
    out = call(capfd, args)[0]
    assert "identity 7, camera 1" in out
    assert "identity 7, camera 2" in out
    assert re.search(r"the first image is right for \d of 2 queries with known identities", out)


def test_a_page_holds_all_it_shows(
    tiny_run: Path, tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    call(capfd, ask(tiny_run, tiny_root, "--html", page, "--top", 4, "--features-dir", tmp_path, "--index", "pq"))
    text = page.read_text()
    assert text.count('<img src="data:image/jpeg;base64,') == 8 * 5
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "default-src 'none'" in text
    assert text.count('class="answer"') == 8
    assert ">1</label>" in text
    assert ">2</label>" in text


def answers_about(path: Path, num_queries: int, top: int) -> Search:
    hits = tuple(Hit(rank, str(path), 1, 2, 0.25, True) for rank in range(1, top + 1))
    answers = [Answer(Picture(str(path), 1, 1), hits) for _ in range(num_queries)]
    return Search("run", "gallery", 1000, "exact", "all", "1 - cosine", answers)


def test_a_page_of_fifty_queries_and_twenty_results_weighs_less_than_five_megabytes(tmp_path: Path) -> None:
    from PIL import Image

    noise = np.random.default_rng(0).integers(0, 255, (256, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert 1e6 < len(render_search(answers_about(tmp_path / "noise.png", 50, 20)).encode()) < 5e6


def test_a_page_shows_names_as_text_and_says_which_file_is_gone(tmp_path: Path) -> None:
    text = render_search(answers_about(tmp_path / "<script>alert(1)</script>.jpg", 1, 2))
    assert "<script>alert" not in text
    assert text.count(">file not found</span>") == 3


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cameras", "same"], "--cameras must be all, others, protocol, but got 'same'"),
        (["--index", "ivf"], "--index must be exact or pq, but got 'ivf'"),
        (["--rerank", "--index", "pq"], "--rerank needs the whole gallery"),
        (["--standardise", "--index", "pq"], "--standardise needs the whole gallery"),
        (["no/such.jpg"], "no/such.jpg: no such folder, list or image"),
        (["--gallery", "no/such.parquet"], "no/such.parquet: no such file of features"),
    ],
)
def test_mistakes_are_told_in_one_line(
    more: list[str], message: str, tiny_run: Path, tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        app(ask(tiny_run, tiny_root, *more, "--features-dir", tmp_path))
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_features_of_another_size_are_refused(
    tiny_run: Path, tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    Gallery.from_features(np.eye(3)).save(tmp_path / "g.parquet")
    with pytest.raises(SystemExit):
        app([str(tiny_run), "--gallery", str(tmp_path / "g.parquet"), "--query", str(tiny_root / "query")])
    assert "g.parquet: features of 3 numbers, but the network of" in capfd.readouterr().err
