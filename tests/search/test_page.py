"""The page of a search stays small and escapes what it shows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mprd.search.page import render_search
from mprd.search.results import Answer, QueryImage, SearchHit, SearchResult
from mprd.search.tables import print_tables


def result_of(path: Path, num_queries: int, top: int) -> SearchResult:
    """Return answers that all consist of one image."""
    hits = tuple(SearchHit(rank, str(path), 1, 2, 0.25, True) for rank in range(1, top + 1))
    answers = [Answer(QueryImage(str(path), 1, 1), hits) for _ in range(num_queries)]
    return SearchResult("run", "gallery", 1000, "exact", "all", "1 - cosine", answers)


def test_fifty_queries_with_twenty_hits_stay_below_five_megabytes(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (256, 128, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    assert 1e6 < len(render_search(result_of(tmp_path / "noise.png", 50, 20)).encode()) < 5e6


def test_names_are_escaped_and_missing_files_marked(tmp_path: Path) -> None:
    text = render_search(result_of(tmp_path / "<script>alert(1)</script>.jpg", 1, 2))
    assert "<script>alert" not in text
    assert text.count(">file not found</span>") == 3


def test_a_query_without_hits_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_tables(result_of(tmp_path / "a.jpg", 1, 0))
    assert "no images left" in capsys.readouterr().out
