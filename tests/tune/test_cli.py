"""Studies as they run: what is tried, what is kept, and what a kill, a failure or a stop rule leaves."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pyarrow.parquet as pq
import pytest
import yaml

from mprd.config.loading import build_config, load_config
from mprd.errors import UserError
from mprd.runs.console import FIGURES
from mprd.runs.folder import RunFolder
from mprd.tune import cli as tune
from mprd.tune.cli import app, launch
from mprd.tune.folder import StudyFolder, Trial, trial_config
from mprd.tune.local import keep_error, read_error
from mprd.tune.report import PointResult as Result
from mprd.tune.report import Spread, choose_best, order_agreement, rank_correlation, spreads
from tests.conftest import TINY

from .test_folder import STUDY

EPOCHS = 2


@pytest.fixture(autouse=True)
def own_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in a folder with studies of its own."""
    write_study_file(tmp_path, STUDY)
    monkeypatch.chdir(tmp_path)


def write_study_file(folder: Path, study: dict) -> None:
    (folder / "tune_configs").mkdir(exist_ok=True)
    (folder / "tune_configs" / f"{study['name']}.yaml").write_text(yaml.safe_dump(study))


def overrides(*extra: str) -> list[str]:
    return [*TINY, f"train.epochs={EPOCHS}", "train.threads=1", *extra]


def run_study(name: str | None, root: Path | None, out: Path, **options: Any) -> None:
    given = {"preset": "demo", "data": root, "set_": overrides(*options.pop("extra", ()))}
    settings = dict.fromkeys(given) if options.get("resume") else given
    defaults = {"resume": False, "smoke": False, "trials": None, "objective": None, "launcher": "local"}
    resources = {"concurrency": None, "gpus_per_trial": None}
    launch(name, settings, out=out, resources=resources, **{**defaults, **options})


def read_trials(out: Path) -> list[dict]:
    return json.loads((out / "trials.json").read_text())


def checkpoint_times(out: Path) -> dict[str, int]:
    return {path.parts[-3]: path.stat().st_mtime_ns for path in out.glob("trials/*/checkpoints/last.pt")}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("pairs.mu must be below 1", "RuntimeError: pairs.mu must be below 1"),
        ("It failed:\n  File x, line 1\n  ValueError: no crop\n", "RuntimeError: It failed: ValueError: no crop"),
        ("two lines\nof which the first says it", "RuntimeError: two lines"),
        ("it failed:", "RuntimeError: it failed:"),
        ("", "RuntimeError: no message"),
    ],
)
def test_an_error_is_written_down_with_its_cause_in_the_first_line(message: str, reason: str, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    assert keep_error(folder, RuntimeError(message)) == reason
    assert read_error(folder) == reason


def test_a_trials_settings_lie_over_those_of_the_study() -> None:
    config = trial_config(load_config("demo"), Trial(0, "x", {"pairs.mu": 0.7, "meta.eta.kind": "cosine"}, 3))
    assert (config.pairs.mu, config.meta.eta.kind, config.train.seed) == (0.7, "cosine", 3)
    with pytest.raises(UserError, match=r"pairs.mu must be less than 1, but got 1.5"):
        trial_config(load_config("demo"), Trial(0, "x", {"pairs.mu": 1.5}, 0))


# -- figures --------------------------------------------------------------------------------------


def test_seeds_are_averaged_and_their_spread_is_the_sample_deviation() -> None:
    keys = dict.fromkeys(key for key, _ in FIGURES)
    rows = [{**keys, "mAP": value, "rank1": 0.5} for value in (0.2, 0.3, 0.7)]
    figures = spreads(rows)
    assert figures["mAP"].mean == pytest.approx(0.4, abs=1e-12)
    assert figures["mAP"].deviation == pytest.approx(0.07**0.5, abs=1e-12)
    assert figures.keys() == {"mAP", "rank1"}
    assert str(figures["mAP"]) == "40.0 ± 26.5"
    assert str(spreads(rows[:1])["mAP"]) == "20.0"


def test_one_lucky_seed_does_not_make_the_best_point() -> None:
    def point(name: str, mean: float, *seeds: int) -> Result:
        return Result(name, {}, seeds, {"mAP": Spread(mean, None)})

    points = [point("lucky", 0.9, 0), point("fair", 0.5, 0, 1), point("better", 0.6, 0, 1)]
    best = choose_best(points, "mAP")
    assert best is not None
    assert best.name == "better"
    assert choose_best([], "mAP") is None


def test_four_points_are_needed_to_say_how_a_figure_orders_them() -> None:
    def point(mean: float, score: float | None) -> Result:
        figures = {"mAP": Spread(mean, None)} | ({} if score is None else {"silhouette": Spread(score, None)})
        return Result("x", {}, (0,), figures)

    points = [point(0.1, 0.5), point(0.2, 0.4), point(0.3, 0.3), point(0.4, 0.2)]
    assert order_agreement(points, "silhouette") == pytest.approx(-1)
    assert order_agreement([*points[:3], point(0.4, None)], "silhouette") is None


def test_the_rank_correlation_gives_ties_their_mean_rank() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 40]) == pytest.approx(1)
    assert rank_correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # ranks 0, 1.5, 1.5, 3 against 0, 1, 2, 3: covariance 4.5 over sqrt(4.5 * 5)
    assert rank_correlation([1, 2, 2, 5], [1, 2, 3, 4]) == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation([1, 1], [1, 2]) is None


