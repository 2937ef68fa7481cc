"""The order of a study's trials, and their records in the study folder and in Optuna."""

from __future__ import annotations

import sqlite3
import sys
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import optuna
import pytest

from mprd.config.loading import load_config
from mprd.errors import UserError
from mprd.tune.folder import StudyFolder, StudyOptions
from mprd.tune.report import read_results
from mprd.tune.run import check_end, open_queue
from mprd.tune.study import build_study
from mprd.tune.trial import Trial
from mprd.tune.trial_queue import TrialQueue

from .conftest import STUDY

DRAWN = {
    "space": {"pairs.mu": {"low": 0.1, "high": 0.9}, "neighbors.k": {"low": 2, "high": 9}},
    "sampler": "tpe",
    "trials": 6,
    "paper": None,
}


def open_study(path: Path, *, num_trials: int, timeout: float | None = None, **parts: Any) -> TrialQueue:
    """Open the small study with other parts, created where it does not exist."""
    folder = StudyFolder(path / "study")
    if not folder.study_file.exists():
        study = build_study({**STUDY, **parts}, source="test")
        folder.create(study, load_config("demo"), StudyOptions("label_free_score", num_trials, seed=7))
    return open_queue(folder, trials=num_trials, timeout=timeout)


def finish(queue: TrialQueue, trial: Trial, *scores: float) -> list[bool]:
    """End a trial with a score per epoch; return after which of them the pruner stops it."""
    seconds = {"gcn_seconds": 1.0, "cnn_seconds": 2.0}
    rows = [{"epoch": epoch, "label_free_score": score, **seconds} for epoch, score in enumerate(scores)]
    stops = [queue.report(trial, row) for row in rows]
    folder = queue.folder.run_folder(trial)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_rows(rows)
    queue.finish(trial, "finished")
    return stops


GRID = [(f"mu={mu}", {"pairs.mu": mu}, seed) for seed in (0, 1) for mu in (0.3, 0.5)]


def test_a_grid_covers_all_points_with_a_seed_before_the_next_seed(tmp_path: Path) -> None:
    trials = open_study(tmp_path, num_trials=4)
    assert [(trial.point, trial.settings, trial.seed) for trial in trials] == GRID


def test_without_optuna_a_grid_runs_and_a_drawn_study_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "mprd.tune.optuna_backend", raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    trials = open_study(tmp_path / "grid", num_trials=4)
    assert [(trial.point, trial.settings, trial.seed) for trial in trials] == GRID
    with pytest.raises(UserError, match="needs optuna"):
        open_study(tmp_path / "drawn", num_trials=2, **DRAWN)


def test_a_study_resumes_with_the_unfinished_then_the_failed_then_the_new_trials(tmp_path: Path) -> None:
    first = open_study(tmp_path, num_trials=4)
    done, failed, _ = islice(first, 3)
    finish(first, done, 0.4, 0.6)
    first.finish(failed, "failed", "out of memory")
    second = open_study(tmp_path, num_trials=4)
    assert second.num_left == 3
    assert [trial.number for trial in second] == [2, 1, 3]
    assert [trial.state for trial in second.trials] == ["finished", "running", "running", "running"]


def test_optuna_holds_every_trial_with_its_state_value_and_reason(tmp_path: Path) -> None:
    queue = open_study(tmp_path, num_trials=3)
    good, bad, empty = queue
    assert finish(queue, good, 0.4, 0.6) == [False, False]
    queue.finish(bad, "failed", "ValueError: no")
    queue.finish(empty, "finished")  # without a row
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{queue.folder.database}")
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "FAIL", "FAIL"]
    assert study.trials[0].value == 0.6
    assert study.trials[0].params == {"pairs.mu": 0.3, "train.seed": 0}
    assert study.trials[0].intermediate_values == {1: 0.4, 2: 0.6}
    assert study.trials[1].user_attrs["reason"] == "ValueError: no"
    assert "without label_free_score" in study.trials[2].user_attrs["reason"]


def test_trials_that_a_kill_left_in_optuna_alone_are_closed(tmp_path: Path) -> None:
    killed = open_study(tmp_path, num_trials=2).optuna
    assert killed is not None
    killed.ask(None, 0)
    killed.study.enqueue_trial({"pairs.mu": 0.3, "train.seed": 0})
    opened = open_study(tmp_path, num_trials=2).optuna
    assert opened is not None
    assert {trial.state.name for trial in opened.study.trials} == {"FAIL"}


