"""Runs, studies, data and feature files on an S3 server of this machine, also where a sending breaks off."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mprd.errors import UserError
from mprd.evaluate.cli import app as evaluate
from mprd.extract.cli import app as extract
from mprd.model import load_model
from mprd.report.cli import app as report
from mprd.runs.folder import RunFolder
from mprd.runtime import checkpoint
from mprd.storage import copies
from mprd.storage.copies import claim, pull, push, take_over
from mprd.storage.places import local_path, place_of, shown
from mprd.train.cli import app as train
from mprd.tune.cli import app as tune
from tests.conftest import TINY

from .server import Server, names_of, upload

RUN = "s3://bucket/runs/first"


@pytest.fixture
def machine(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Return a function that goes to another machine: one with a cache of its own."""
    server.broken = None

    def go_to(name: str) -> None:
        monkeypatch.setenv("MPRD_CACHE", str(tmp_path / name))
        monkeypatch.setattr(copies, "FETCHED", set())

    go_to("first")
    return go_to


def tiny(*sets: str) -> list[str]:
    return [part for text in (*TINY, "train.threads=1", *sets) for part in ("--set", text)]


@pytest.mark.parametrize(
    "url", ["s3://bucket/a/run", "gs://b/x", "s3://b/run?endpoint_override=host:9000&scheme=http", "hdfs://host:8020/x"]
)
def test_a_url_and_its_working_copy_follow_from_each_other(url: str) -> None:
    path = local_path(url)
    assert path.is_absolute()
    assert path.name == url.partition("?")[0].rpartition("/")[2]
    assert place_of(path) == url
    assert local_path(Path(url.partition("?")[0])) == local_path(url.partition("?")[0])
    assert shown(f"go on with {local_path('s3://b/run')}/x") == "go on with s3://b/run/x"