# -- whole studies in this process ----------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run a small study to its end."""
    base = tmp_path_factory.mktemp("study")
    write_study_file(base, STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        run_study("small", tiny_root, base / "out")
    return base / "out"


def test_a_study_leaves_run_folders_and_its_report(finished: Path) -> None:
    names = {path.name for path in finished.iterdir()}
    assert {"results.parquet", "best.yaml", "table.txt", "report.html", "study.db", "plots"} <= names
    assert (finished / "trials" / "000_mu=0.3_seed0" / "metrics.jsonl").is_file()
    assert (finished / "plots" / "curve.png").stat().st_size > 1000
    assert (finished / "plots" / "parallel.png").stat().st_size > 1000


def test_the_results_have_a_row_a_trial_with_both_objectives(finished: Path) -> None:
    rows = pq.read_table(finished / "results.parquet").to_pylist()
    assert [(row["pairs.mu"], row["train.seed"], row["state"]) for row in rows] == [
        (0.3, 0, "finished"),
        (0.5, 0, "finished"),
        (0.3, 1, "finished"),
        (0.5, 1, "finished"),
    ]
    for row in rows:
        last = json.loads((finished / row["run"] / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["label_free_score"] == last["label_free_score"]
        assert row["mAP"] == last["mAP"]
        assert row["epochs"] == EPOCHS


def test_the_best_settings_are_those_of_the_highest_mean_and_train_as_they_are(finished: Path) -> None:
    rows = pq.read_table(finished / "results.parquet").to_pylist()
    means = {mu: sum(r["label_free_score"] for r in rows if r["pairs.mu"] == mu) / 2 for mu in (0.3, 0.5)}
    config = load_config("demo", file=finished / "best.yaml")
    assert means[config.pairs.mu] == max(means.values())
    assert config.train.epochs == EPOCHS
    assert config == build_config(yaml.safe_load((finished / "best.yaml").read_text()))


def test_the_page_holds_its_plots_and_names_no_other_place(finished: Path) -> None:
    page = (finished / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert all(name in page for name in ("mu=0.3", "mu=0.5", "Rises, then drops."))


def test_a_study_names_its_objective_and_the_command_line_another(
    tmp_path: Path, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "run_and_report", lambda *_args, **_kwargs: None)
    write_study_file(tmp_path, {**STUDY, "objective": "silhouette"})
    run_study("small", tiny_root, tmp_path / "own")
    run_study("small", tiny_root, tmp_path / "other", objective="mAP")
    chosen = [StudyFolder(tmp_path / name).read_options()["objective"] for name in ("own", "other")]
    assert chosen == ["silhouette", "mAP"]


def test_the_study_file_is_an_optuna_database(finished: Path) -> None:
    with sqlite3.connect(finished / "study.db") as database:
        states = database.execute("select state, count(*) from trials group by state").fetchall()
    assert states == [("COMPLETE", 4)]


def test_going_on_with_a_finished_study_runs_nothing_again(finished: Path, tiny_root: Path) -> None:
    before = checkpoint_times(finished)
    run_study(None, None, finished, resume=True)
    assert checkpoint_times(finished) == before
    assert len(before) == 4


def test_a_trial_that_fails_is_written_down_and_the_study_goes_on(tiny_root: Path, tmp_path: Path) -> None:
    points = [{"name": "sound"}, {"name": "broken", "set": {"backbone.weights": "no/such/file.pt"}}, {"name": "last"}]
    write_study_file(tmp_path, {"name": "mixed", "doc": "One fails.", "points": points})
    run_study("mixed", tiny_root, tmp_path / "out")
    trials = read_trials(tmp_path / "out")
    assert [trial["state"] for trial in trials] == ["finished", "failed", "finished"]
    assert "no/such/file.pt" in trials[1]["reason"]
    assert "Traceback" in (tmp_path / "out" / "trials" / "001_broken_seed0" / "error.txt").read_text()
    assert "no/such/file.pt" in (tmp_path / "out" / "report.html").read_text()


def test_a_poor_trial_is_stopped_and_counted_as_such(tiny_root: Path, tmp_path: Path) -> None:
    write_study_file(tmp_path, {**STUDY, "stop": {"kind": "median", "grace_epochs": 1}})
    out = tmp_path / "out"
    run_study("small", tiny_root, out, trials=1, extra=["train.epochs=4"])
    # others that did as well as one can: the next trial falls below their median
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{out / 'study.db'}")
    perfect = optuna.trial.create_trial(value=1.0, intermediate_values=dict.fromkeys(range(1, 5), 1.0))
    study.add_trials([perfect] * 6)
    run_study(None, None, out, resume=True, trials=2)
    first, second = read_trials(out)
    assert (first["state"], first["reason"]) == ("finished", None)
    assert (second["state"], second["reason"]) == ("stopped", "poor label_free_score by the median rule")
    rows = (out / "trials" / "001_mu=0.5_seed0" / "metrics.jsonl").read_text().splitlines()
    assert len(rows) == 1


def test_a_killed_study_goes_on_without_repeating_what_had_finished(tiny_root: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    sets = [text for override in overrides("train.epochs=4") for text in ("--set", override)]
    command = [sys.executable, "-m", "mprd.tune", "--study", "small", "--launcher", "local"]
    process = subprocess.Popen(
        [*command, "--data", str(tiny_root), "--out", str(out), *sets],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (out / "trials" / "001_mu=0.5_seed0" / "metrics.jsonl").exists():
        assert process.poll() is None, "the study ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [trial["state"] for trial in read_trials(out)] == ["finished", "running"]
    before = checkpoint_times(out)
    run_study(None, None, out, resume=True)
    after = checkpoint_times(out)
    assert after["000_mu=0.3_seed0"] == before["000_mu=0.3_seed0"]
    assert [trial["state"] for trial in read_trials(out)] == ["finished"] * 4
    rows = (out / "trials" / "001_mu=0.5_seed0" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["epoch"] for row in rows] == [0, 1, 2, 3]


# -- on Ray ---------------------------------------------------------------------------------------


@pytest.mark.ray
def test_a_study_killed_on_ray_goes_on_and_finds_what_this_process_finds(
    finished: Path, tiny_root: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    sets = [text for override in overrides() for text in ("--set", override)]
    command = [sys.executable, "-m", "mprd.tune", "--launcher", "ray", "--out", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("RAY_ADDRESS", None)
    first = ["--study", "small", "--data", str(tiny_root), "--concurrency", "1", "--trials", "3", *sets]
    process = subprocess.Popen([*command, *first], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 600
    while not (out / "trials.json").exists() or len(read_trials(out)) < 2:
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert [trial["state"] for trial in read_trials(out)] == ["finished", "running"]
    before = checkpoint_times(out)
    subprocess.run([*command, "--resume"], env=environment, check=True, timeout=600)
    assert [trial["state"] for trial in read_trials(out)] == ["finished"] * 3
    assert checkpoint_times(out)["000_mu=0.3_seed0"] == before["000_mu=0.3_seed0"]
    here, there = (pq.read_table(path / "results.parquet").to_pylist()[:3] for path in (finished, out))
    for key in ("point", "train.seed", "label_free_score", "mAP"):
        assert [row[key] for row in there] == [row[key] for row in here]


@pytest.mark.ray
def test_on_ray_a_failing_trial_is_written_down_and_a_poor_one_stopped(tiny_root: Path, tmp_path: Path) -> None:
    points = [{"name": "sound"}, {"name": "broken", "set": {"backbone.weights": "no/such/file.pt"}}, {"name": "poor"}]
    stop = {"kind": "median", "grace_epochs": 1}
    write_study_file(tmp_path, {"name": "mixed", "doc": "One fails.", "points": points, "stop": stop})
    out = tmp_path / "out"
    run_study("mixed", tiny_root, out, launcher="ray", trials=2, extra=["train.epochs=4"])
    study = optuna.load_study(study_name="mixed", storage=f"sqlite:///{out / 'study.db'}")
    study.add_trials([optuna.trial.create_trial(value=1.0, intermediate_values=dict.fromkeys(range(1, 5), 1.0))] * 6)
    run_study(None, None, out, resume=True, launcher="ray", trials=3)
    trials = read_trials(out)
    assert [trial["state"] for trial in trials] == ["finished", "failed", "stopped"]
    assert "no/such/file.pt" in trials[1]["reason"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--study", "mu_swep"], "unknown study 'mu_swep', did you mean mu_sweep?"),
        ([], "--study NAME is missing"),
        (["--study", "small", "--trials", "0"], "--trials must be at least 1"),
        (["--study", "small", "--objective", "map"], "--objective must be label_free_score, silhouette, mAP, but got"),
        (["--study", "small", "--launcher", "slurm"], "--launcher must be ray or local"),
        (["--study", "small", "--resume"], "holds no study to go on with"),
        (["--study", "small", "--resume", "--smoke"], "--resume goes on with the settings of its study folder"),
        (["--study", "small", "--set", "pairs.mue=1"], "unknown setting pairs.mue, did you mean pairs.mu"),
        (["--study", "small", "--preset", "market1501", "--data", "no/such"], "no/such"),
        (["--study", "small", "--launcher", "local", "--concurrency", "2"], "are Ray's: give --launcher ray"),
    ],
)
def test_mistakes_are_told_in_one_line(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        app(args)
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error")]
    assert stop.value.code == 2
    assert len(lines) == 1
    assert message in lines[0]


def test_a_value_out_of_range_is_told_before_anything_runs(tmp_path: Path, tiny_root: Path) -> None:
    write_study_file(tmp_path, {"name": "bad", "doc": "Bad.", "space": {"pairs.mu": {"grid": [0.5, 1.3]}}})
    with pytest.raises(UserError, match=r"pairs.mu must be less than 1, but got 1.3"):
        run_study("bad", tiny_root, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_with_a_study_is_not_written_over(finished: Path, tiny_root: Path) -> None:
    with pytest.raises(UserError, match="holds a study already; go on with --resume"):
        run_study("small", tiny_root, finished)


def test_the_list_names_every_study(capsys: pytest.CaptureFixture[str]) -> None:
    app(["--list"], standalone_mode=False)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("small", "mu_sweep", "table1"))