def test_a_trial_that_ended_in_optuna_alone_is_ended_once_more(tmp_path: Path) -> None:
    queue = open_study(tmp_path, num_trials=1)
    trial = queue.next()
    assert trial is not None
    running = queue.folder.trials_file.read_bytes()
    finish(queue, trial, 0.4, 0.6)
    # as a kill between both leaves it
    queue.folder.trials_file.write_bytes(running)
    queue = open_study(tmp_path, num_trials=1)
    (trial,) = queue
    assert finish(queue, trial, 0.4, 0.6) == [False, False]
    assert [trial.state for trial in queue.trials] == ["finished"]


def end_two(path: Path) -> TrialQueue:
    """Open the small study, finish a trial, fail another, and leave a third running."""
    queue = open_study(path, num_trials=4)
    done, failed, _ = islice(queue, 3)
    finish(queue, done, 0.4, 0.6)
    queue.finish(failed, "failed", "out of memory")
    return queue


@pytest.mark.parametrize("content", [None, b""])
def test_a_lost_database_is_made_anew(content: bytes | None, tmp_path: Path) -> None:
    database = end_two(tmp_path).folder.database
    database.unlink()
    if content is not None:
        database.write_bytes(content)
    queue = open_study(tmp_path, num_trials=4)
    assert queue.optuna is not None
    made = [(trial.state.name, trial.value, trial.params["train.seed"]) for trial in queue.optuna.study.trials]
    assert made == [("COMPLETE", 0.6, 0), ("FAIL", None, 0)]
    assert [trial.number for trial in queue] == [2, 1, 3]
    finish(queue, queue.trials[3], 0.5)
    assert queue.trials[3].state == "finished"


def test_what_is_no_database_is_named_and_removing_it_helps(tmp_path: Path) -> None:
    database = end_two(tmp_path).folder.database
    database.write_bytes(b"garbage" * 1000)
    with pytest.raises(UserError, match=r"study\.db: file is not a database; end what uses it, or remove it") as error:
        open_study(tmp_path, num_trials=4)
    assert "\n" not in str(error.value)
    database.unlink()
    assert open_study(tmp_path, num_trials=4).num_left == 3


