"""`mprd search` from images to tables, JSON and a page; a folder's features are cached."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mprd.runs.folder import RunFolder
from mprd.runtime import checkpoint
from mprd.search import Gallery
from mprd.search.cli import app


def command(run: Path, root: Path, cache: Path, *more: object) -> list[str]:
    args = (run, "--gallery", root / "bounding_box_test", "--query", root / "query", "--features-dir", cache, *more)
    return [*map(str, args), "--device", "cpu"]


def run_command(capfd: pytest.CaptureFixture[str], args: list[str]) -> str:
    app(args, standalone_mode=False)
    return capfd.readouterr().out


def extracted_gallery(capfd: pytest.CaptureFixture[str], run: Path, root: Path, cache: Path) -> tuple[Path, list[str]]:
    """Search a folder, and return the file of its features and the arguments that search that file."""
    run_command(capfd, command(run, root, cache))
    (file,) = cache.iterdir()
    return file, [str(run), "--gallery", str(file), "--query", str(root / "query"), "--device", "cpu"]


def test_a_folder_is_extracted_once_and_again_when_it_changes(
    tiny_run: Path, tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    root, cache = shutil.copytree(tiny_root, tmp_path / "data"), tmp_path / "cache"
    args = command(tiny_run, root, cache, "--json", "--top", 3)
    found = json.loads(run_command(capfd, args))
    assert (found["num_images"], len(found["answers"]), found["index"]) == (8, 8, "exact")
    first = found["answers"][0]
    assert (first["query"]["pid"], first["query"]["camid"]) == (7, 1)
    assert [hit["rank"] for hit in first["hits"]] == [1, 2, 3]
    assert all(hit["is_right"] == (hit["pid"] == 7) for hit in first["hits"])
    (file,) = cache.iterdir()
    modified = file.stat().st_mtime_ns
    assert json.loads(run_command(capfd, args)) == found
    assert file.stat().st_mtime_ns == modified
    os.utime(next((root / "bounding_box_test").iterdir()), ns=(1, 1))
    assert json.loads(run_command(capfd, args)) == found
    (other,) = cache.iterdir()
    assert other.name != file.name


def test_features_of_other_weights_of_a_run_are_told(
    tiny_run: Path,
    tiny_root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    run, cache = shutil.copytree(tiny_run, tmp_path / "run"), tmp_path / "cache"
    file, args = extracted_gallery(capfd, run, tiny_root, cache)
    run_command(capfd, args)
    assert "other weights" not in caplog.text
    folder = RunFolder(run)
    state = checkpoint.load(folder.last)
    state["backbone"]["neck.weight"] *= 2
    checkpoint.save(state, folder.last)
    run_command(capfd, args)
    assert f"{file}: features of other weights or statistics than the queries'" in caplog.text
    # the cache is made anew, and what it held before is removed
    run_command(capfd, command(run, tiny_root, cache))
    (other,) = cache.iterdir()
    assert other.name != file.name
    # another question has a file of its own
    run_command(capfd, command(run, tiny_root, cache, "--best"))
    assert other in cache.iterdir()
    assert len([*cache.iterdir()]) == 2


def test_a_feature_file_older_than_its_images_is_named(
    tiny_run: Path,
    tiny_root: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    root, cache = shutil.copytree(tiny_root, tmp_path / "data"), tmp_path / "cache"
    file, args = extracted_gallery(capfd, tiny_run, root, cache)
    run_command(capfd, args)
    assert "newer" not in caplog.text
    image = next((root / "bounding_box_test").iterdir())
    os.utime(image, (file.stat().st_mtime + 1,) * 2)
    run_command(capfd, args)
    assert f"{file}: 1 of the 8 images found are newer than these features (first: {image})" in caplog.text


def test_tables_show_each_query_and_the_number_of_right_ones(
    tiny_run: Path, tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mprd.search.tables.MAX_TABLES", 2)
    out = run_command(capfd, command(tiny_run, tiny_root, tmp_path, "--rerank"))
    assert "identity 7, camera 1" in out
    assert "identity 7, camera 2" in out
    assert "and 6 more queries" in out
    assert re.search(r"the first image is right for \d of 8 queries with known identities", out)


def test_a_page_is_self_contained(
    tiny_run: Path, tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "page.html"
    run_command(capfd, command(tiny_run, tiny_root, tmp_path, "--html", page, "--top", 4, "--index", "pq"))
    text = page.read_text()
    assert text.count('<img src="data:image/jpeg;base64,') == 8 * 5
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", text)
    assert "default-src 'none'" in text
    assert text.count('class="answer"') == 8
    assert ">1</label>" in text
    assert ">2</label>" in text


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--cameras", "same"], "--cameras must be all, others, protocol, but got 'same'"),
        (["--index", "ivf"], "--index must be exact or pq, but got 'ivf'"),
        (["--rerank", "--index", "pq"], "--rerank needs the whole gallery"),
        (["--whiten", "--index", "pq"], "--whiten needs the whole gallery"),
        (["no/such.jpg"], "no/such.jpg: no such folder, list or image"),
        (["--gallery", "no/such.parquet"], "no/such.parquet: no such folder or feature file"),
        (["--gallery", "small.parquet"], "small.parquet: features of 3 numbers, but the network of"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    more: list[str],
    message: str,
    tiny_run: Path,
    tiny_root: Path,
    tmp_path: Path,
    refuse: Callable[..., str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    Gallery.from_features(np.eye(3)).save("small.parquet")
    assert message in refuse(app, *command(tiny_run, tiny_root, tmp_path, *more))
