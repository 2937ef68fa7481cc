"""The ledger of a study: which trials are handed out, and what it and Optuna hold of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import optuna
import pytest

from mprd.config.loading import load_config
from mprd.tune.folder import Ledger, StudyFolder, Trial
from mprd.tune.optuna_backend import OptunaStudy
from mprd.tune.study import Study, build_study

STUDY = {
    "name": "small",
    "doc": "A small study.",
    "space": {"pairs.mu": {"grid": [0.3, 0.5]}},
    "seeds": [0, 1],
    "paper": {"source": "Fig. 4", "text": "Rises, then drops.", "peak": 0.5},
}


def make_ledger(path: Path, *, num_trials: int, mirror: bool = False, **parts: Any) -> Ledger:
    study = build_study({**STUDY, **parts}, source="test")
    folder = StudyFolder(path)
    if not folder.study_file.exists():
        folder.create(study, load_config("demo"), objective="label_free_score", num_trials=num_trials)
    return reopen(folder, study, num_trials=num_trials, mirror=mirror)


def reopen(folder: StudyFolder, study: Study, *, num_trials: int, mirror: bool) -> Ledger:
    known = {trial.mirror for trial in folder.read_trials() if trial.mirror is not None}
    held = OptunaStudy(folder.database, study, objective="label_free_score", known=known) if mirror else None
    return Ledger(folder, study, objective="label_free_score", num_trials=num_trials, mirror=held)


def write_rows(ledger: Ledger, trial: Trial, *scores: float) -> None:
    folder = ledger.folder.run_folder(trial)
    folder.path.mkdir(parents=True, exist_ok=True)
    folder.write_rows([{"epoch": n, "label_free_score": score} for n, score in enumerate(scores)])


@pytest.mark.parametrize("mirror", [False, True])
def test_a_grid_covers_all_points_with_a_seed_before_the_next_seed(tmp_path: Path, mirror: bool) -> None:
    trials = list(make_ledger(tmp_path / "study", num_trials=4, mirror=mirror))
    assert [(trial.point, trial.seed) for trial in trials] == [
        ("mu=0.3", 0),
        ("mu=0.5", 0),
        ("mu=0.3", 1),
        ("mu=0.5", 1),
    ]
    assert [trial.settings for trial in trials[:2]] == [{"pairs.mu": 0.3}, {"pairs.mu": 0.5}]


def test_a_ledger_opened_again_hands_out_the_unfinished_then_the_failed_then_the_new(tmp_path: Path) -> None:
    first = make_ledger(tmp_path / "study", num_trials=4, mirror=True)
    done, failed, under_way = first.next(), first.next(), first.next()
    assert done is not None
    assert failed is not None
    assert under_way is not None
    write_rows(first, done, 0.4, 0.6)
    first.finish(done, "finished")
    first.finish(failed, "failed", "out of memory")
    second = make_ledger(tmp_path / "study", num_trials=4, mirror=True)
    assert second.num_left == 3
    assert [trial.number for trial in second] == [2, 1, 3]
    assert [trial.state for trial in second.trials] == ["finished", "running", "running", "running"]


def test_optuna_holds_every_trial_with_its_state_value_and_reason(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "study", num_trials=3, mirror=True)
    good, bad, again = ledger
    write_rows(ledger, good, 0.4, 0.6)
    for epoch, score in enumerate((0.4, 0.6)):
        assert ledger.report(good, {"epoch": epoch, "label_free_score": score}) is False
    ledger.finish(good, "finished")
    ledger.finish(bad, "failed", "ValueError: no")
    ledger.finish(again, "finished")  # without a row it cannot be
    study = optuna.load_study(study_name="small", storage=f"sqlite:///{tmp_path / 'study' / 'study.db'}")
    states = [trial.state.name for trial in study.trials]
    assert states == ["COMPLETE", "FAIL", "FAIL"]
    assert study.trials[0].value == 0.6
    assert study.trials[0].params == {"pairs.mu": 0.3, "train.seed": 0}
    assert study.trials[0].intermediate_values == {1: 0.4, 2: 0.6}
    assert study.trials[1].user_attrs["reason"] == "ValueError: no"
    assert "without label_free_score" in study.trials[2].user_attrs["reason"]


def test_what_a_kill_left_half_asked_for_in_optuna_is_closed(tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "study", num_trials=2, mirror=True)
    mirror = ledger.mirror
    assert isinstance(mirror, OptunaStudy)
    mirror.ask(None, 0)
    mirror.study.enqueue_trial({"pairs.mu": 0.3, "train.seed": 0})
    opened = make_ledger(tmp_path / "study", num_trials=2, mirror=True).mirror
    assert isinstance(opened, OptunaStudy)
    assert {trial.state.name for trial in opened.study.trials} == {"FAIL"}


DRAWN = {
    "space": {"pairs.mu": {"low": 0.1, "high": 0.9}, "neighbors.k": {"low": 2, "high": 9}},
    "sampler": "tpe",
    "trials": 6,
    "paper": None,
}


def test_a_drawn_point_is_run_with_all_of_its_seeds(tmp_path: Path) -> None:
    trials = list(make_ledger(tmp_path / "study", num_trials=6, mirror=True, **DRAWN))
    assert [trial.seed for trial in trials] == [0, 1, 0, 1, 0, 1]
    assert all(trials[n].settings == trials[n + 1].settings for n in (0, 2, 4))
    assert len({trial.point for trial in trials}) == 3
    for trial in trials:
        assert 0.1 <= trial.settings["pairs.mu"] <= 0.9
        assert trial.settings["neighbors.k"] in range(2, 10)


def test_going_on_draws_other_points_than_the_first_session(tmp_path: Path) -> None:
    first = list(make_ledger(tmp_path / "study", num_trials=2, mirror=True, **DRAWN))
    more = make_ledger(tmp_path / "study", num_trials=4, mirror=True, **DRAWN)
    assert len({trial.point for trial in [*first, *more]}) == 2


@pytest.mark.parametrize("kind", ["asha", "median"])
def test_a_stop_rule_ends_a_poor_trial_after_its_grace(tmp_path: Path, kind: str) -> None:
    stop = {"kind": kind, "grace_epochs": 2}
    parts = {**DRAWN, "seeds": [0], "trials": 8, "stop": stop}
    ledger = make_ledger(tmp_path / "study", num_trials=8, mirror=True, **parts)
    for trial in [ledger.next() for _ in range(6)]:
        assert trial is not None
        for epoch in range(4):
            ledger.report(trial, {"epoch": epoch, "label_free_score": 0.9})
        write_rows(ledger, trial, 0.9, 0.9, 0.9, 0.9)
        ledger.finish(trial, "finished")
    poor = ledger.next()
    assert poor is not None
    stops = [ledger.report(poor, {"epoch": epoch, "label_free_score": 0.1}) for epoch in range(4)]
    assert stops[0] is False
    assert stops[3] is True