@pytest.mark.parametrize("url", ["http://host/run", "s3://key:secret@bucket/run", "s3://bucket/../run"])
def test_other_urls_are_refused_and_make_no_folder(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refuse: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "secret" not in refuse(train, "--launcher", "local", "--out", url)
    assert os.listdir(tmp_path) == []


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_a_sending_that_breaks_off_leaves_what_is_there_and_is_made_up_later(
    server: Server, machine: Callable[[str], None]
) -> None:
    run = local_path("s3://bucket/broken")
    write(run / "metrics.jsonl", "1")
    write(run / "checkpoints" / "last.pt", "state 1")
    assert push(run)
    write(run / "metrics.jsonl", "1\n2")
    write(run / "checkpoints" / "last.pt", "state 2")
    server.broken = "metrics.jsonl"
    assert not push(run)
    with pytest.raises(UserError, match=r"s3://bucket/broken: metrics.jsonl, checkpoints/last.pt could not be sent"):
        copies.finish([run])
    machine("reader")
    there = local_path("s3://bucket/broken")
    pull(there)
    # no checkpoint that the metrics do not know
    assert [(there / name).read_text() for name in ("metrics.jsonl", "checkpoints/last.pt")] == ["1", "state 1"]
    server.broken = None
    machine("first")
    pull(run)
    assert push(run)
    machine("reader")
    pull(there)
    assert [(there / name).read_text() for name in ("metrics.jsonl", "checkpoints/last.pt")] == ["1\n2", "state 2"]


def test_a_run_that_goes_on_elsewhere_is_not_written_from_here(machine: Callable[[str], None]) -> None:
    run = local_path("s3://bucket/moved")
    write(run / "metrics.jsonl", "1")
    push(run)
    machine("second")
    there = local_path("s3://bucket/moved")
    pull(there)
    claim(there)
    write(there / "metrics.jsonl", "1\n2")
    push(there)
    machine("first")
    write(run / "metrics.jsonl", "1\nother")
    with pytest.raises(UserError, match="another process writes there since"):
        push(run)
    with pytest.raises(UserError, match=r"written from elsewhere, but metrics.jsonl in .* were never sent"):
        pull(run)
    (run / "metrics.jsonl").unlink()
    pull(run)
    assert (run / "metrics.jsonl").read_text() == "1\n2"


def test_the_machine_that_takes_over_goes_on_from_what_was_sent(machine: Callable[[str], None]) -> None:
    url = "s3://bucket/taken"
    write(local_path(url) / "metrics.jsonl", "1")
    push(local_path(url))
    # of which none writes more than its claim
    for name in ("second", "third", "second"):
        machine(name)
        take_over(local_path(url))
    write(local_path(url) / "metrics.jsonl", "1\n2")
    write(local_path(url) / "checkpoints" / "last.pt", "lost")
    machine("third")
    take_over(local_path(url))
    write(local_path(url) / "metrics.jsonl", "1\nother")
    push(local_path(url))
    machine("second")
    take_over(local_path(url))
    assert (local_path(url) / "metrics.jsonl").read_text() == "1\nother"
    assert not (local_path(url) / "checkpoints" / "last.pt").exists()
    write(local_path(url) / "metrics.jsonl", "sent on the way")
    take_over(local_path(url))
    machine("third")
    with pytest.raises(UserError, match="another process writes there since"):
        claim(local_path(url))
    pull(local_path(url))
    assert (local_path(url) / "metrics.jsonl").read_text() == "sent on the way"


def test_a_run_is_trained_resumed_evaluated_and_reported_by_url(
    tiny_root: Path, machine: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    upload(tiny_root, "s3://bucket/tiny")
    shared = ["--launcher", "local", "--preset", "demo", "--data", "s3://bucket/tiny", "--out", RUN]
    train([*shared, *tiny("train.epochs=3")], standalone_mode=False)
    assert f"mprd report {RUN}" in capfd.readouterr().out
    assert {"config.yaml", "metrics.jsonl", "table.txt", "checkpoints/last.pt"} <= set(names_of(RUN))
    config = local_path(RUN) / "config.yaml"
    assert "root: s3://bucket/tiny" in config.read_text()
    machine("second")
    evaluate([RUN, "--json"], standalone_mode=False)
    row = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert row["mAP"] == RunFolder(RUN).read_rows()[-1]["mAP"]
    report([RUN, "--out", f"{RUN}.html"], standalone_mode=False)
    assert "first.html" in names_of("s3://bucket/runs")
    extract([RUN, str(tiny_root / "query"), "--out", "s3://bucket/f.parquet"], standalone_mode=False)
    assert "f.parquet" in names_of("s3://bucket")
    assert load_model(RUN, device="cpu").name == "first"
    assert not Path("s3:").exists()


def test_a_resume_with_an_empty_cache_gives_the_same_bits(
    tiny_root: Path, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(tiny_root, "s3://bucket/tiny")
    common = ["--launcher", "local", "--preset", "demo", "--data", "s3://bucket/tiny", *tiny("train.epochs=2")]
    train([*common, "--out", "s3://bucket/whole"], standalone_mode=False)

    class Lost(Exception):
        pass

    save = RunFolder.save

    def lose(folder: RunFolder, state: dict[str, Any]) -> None:
        save(folder, state)
        if len(folder.read_rows()) == 1:
            raise Lost

    monkeypatch.setattr(RunFolder, "save", lose)
    with pytest.raises(Lost):
        train([*common, "--out", "s3://bucket/cut"], standalone_mode=False)
    monkeypatch.setattr(RunFolder, "save", save)
    machine("second")
    train(["--launcher", "local", "--resume", "s3://bucket/cut"], standalone_mode=False)
    machine("third")
    for name in ("whole", "cut"):
        pull(local_path(f"s3://bucket/{name}"))
    whole, cut = (checkpoint.load(local_path(f"s3://bucket/{name}/checkpoints/last.pt")) for name in ("whole", "cut"))
    assert all(torch.equal(cut["backbone"][key], value) for key, value in whole["backbone"].items())
    assert len(RunFolder("s3://bucket/cut").read_rows()) == 2


def test_a_study_is_run_and_resumed_by_url(
    tiny_root: Path, tmp_path: Path, machine: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "tune_configs" / "two.yaml", "name: two\ndoc: Two.\nspace: {pairs.mu: {grid: [0.3, 0.5]}}\n")
    out = ["--launcher", "local", "--out", "s3://bucket/study"]
    sets = tiny("train.epochs=1")
    tune(["--study", "two", "--trials", "1", *out, "--preset", "demo", "--data", str(tiny_root), *sets],
         standalone_mode=False)  # fmt: skip
    assert {"trials.json", "study.yaml", "best.yaml"} <= set(names_of("s3://bucket/study"))
    shutil.rmtree(tmp_path / "first")
    tune(["--resume", "--trials", "2", *out], standalone_mode=False)
    trials = json.loads((local_path("s3://bucket/study") / "trials.json").read_text())
    assert [trial["state"] for trial in trials] == ["finished", "finished"]
    finished = [name for name in names_of("s3://bucket/study/trials") if name.endswith("last.pt")]
    assert len(finished) == 2
