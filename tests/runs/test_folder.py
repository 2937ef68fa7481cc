"""The folder of a run holds settings, versions, metrics, a table and checkpoints, and is not written twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml

from mprd.errors import UserError
from mprd.runs.folder import RunFolder
from mprd.train.cli import app
from tests.conftest import TINY


def test_a_run_leaves_its_files(trained_run: Path) -> None:
    names = {str(path.relative_to(trained_run)) for path in trained_run.rglob("*") if path.is_file()}
    assert {"config.yaml", "run.json", "metrics.jsonl", "table.txt", "curves.png"} <= names
    assert {"checkpoints/last.pt", "checkpoints/best.pt"} <= names
    assert any(name.startswith("events/") for name in names)
    assert yaml.safe_load((trained_run / "config.yaml").read_text())["pairs"]["mu"] == 0.5
    assert json.loads((trained_run / "run.json").read_text())["versions"]["torch"] == torch.__version__.split("+")[0]


def test_the_metrics_have_a_row_per_epoch_and_the_documented_columns(trained_run: Path) -> None:
    rows = RunFolder(trained_run).read_rows()
    assert [row["epoch"] for row in rows] == [0, 1, 2]
    documented = {"cnn_loss", "gcn_loss", "mAP", "rank1", "rank5", "rank10", "pair_precision", "pair_recall"}
    documented |= {"mAP_trapezoid", "mINP", "gcn_auc", "cosine_auc", "positives", "neighbors", "neighbors_capped"}
    assert documented <= rows[-1].keys()


def test_a_truncated_last_row_is_dropped(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text((trained_run / "metrics.jsonl").read_text()[:-20])
    assert [row["epoch"] for row in RunFolder(tmp_path).read_rows()] == [0, 1]


def test_a_damaged_row_and_settings_that_were_cut_are_named(trained_run: Path, tmp_path: Path) -> None:
    lines = (trained_run / "metrics.jsonl").read_text().splitlines()
    (tmp_path / "metrics.jsonl").write_text("\n".join([lines[0], lines[1][:20], lines[2]]))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2 is damaged; restore it, or remove the line"):
        RunFolder(tmp_path).read_rows()
    settings = (trained_run / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(settings[: settings.index("backbone:")])
    with pytest.raises(UserError, match=r"config\.yaml: lacks backbone; cut, or not written by mprd"):
        RunFolder(tmp_path).read_config()


def test_a_graph_network_that_is_gone_is_read_and_not_resumed(trained_run: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load((trained_run / "config.yaml").read_text())
    settings["gcn"]["variant"] = "reciprocal"
    folder = RunFolder(tmp_path)
    folder.config_file.write_text(yaml.safe_dump(settings))
    assert folder.read_config() == RunFolder(trained_run).read_config()
    with pytest.raises(UserError, match=r'gcn\.variant is now fixed at "paper" .* resume it with the version of mprd'):
        folder.check_is_resumable()
    settings["pairs"]["labeller"] = "reciprocal"
    folder.config_file.write_text(yaml.safe_dump(settings))
    folder.check_is_resumable()


def test_a_run_is_not_written_among_the_files_of_others(trained_run: Path, tmp_path: Path) -> None:
    config = RunFolder(trained_run).read_config()
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UserError, match=r"holds files that are not of a run, such as notes\.txt; change --out"):
        RunFolder(tmp_path).create(config)
    # of a run that ended before its first checkpoint
    (tmp_path / ".lock").write_text("")
    RunFolder(tmp_path).create(config)


def test_the_table_names_each_column(trained_run: Path) -> None:
    table = (trained_run / "table.txt").read_text()
    for name in ("last", "label-free", "best on test", "untrained", "mAP, trapezoid"):
        assert name in table


def test_a_folder_with_a_run_is_not_overwritten(trained_run: Path, tiny_root: Path, refuse: Callable[..., str]) -> None:
    sets = [text for override in TINY for text in ("--set", override)]
    line = refuse(app, "--data", tiny_root, "--out", trained_run, "--launcher", "local", *sets)
    assert f"{trained_run}: holds a run already" in line


def test_a_folder_that_cannot_be_written_is_named(trained_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    folder = RunFolder(tmp_path / "file" / "run")
    with pytest.raises(UserError, match="file/run: cannot write the run folder: Not a directory"):
        folder.create(RunFolder(trained_run).read_config())
    with pytest.raises(UserError, match=r"file/run/untrained\.json: cannot write: Not a directory"):
        folder.write_untrained({})
