"""Names are bytes: what no encoding, markup, glob or URL takes for itself goes through every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from mprd.doctor.cli import app as doctor
from mprd.evaluate.cli import app as evaluate
from mprd.export.cli import app as export
from mprd.extract.cli import app as extract
from mprd.feature_file import open_features
from mprd.report.cli import app as report
from mprd.search.cli import app as search
from mprd.text import from_unicode, one_line, read_text, to_unicode
from mprd.train.cli import app as train
from mprd.tune.cli import app as tune
from tests.conftest import TINY

ODD = "x] a[1] [red] :smile: $x_{$ %41?#{b}\udcd0\udcd0 ~'\"\u00df\\udcd0"
"""Of a folder and of an image: markup of rich and matplotlib, a glob, a URL, a format, bytes that are not UTF-8."""


@pytest.fixture
def odd(tmp_path: Path, tiny_root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy the tiny data set into a folder and under names that are odd, and work beside it."""
    # a tag of rich that closes nothing spans both: [/x]
    folder = tmp_path / "[" / ODD
    shutil.copytree(tiny_root, folder / "data")
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        first = min((folder / "data" / split).iterdir())
        first.rename(first.with_name(f"{first.stem} {ODD}.jpg"))
    monkeypatch.chdir(folder)
    return folder


def run(app: Callable[..., Any], *arguments: object) -> None:
    """Run a command that succeeds."""
    with pytest.raises(SystemExit) as stop:
        app([str(argument) for argument in arguments])
    assert not stop.value.code


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def test_odd_names_go_through_every_command(odd: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data, out, images = odd / "data", odd / ODD, odd / "data" / "query"
    run(doctor, data)
    run(train, "--preset", "demo", "--launcher", "local", "--data", data, "--out", out, *sets(*TINY, "train.epochs=1"))
    run(evaluate, out, "--json")
    found = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert found["mAP"] > 0
    run(extract, out, images, "--out", odd / "f.parquet")
    paths = [path for rows in open_features(odd / "f.parquet").batches() for path in rows.paths]
    assert sorted(paths) == sorted(str(path) for path in images.iterdir())
    run(search, out, "--gallery", odd / "f.parquet", "--query", images / f"*{paths[1][-10:]}", "--html", odd / "s.html")
    assert "data:image/jpeg" in (odd / "s.html").read_text()
    run(search, out, "--gallery", images, "--query", paths[0], "--json")
    answers = json.loads(capfd.readouterr().out.splitlines()[-1])["answers"]
    assert answers[0]["query"]["path"] == paths[0]
    run(report, out, "--out", odd / "r.html")
    assert "the data set cannot be read" not in (odd / "r.html").read_text()
    run(export, out, "--format", "torchscript")


def test_a_study_in_an_odd_folder_keeps_its_database_there(odd: Path) -> None:
    (odd / "tune_configs").mkdir()
    study = {"name": "one", "doc": "One.", "space": {"pairs.mu": {"grid": [0.4]}}}
    (odd / "tune_configs" / "one.yaml").write_text(yaml.safe_dump(study))
    settings = sets(*TINY, "train.epochs=1", "train.threads=1")
    run(
        tune,
        "--study",
        "one",
        "--preset",
        "demo",
        "--launcher",
        "local",
        "--data",
        odd / "data",
        "--out",
        odd / "s",
        *settings,
    )
    run(report, odd / "s", "--out", odd / "r.html")
    assert (odd / "s" / "results.parquet").is_file()
    shutil.move(odd / "s" / "study.db", odd.parent / "study.db")
    assert len(optuna.load_study(study_name="one", storage=f"sqlite:///{odd.parent / 'study.db'}").trials) == 1


@pytest.mark.parametrize("name", ["a", ODD, "\udcff\\udcff", r"\udc5c", r"\udc5cudc41", "\\\udcd0", r"\udcd0"])
def test_a_name_of_bytes_is_unicode_and_back(name: str) -> None:
    assert from_unicode(to_unicode(name)) == name
    to_unicode(name).encode()


def test_a_message_is_one_line_without_control_characters() -> None:
    assert one_line("a\nb\x1b[31m\udcd0\u2028\u00df") == r"a\nb\x1b[31m\udcd0\u2028" + "\u00df"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_lists_are_read_by_their_mark(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_bytes("\u00df.jpg\r\nb.jpg\n".encode(encoding))
    assert read_text(tmp_path / "list.txt") == "\u00df.jpg\nb.jpg\n"


def test_a_tilde_is_the_home_folder_in_every_option(
    tmp_path: Path, tiny_root: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tiny_root)
    (tmp_path / "labels.csv").write_text("file,identity\n")
    options = ["--preset", "demo", "--launcher", "local", "--data", tiny_root, "--out=~/runs/a"]
    labels = refuse(train, *options, *sets(*TINY, "meta.labels=~/labels.csv"))
    assert f"{tmp_path}/labels.csv: no identity has two images" in labels
    assert f"{tmp_path}/w.pt" in refuse(train, *options, *sets(*TINY, "backbone.weights=~/w.pt"))
    for app, arguments in (
        (train, ["--resume=~/x"]),
        (train, ["--config=~/x"]),
        (evaluate, ["~/x"]),
        (extract, ["~/x", "~/y", "--out=~/z"]),
        (search, ["~/x", "--gallery=~/y", "--query=~/z"]),
        (export, ["~/x"]),
        (report, ["~/x"]),
        (doctor, ["~/x"]),
        (tune, ["--resume", "--out=~/x"]),
    ):
        assert f"{tmp_path}/x" in refuse(app, *arguments)
    assert not (tiny_root / "~").exists()
