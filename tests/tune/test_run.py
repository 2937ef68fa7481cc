"""Whole studies in this process: their trials, their report, and what a kill, a failure or a pruner leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pyarrow.parquet as pq
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from mprd.config.loading import build_config, load_config
from mprd.data.datasets import load_dataset
from mprd.data.same_images import record_images
from mprd.errors import UserError
from mprd.runs.folder import RunFolder
from mprd.tune.cli import app
from mprd.tune.folder import StudyFolder
from mprd.tune.outcome import write_error
from mprd.tune.plots import draw_plots
from mprd.tune.report import other_quantity
from mprd.tune.study import build_study, load_study
from mprd.tune.trial import Trial, trial_config

from .conftest import (
    NAMES,
    STUDY,
    add_perfect_trials,
    checkpoint_times,
    overrides,
    read_trials,
    run,
    states,
    write_study_file,
)


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("pairs.mu must be below 1", "RuntimeError: pairs.mu must be below 1"),
        ("It failed:\n  File x, line 1\n  ValueError: no crop\n", "RuntimeError: It failed: ValueError: no crop"),
        ("two lines\nof which the first is shown", "RuntimeError: two lines"),
        ("it failed:", "RuntimeError: it failed:"),
        ("", "RuntimeError: no message"),
    ],
)
def test_an_error_is_recorded_with_its_cause_in_the_first_line(message: str, reason: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert write_error(folder, RuntimeError(message)) == reason
    assert (folder.path / "error.txt").read_text().splitlines()[0] == reason


def test_the_settings_of_a_trial_override_those_of_the_study() -> None:
    config = trial_config(load_config("demo"), Trial(0, "x", {"pairs.mu": 0.7, "meta.eta.kind": "cosine"}, 3))
    assert (config.pairs.mu, config.meta.eta.kind, config.train.seed) == (0.7, "cosine", 3)
    with pytest.raises(UserError, match=r"pairs.mu must be less than 1, but got 1.5"):
        trial_config(load_config("demo"), Trial(0, "x", {"pairs.mu": 1.5}, 0))


def test_a_study_leaves_run_folders_and_its_report(finished: Path) -> None:
    found = {path.name for path in finished.iterdir()}
    assert {"results.parquet", "best.yaml", "table.txt", "report.html", "study.db", "plots"} <= found
    assert sorted(path.parent.name for path in finished.glob("trials/*/metrics.jsonl")) == NAMES
    assert all((finished / "plots" / name).stat().st_size > 1000 for name in ("curve.png", "parallel.png"))
    with sqlite3.connect(finished / "study.db") as database:
        assert database.execute("select state, count(*) from trials group by state").fetchall() == [("COMPLETE", 4)]


def test_results_and_best_settings_agree_with_the_metrics(finished: Path) -> None:
    rows = pq.read_table(finished / "results.parquet").to_pylist()
    assert [(row["pairs.mu"], row["train.seed"], row["state"]) for row in rows] == [
        (mu, seed, "finished") for seed in (0, 1) for mu in (0.3, 0.5)
    ]
    for row in rows:
        (epoch,) = (finished / row["run"] / "metrics.jsonl").read_text().splitlines()
        expected = json.loads(epoch)
        assert (row["label_free_score"], row["mAP"]) == (expected["label_free_score"], expected["mAP"])
        assert row["epochs"] == 1
    means = {mu: sum(row["label_free_score"] for row in rows if row["pairs.mu"] == mu) / 2 for mu in (0.3, 0.5)}
    config = load_config("demo", file=finished / "best.yaml")
    assert means[config.pairs.mu] == max(means.values())
    assert config == build_config(yaml.safe_load((finished / "best.yaml").read_text()))


def test_a_drawn_study_without_one_of_its_run_folders_is_drawn(finished: Path, tmp_path: Path) -> None:
    study = build_study(
        {**STUDY, "space": {"pairs.mu": {"choice": [0.3, 0.5]}}, "sampler": "tpe", "trials": 4}, source="test"
    )
    rows = pq.read_table(finished / "results.parquet").to_pylist()
    rows[0] |= dict.fromkeys(("label_free_score", "mAP"))
    plots = draw_plots(study, [], rows, {}, objective="label_free_score", folder=tmp_path / "plots")
    assert plots["Slices"].stat().st_size > 1000


def test_the_page_contains_its_plots_and_loads_nothing(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert all(text in page for text in ("mu=0.3", "mu=0.5", "Rises, then drops."))


def test_a_finished_study_runs_nothing_again_and_is_not_overwritten(finished: Path, tiny_root: Path) -> None:
    before = checkpoint_times(finished)
    run(None, None, finished)
    assert checkpoint_times(finished) == before
    assert sorted(before) == NAMES
    with pytest.raises(UserError, match="holds a study already; go on with --resume"):
        run("small", tiny_root, finished)


def test_a_study_with_a_value_that_is_gone_is_reported_and_runs_no_trial(finished: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(finished, tmp_path / "out"))
    config = yaml.safe_load((out / "config.yaml").read_text())
    config["neighbors"]["search"] = "hnsw"
    (out / "config.yaml").write_text(yaml.safe_dump(config))
    run(None, None, out)
    trials = read_trials(out)
    trials[-1]["state"] = "running"
    (out / "trials.json").write_text(json.dumps(trials))
    (out / "report.html").unlink()
    with pytest.raises(UserError, match=r"^neighbors\.search: hnsw is gone; resume it with the version of mprd"):
        run(None, None, out)
    assert checkpoint_times(out) == checkpoint_times(finished)
    assert states(out) == ["finished"] * 3 + ["running"]
    assert (out / "report.html").is_file()


def test_a_failing_trial_is_recorded_and_a_poor_one_stopped(tiny_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("mixed", tiny_root, out, "train.epochs=3", trials=2)
    add_perfect_trials(out, "mixed")
    run(None, None, out, trials=4)
    sound, broken, poor, short = read_trials(out)
    assert (sound["state"], sound["reason"]) == ("finished", None)
    assert broken["state"] == "failed"
    assert "no/such.pt" in broken["reason"]
    assert "Traceback" in (out / "trials" / "001_broken_seed0" / "error.txt").read_text()
    assert "no/such.pt" in (out / "report.html").read_text()
    assert (poor["state"], poor["reason"]) == ("stopped", "poor label_free_score by the median rule")
    assert len(RunFolder(out / "trials" / "002_poor_seed0").read_rows()) == 1
    assert short["state"] == "finished"
    assert "3/3" in (out / "trials" / "000_sound_seed0" / "log.txt").read_text()


@pytest.mark.parametrize("launcher", ["local", pytest.param("ray", marks=pytest.mark.ray)])
def test_a_killed_study_resumes_without_repeating_a_trial(
    launcher: str, finished: Path, tiny_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "mprd.tune", "--launcher", launcher, "--out", str(out)]
    start = ["--study", "small", "--preset", "demo", "--data", str(tiny_root), "--trials", "2"]
    start += ["--concurrency", "1"] if launcher == "ray" else []
    start += [text for override in overrides() for text in ("--set", override)]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    process = subprocess.Popen([*command, *start], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600
    while not (out / "trials.json").exists() or states(out) != ["finished", "running"]:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = checkpoint_times(out)
    run(None, None, out, launcher=launcher)
    assert states(out) == ["finished", "finished"]
    assert checkpoint_times(out)[NAMES[0]] == before[NAMES[0]]
    expected, found = (pq.read_table(path / "results.parquet").to_pylist()[:2] for path in (finished, out))
    for key in ("point", "train.seed", "label_free_score", "mAP"):
        assert [row[key] for row in found] == [row[key] for row in expected]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--study", "mu_swep"], "unknown study 'mu_swep', did you mean mu_sweep?"),
        ([], "--study NAME is missing"),
        (["--study", "small", "--trials", "0"], "--trials must be at least 1"),
        (["--study", "small", "--objective", "map"], "--objective must be label_free_score, silhouette, mAP, but got"),
        (["--study", "small", "--sampler", "cmaes"], "--sampler must be grid, random, tpe, but got 'cmaes'"),
        (["--study", "mixed", "--sampler", "tpe"], "--sampler: mixed has named points, which are not drawn"),
        (["--study", "joint", "--sampler", "grid"], "pairs.mu of joint is a real number, which has no grid"),
        (["--study", "small", "--storage", "no/such/journal"], "no/such/journal: cannot be opened ([Errno 2]"),
        (["--study", "small", "--launcher", "slurm"], "--launcher must be ray or local"),
        (["--study", "small", "--resume"], "holds no study to go on with"),
        (["--study", "small", "--resume", "--smoke"], "--resume goes on with the settings of its study folder"),
        (["--study", "small", "--set", "pairs.mue=1"], "unknown setting pairs.mue, did you mean pairs.mu"),
        (["--study", "small", "--preset", "market1501", "--data", "no/such"], "no/such"),
        (["--study", "small", "--launcher", "local", "--concurrency", "2"], "need --launcher ray"),
    ],
)
def test_mistakes_are_one_line(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        app(args)
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2
    assert message in line


def test_a_value_out_of_range_is_refused_before_anything_runs(tmp_path: Path, tiny_root: Path) -> None:
    write_study_file(tmp_path, {"name": "bad", "doc": "Bad.", "space": {"pairs.mu": {"grid": [0.5, 1.3]}}})
    with pytest.raises(UserError, match=r"pairs.mu must be less than 1, but got 1.3"):
        run("bad", tiny_root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_line_overrides_the_objective(tmp_path: Path, nameless_root: Path) -> None:
    write_study_file(tmp_path, {**STUDY, "objective": "silhouette"})
    crops = ("data.dataset=folder", "data.name_pattern=crop", "meta.num_ids=0")
    with pytest.raises(UserError, match=r"--objective mAP: .* has no query and gallery"):
        run("small", nameless_root, tmp_path / "out", *crops, changes={"objective": "mAP"})
    assert StudyFolder(tmp_path / "out").read_options().objective == "mAP"


def test_a_shared_storage_holds_the_study_under_the_name_of_its_folder(tmp_path: Path, tiny_root: Path) -> None:
    changes = {"storage": str(tmp_path / "journal.log"), "sampler": "random", "pruner": "none"}
    run("small", tiny_root, tmp_path / "one", trials=1, changes=changes)
    storage = JournalStorage(JournalFileBackend(changes["storage"]))
    assert [trial.state.name for trial in optuna.load_study(study_name="one", storage=storage).trials] == ["COMPLETE"]
    assert not (tmp_path / "one" / "study.db").exists()
    with pytest.raises(UserError, match="holds a study one already"):
        run("small", tiny_root, tmp_path / "elsewhere" / "one", changes=changes)


def test_figures_of_the_paper_are_shown_beside_the_same_quantity_alone() -> None:
    study = load_study("mu_sweep")
    assert other_quantity(study, load_config("paper", overrides=("data.dataset=synthetic",))) is None
    line = other_quantity(study, load_config("demo", overrides=("pairs.labeller=reciprocal",)))
    assert line is not None
    assert "pairs.mu under pairs.labeller=reciprocal is not what Fig. 4 of the paper varies" in line


def test_a_smoke_study_is_short_and_its_trials_end_with_the_last_point(
    tiny_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("small", tiny_root, tmp_path / "out", smoke=True, trials=5)
    assert "--trials 5: small has only 2" in capsys.readouterr().out
    assert [(trial["point"], trial["seed"]) for trial in read_trials(tmp_path / "out")] == [
        ("mu=0.3", 0),
        ("mu=0.5", 0),
    ]
    assert "over 1 of 1 seeds" in (tmp_path / "out" / "best.yaml").read_text()


def test_a_study_goes_on_with_the_images_it_began_with_alone(tmp_path: Path, tiny_root: Path) -> None:
    config = build_config({"data": {"root": tiny_root, "dataset": "market1501"}})
    dataset, folder = load_dataset(config.data), StudyFolder(tmp_path)
    for _ in range(2):
        folder.check_images(record_images(dataset, config.data), on_changed="stop")
    fewer = replace(dataset, train=dataset.train.select(np.arange(1, len(dataset.train))))
    now = record_images(fewer, config.data)
    with pytest.raises(UserError, match=r"images\.json: the training images have changed: 1 gone"):
        folder.check_images(now, on_changed="stop")
    folder.check_images(now, on_changed="continue")
    folder.images_file.write_text("{")
    with pytest.raises(UserError, match=r"images\.json: damaged"):
        folder.check_images(now, on_changed="stop")


def test_the_list_names_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    app(["--list"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("small", "mu_sweep", "table1"))
