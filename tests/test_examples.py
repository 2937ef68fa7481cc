"""The scripts of examples/ run."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import TINY

EXAMPLES = Path(__file__).parent.parent / "examples"
SETTINGS = [setting for setting in TINY if not setting.startswith(("data.dataset", "train.epochs", "meta"))]
SMALL = (*SETTINGS, "train.epochs=1", "backbone.name=small", "backbone.weights=none")


def run(name: str, *words: Any, **options: Any) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](*map(str, words), **options)


def test_every_script_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {"train_on_crops", "search_gallery", "sweep"}


def test_a_folder_of_crops_is_trained_on(
    nameless_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("train_on_crops", nameless_root, tmp_path / "run", *SMALL)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "folder, small, 1 epochs"
    assert told[1].startswith("epoch 1: ")
    assert (tmp_path / "run" / "checkpoints" / "last.pt").is_file()


def test_a_gallery_is_searched(tiny_run: Path, tiny_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    query = min((tiny_root / "query").iterdir())
    run("search_gallery", tiny_run, tiny_root / "query", query)
    told = capsys.readouterr().out.splitlines()
    assert told[:2] == [str(query), f"  0.000  {query}"]
    assert len(told) == 6


def test_a_setting_is_swept(tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("sweep", tmp_path, *SMALL, f"data.root={tiny_root}", "data.dataset=market1501", mus=(0.2, 0.5), seeds=(0,))
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told] == ["mu", "0.2", "0.5"]
    assert (tmp_path / "mu0.5-seed0" / "metrics.jsonl").is_file()
