"""Galleries rank exactly whatever the dtype, nearly exactly through an index, and survive their file."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mprd.errors import UserError
from mprd.search import Gallery
from mprd.search.gallery import UNKNOWN


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def draw(num_rows: int, num_features: int, *, seed: int = 0) -> np.ndarray:
    return unit(np.random.default_rng(seed).normal(size=(num_rows, num_features)))


def slow_ranking(queries: np.ndarray, features: np.ndarray, top: int) -> list[list[int]]:
    """Rank in float64, equal cosines by row."""
    rankings = []
    for query in queries.astype(np.float64):
        cosines = [float(feature.astype(np.float64) @ query) for feature in features]
        rankings.append(sorted(range(len(features)), key=lambda row: (-cosines[row], row))[:top])
    return rankings


def test_distances_are_one_minus_cosine_and_equal_ones_rank_by_row() -> None:
    features = np.array([[0.0, 1.0], [1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]])
    rows, distances = Gallery.from_features(features).search(np.array([[2.0, 0.0]]), top=9)
    assert rows.tolist() == [[1, 2, 0, 3]]
    assert distances.tolist() == [[0.0, 0.0, 1.0, 2.0]]


@pytest.mark.parametrize("num_queries", [3, 20])
def test_float16_features_rank_as_in_float64(num_queries: int) -> None:
    features, queries = draw(3000, 24).astype(np.float16), draw(num_queries, 24, seed=1)
    rows, _ = Gallery.from_features(features).search(queries, top=10)
    assert rows.tolist() == slow_ranking(queries, features, 10)


def test_features_too_close_for_float16_arithmetic_rank_as_in_float64() -> None:
    center, noise = draw(1, 64), draw(800, 64, seed=1)
    features = unit(center + 0.02 * noise).astype(np.float16)
    rows, _ = Gallery.from_features(features).search(center, top=5)
    assert rows.tolist() == slow_ranking(center, features, 5)


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_excluded_rows_are_left_out(dtype: type) -> None:
    features = draw(6, 8).astype(dtype)
    excluded = [np.array([0, 3, 4]), np.array([1, 2, 3, 4, 5, 5])]
    rows, distances = Gallery.from_features(features).search(features[:2], top=4, leave_out=excluded)
    assert sorted(rows[0, :3].tolist()) == [1, 2, 5]
    assert rows[:, 3].tolist() == [-1, -1]
    assert rows[1].tolist() == [0, -1, -1, -1]
    assert np.isinf(distances[1, 1:]).all()


def test_an_index_with_all_images_as_candidates_is_exact() -> None:
    found, queries = Gallery.from_features(draw(300, 10).astype(np.float16)), draw(4, 10, seed=1)
    excluded = [np.array([], np.int64), np.array([1, 2]), np.arange(295), np.arange(300)]
    exact = found.search(queries, top=7, leave_out=excluded)
    found.build_index()
    through_index = found.search(queries, top=7, leave_out=excluded)
    assert found.recall == 1.0
    np.testing.assert_array_equal(through_index.rows, exact.rows)
    np.testing.assert_allclose(through_index.distances, exact.distances, atol=1e-6)


def test_an_index_ranks_few_candidates_of_a_large_gallery_and_finds_nearly_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mprd.search.index.MIN_CANDIDATES", 400)
    monkeypatch.setattr("mprd.search.index.SHARD_ROWS", 1500)
    large, queries = Gallery.from_features(draw(4000, 256).astype(np.float16)), draw(10, 256, seed=1)
    exact = large.search(queries).rows
    candidates = large.build_index().candidates(queries.astype(np.float32), least=10)
    # 400 over shards of 1500, 1500 and 1000 rows
    assert [len({*row} - {-1}) for row in candidates.tolist()] == [400] * 10
    found = large.search(queries).rows
    assert sum(len({*a} & {*b}) for a, b in zip(found.tolist(), exact.tolist(), strict=True)) >= 95


def test_a_gallery_survives_its_file(tmp_path: Path) -> None:
    features = draw(3, 5).astype(np.float16)
    saved = Gallery.from_features(features, paths=["a", "b", "c"], pids=[4, None, -1], run="mine")
    saved.save(tmp_path / "g.parquet")
    opened = Gallery.open(tmp_path / "g.parquet")
    assert (list(opened.paths), opened.run) == (["a", "b", "c"], "mine")
    assert (opened.pids.tolist(), opened.camids.tolist()) == ([4, UNKNOWN, -1], [UNKNOWN] * 3)
    assert opened.features.dtype == np.float16
    np.testing.assert_array_equal(opened.features, features)


def test_an_index_file_is_reused_until_features_change_or_it_is_damaged(tmp_path: Path) -> None:
    file, index = tmp_path / "g.parquet", tmp_path / "g.parquet.pq"

    def open_index(num_images: int | None = None) -> bytes:
        if num_images is not None:
            Gallery.from_features(draw(num_images, 8)).save(file)
        opened = Gallery.open(file, index="pq")
        assert opened.recall == 1.0
        assert opened.search(draw(1, 8), top=1).rows.shape == (1, 1)
        return index.read_bytes()

    first, modified = open_index(30), index.stat().st_mtime_ns
    assert open_index() == first
    assert index.stat().st_mtime_ns == modified
    second = open_index(31)
    assert second != first
    index.write_bytes(second[:200])
    assert len(open_index()) == len(second)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["g.parquet", "g.parquet.pq"]


def test_without_faiss_only_exact_search_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
        (lambda: Gallery.from_features(np.eye(2), pids=[1]), "pids must have one entry per feature, 2, but got 1"),
        (lambda: Gallery.from_features(np.eye(2)).search(np.eye(3)), r"must be \[Q, 2\]"),
        (lambda: Gallery.from_features(np.eye(2)).search(np.array([[np.nan, 0]])), "must be finite"),
        (lambda: Gallery.from_features(np.eye(2)).search(np.eye(2), top=0), "top must be at least 1"),
        (lambda: Gallery.from_features(np.eye(2)).search(np.eye(2), leave_out=[]), "rows for each of 2 queries"),
    ],
)
def test_features_that_do_not_match_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make()
