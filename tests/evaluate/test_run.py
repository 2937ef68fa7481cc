"""`mprd evaluate` repeats the figures of training, and evaluates on other data."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from mprd.config.loading import load_config
from mprd.evaluate.cli import app
from mprd.evaluate.run import evaluate_run
from mprd.runs.folder import RunFolder
from tests.conftest import NAMELESS, TINY


def test_it_repeats_the_figures_of_the_last_epoch(trained_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    app([str(trained_run), "--json", "--rerank"], standalone_mode=False)
    row, last = json.loads(capfd.readouterr().out), RunFolder(trained_run).read_rows()[-1]
    assert [row[name] for name in ("mAP", "mINP", "rank1")] == [last[name] for name in ("mAP", "mINP", "rank1")]
    assert 0 < row["mAP_reranked"] <= 1


def test_the_table_shows_percent_of_the_best_checkpoint(trained_run: Path, capfd: pytest.CaptureFixture[str]) -> None:
    app([str(trained_run), "--best"], standalone_mode=False)
    best = max(RunFolder(trained_run).read_rows(), key=lambda row: row["label_free_score"])
    (line,) = [line for line in capfd.readouterr().out.splitlines() if "mAP, trapezoid" in line]
    assert f"{100 * best['mAP_trapezoid']:.1f}" in line


def test_a_run_trained_on_a_gpu_is_evaluated_where_there_is_none(
    trained_run: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    run = shutil.copytree(trained_run, tmp_path / "run")
    settings = (run / "config.yaml").read_text()
    assert settings.count("device: auto") == 1
    (run / "config.yaml").write_text(settings.replace("device: auto", "device: cuda:99"))
    assert evaluate_run(RunFolder(run), data=None, best=False)["mAP"] == RunFolder(run).read_rows()[-1]["mAP"]
    assert "device: cuda:99 is not on this machine" in refuse(app, run, "--device", "cuda:99")


def test_data_without_query_and_gallery_are_refused(
    nameless_root: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    config = load_config("demo", overrides=(*TINY, *NAMELESS), values={"data": {"root": nameless_root}})
    RunFolder(tmp_path / "run").create(config)
    assert "has no query and gallery with identities and cameras" in refuse(app, tmp_path / "run")


@pytest.mark.parametrize("option", [("--same-cameras",), ("--name-pattern", "(?P<pid>x)")])
def test_options_of_other_data_are_refused_without_them(
    option: tuple[str, ...], trained_run: Path, refuse: Callable[..., str]
) -> None:
    assert "need --data" in refuse(app, trained_run, *option)


def test_other_data_need_query_and_gallery_alone_in_any_layout(
    trained_run: Path, tiny_root: Path, tmp_path: Path, refuse: Callable[..., str], capfd: pytest.CaptureFixture[str]
) -> None:
    for folder, name in (("query", "test/Probe"), ("bounding_box_test", "test/Gallery")):
        shutil.copytree(tiny_root / folder, tmp_path / name)
    figures = []
    for more in ([], ["--data", str(tmp_path), "--same-cameras"]):
        with pytest.raises(SystemExit) as stop:
            app([str(trained_run), "--json", *more])
        assert not stop.value.code
        figures.append(json.loads(capfd.readouterr().out))
    assert figures[0] == figures[1]
    shutil.rmtree(tmp_path / "test")
    assert f"{tmp_path}: no images" in refuse(app, trained_run, "--data", tmp_path)
