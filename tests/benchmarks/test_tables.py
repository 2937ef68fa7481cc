"""The table of runs that `benchmarks/tables.py` writes: the figures that docs/results.md is made of."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mprd.tune.study import Point, load_study

FILE = Path(__file__).parents[2] / "benchmarks" / "tables.py"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up
    sys.modules["tables"] = module
    spec.loader.exec_module(module)
    return module


def write_run(folder: Path, mAP: float, aucs: list[float | None], *, is_done: bool = True) -> Path:
    folder.mkdir()
    rows = [
        {"epoch": epoch, "gcn_seconds": 10.0, "cnn_seconds": 50.0, "gcn_auc": auc, "pair_recall": 0.1 * epoch}
        for epoch, auc in enumerate(aucs)
    ]
    # the score prefers the epoch before the last, query and gallery the first
    for row, found, score in ((rows[-1], mAP, 0.4), (rows[-2], mAP - 0.05, 0.5), (rows[0], mAP + 0.1, 0.3)):
        row |= {"mAP": found, "rank1": 0.9, "label_free_score": score}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if is_done:
        (folder / "table.txt").touch()
    return folder


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_a_row_is_the_mean_over_finished_seeds_of_the_last_epoch(tables: ModuleType, tmp_path: Path) -> None:
    point = Point(name="MPRD")
    first = write_run(tmp_path / "0", 0.6, [None, 0.1, 0.7, 0.7, 0.8, 0.9])
    second = write_run(tmp_path / "1", 0.8, [None, 0.1, 0.7, 0.7, 0.8, 0.7])
    third = write_run(tmp_path / "2", 0.1, [None, 0.1], is_done=False)
    jobs = [tables.Job(point, seed, folder) for seed, folder in enumerate((first, second, third))]
    head, _, row = map(cells, tables.write_table(jobs).splitlines())
    shown = dict(zip(head[2:], row[2:], strict=True))
    assert row[:2] == ["MPRD", "2"]
    assert shown["mAP"] == "70.0 ± 14.1"
    assert shown["mAP of its best epoch"] == "65.0 ± 14.1"
    assert shown["best mAP on test"] == "80.0 ± 14.1"
    assert shown["Rank-1"] == "90.0 ± 0.0"
    # the last third: two of six epochs
    assert shown["AUC of g"] == "0.800 ± 0.071"
    assert shown["AUC of cosine"] == ""
    assert shown["minutes of training"] == "6.0 ± 0.0"


def test_a_point_without_a_finished_run_has_no_row(tables: ModuleType, tmp_path: Path) -> None:
    jobs = [tables.Job(Point(name="KNN"), 0, write_run(tmp_path / "0", 0.5, [None, None], is_done=False))]
    assert len(tables.write_table(jobs).splitlines()) == 2


def test_a_run_is_started_once_and_gone_on_with_later(tables: ModuleType, tmp_path: Path) -> None:
    args: Any = type("Args", (), {"set": ["train.epochs=2"], "preset": "bench", "data": Path("ROOT")})
    job = tables.Job(Point(name="0id", set={"meta.num_ids": 0, "pairs.labeller": "gcn"}), 3, tmp_path / "run")
    command = job.command(args)
    assert command[-4:] == ["--seed", "3", "--out", str(tmp_path / "run")]
    assert command[5:9] == ["--preset", "bench", "--data", "ROOT"]
    settings = [word for flag, word in itertools.pairwise(command) if flag == "--set"]
    assert settings == ["train.epochs=2", "meta.num_ids=0", 'pairs.labeller="gcn"']
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.pt").touch()
    assert job.command(args)[-2:] == ["--resume", str(tmp_path / "run")]


def test_points_that_the_preset_makes_the_same_share_their_runs(tables: ModuleType, tmp_path: Path) -> None:
    args: Any = type("Args", (), {"set": [], "preset": "bench", "data": None, "out": tmp_path})
    points = load_study("table1").grid()
    jobs = tables.list_jobs(points, [0, 1], args)
    assert [job.seed for job in jobs] == [0] * len(points) + [1] * len(points)
    folders = {job.point.name: job.folder.name for job in jobs[: len(points)]}
    # the preset transfers no styles, which the paper calls MPRD#
    assert folders["MPRD#"] == folders.pop("MPRD") == "MPRD#_seed0"
    assert folders["MPRD w/o"] == "MPRD_wo_seed0"
    assert len(set(folders.values())) == len(folders)
    # the paper's preset does
    args.preset, args.data = "market1501", tmp_path
    folders = {job.point.name: job.folder.name for job in tables.list_jobs(points, [0], args)}
    assert (folders["MPRD"], folders["MPRD#"]) == ("MPRD_seed0", "MPRD#_seed0")