def test_a_locked_database_ends_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mprd.tune.optuna_backend.LOCK_SECONDS", 0.1)
    queue = open_study(tmp_path, num_trials=4)
    trial = queue.next()
    assert trial is not None
    with closing(sqlite3.connect(queue.folder.database, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        finish(queue, trial, 0.4)
        assert "study.db: database is locked, so a result is missing there" in caplog.text
        assert queue.trials[0].state == "finished"
        with pytest.raises(UserError, match=r"study\.db: database is locked; end what uses it"):
            open_study(tmp_path, num_trials=4)


@pytest.mark.parametrize("text", ["[{", "{}", "[1]", '[{"number": 0}]', "\0"])
def test_a_damaged_list_of_trials_is_named(text: str, tmp_path: Path) -> None:
    folder = end_two(tmp_path).folder
    folder.trials_file.write_text(text)
    with pytest.raises(UserError, match=r"trials\.json: (damaged|not text)"):
        open_study(tmp_path, num_trials=4)
    folder.trials_file.unlink()
    assert open_study(tmp_path, num_trials=4).num_left == 4
    folder.options_file.write_text(text)
    with pytest.raises(UserError, match=r"study\.json: (damaged|not text)"):
        open_study(tmp_path, num_trials=4)


def test_a_drawn_point_runs_with_all_of_its_seeds(tmp_path: Path) -> None:
    first = list(open_study(tmp_path, num_trials=2, **DRAWN))
    for trial in first:
        open_study(tmp_path, num_trials=2).finish(trial, "stopped")
    # another session draws other points
    trials = [*first, *open_study(tmp_path, num_trials=6)]
    assert [trial.seed for trial in trials] == [0, 1, 0, 1, 0, 1]
    assert all(trials[n].settings == trials[n + 1].settings for n in (0, 2, 4))
    assert len({trial.point for trial in trials}) == 3
    for trial in trials:
        assert 0.1 <= trial.settings["pairs.mu"] <= 0.9
        assert trial.settings["neighbors.k"] in range(2, 10)


@pytest.mark.parametrize("kind", ["asha", "median", "hyperband"])
def test_a_pruner_stops_a_poor_trial_after_its_grace(tmp_path: Path, kind: str) -> None:
    stop = {"kind": kind, "grace_epochs": 2}
    queue = open_study(tmp_path, num_trials=8, **{**DRAWN, "seeds": [0], "trials": 8, "stop": stop})
    for trial in islice(queue, 6):
        finish(queue, trial, *[0.9] * 4)
    (poor,) = islice(queue, 1)
    stops = finish(queue, poor, *[0.1] * 4)
    assert (stops[0], stops[3]) == (False, True)


def test_a_resumed_study_draws_what_an_uninterrupted_one_draws(tmp_path: Path) -> None:
    parts = {**DRAWN, "seeds": [0], "trials": 14}  # TPE draws at random before ten trials
    scores = [0.1 * (number % 7) for number in range(14)]
    whole = open_study(tmp_path / "whole", num_trials=14, **parts)
    for trial, score in zip(whole, scores, strict=True):
        finish(whole, trial, score)
    for number in range(14):
        part = open_study(tmp_path / "parts", num_trials=number + 1, **parts)
        for trial in part:
            finish(part, trial, scores[number])
    assert [trial.settings for trial in part.trials] == [trial.settings for trial in whole.trials]


def test_the_best_points_are_refitted_with_more_seeds(tmp_path: Path) -> None:
    parts = {"space": {"pairs.mu": {"grid": [0.3, 0.5, 0.7]}}, "seeds": [0], "refit": {"top": 2, "seeds": [1, 2]}}
    queue = open_study(tmp_path, num_trials=3, **parts)
    assert queue.plan_refits() == 0
    for trial, score in zip(queue, (0.8, 0.2, 0.6), strict=True):
        finish(queue, trial, score)
    assert queue.plan_refits() == 4
    finish(queue, *islice(queue, 1), 0.1)
    # resumed, the other three are left, and the poor refit has not changed which points are the best
    queue = open_study(tmp_path, num_trials=3)
    assert queue.plan_refits() == 3
    for trial in queue:
        finish(queue, trial, 0.7)
    assert [(trial.point, trial.seed) for trial in queue.trials[3:]] == [
        ("mu=0.3", 1), ("mu=0.3", 2), ("mu=0.7", 1), ("mu=0.7", 2)
    ]  # fmt: skip
    results = read_results(queue.folder, queue.study, "label_free_score")
    # (0.8 + 0.1 + 0.7) / 3 lies below (0.6 + 0.7 + 0.7) / 3
    assert results.best is not None
    assert (results.best.name, results.best.seeds) == ("mu=0.7", (0, 1, 2))
    assert queue.plan_refits() == 0


def test_no_trial_starts_after_the_timeout(tmp_path: Path) -> None:
    assert len(list(open_study(tmp_path, num_trials=4, timeout=3600))) == 4
    late = open_study(tmp_path / "late", num_trials=4, timeout=0)
    assert list(late) == []
    with pytest.raises(UserError, match="no trial finished"):
        check_end(late)


def test_reasons_that_name_the_urls_of_run_folders_are_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mprd.tune.trial_queue.place_of", lambda path: f"s3://bucket/trials/{path.name}")
    queue = open_study(tmp_path, num_trials=4)
    for trial in islice(queue, 3):
        url = f"s3://bucket/trials/{queue.folder.run_folder(trial).path.name}"
        queue.finish(trial, "failed", f"UserError: {url}: could not be sent")
    assert queue.repeated_failure == "UserError: : could not be sent"


def test_a_study_ends_after_three_trials_that_failed_alike(tmp_path: Path) -> None:
    queue = open_study(tmp_path, num_trials=4)
    for trial in islice(queue, 3):
        queue.finish(trial, "failed", f"UserError: {queue.folder.run_folder(trial).path}: the disk is full")
    assert queue.next() is None
    with pytest.raises(
        UserError, match=r"stopped after 3 trials that failed alike, 1 are left: UserError: .*disk is full"
    ):
        check_end(queue)
    # one that ran beside them and ended well lets the study go on
    queue.reasons.append(None)
    assert queue.repeated_failure is None
    # resumed, it tries again
    queue = open_study(tmp_path, num_trials=4)
    for number, trial in enumerate(queue):
        queue.finish(trial, "failed", f"UserError: reason {number}")
    assert [trial.reason for trial in queue.trials] == [f"UserError: reason {number}" for number in range(4)]
