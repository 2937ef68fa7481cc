"""The best point of random studies is the best: whatever is drawn, repeated, failed, stopped or resumed."""

from __future__ import annotations

import random
import re
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import Any

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from optuna.storages import InMemoryStorage

from mprd.config.loading import build_config, load_config
from mprd.config.nested import look_up
from mprd.tune.folder import StudyFolder, StudyOptions
from mprd.tune.optuna_backend import OptunaStudy
from mprd.tune.report import StudyResults, point_table, read_results, render, write_best
from mprd.tune.study import Study, build_study
from mprd.tune.trial_queue import TrialQueue

CONFIG = load_config("demo")
CHOICES = {"pairs.mu": [0.3, 0.5, 0.7], "neighbors.k": [2, 4], "train.epochs": [1, 2, 3], "pairs.limit": [True, False]}
RANGES = {"pairs.mu": {"low": 0.1, "high": 0.9}, "neighbors.k": {"low": 2, "high": 4}}
Trials = dict[str, dict[int, list[float]]]
"""Final scores by point and seed."""


@st.composite
def studies(draw: st.DrawFn) -> Study:
    """Draw a grid, named points, or a space of choices and ranges for a sampler."""
    sampler = draw(st.sampled_from(["grid", "random", "tpe"]))
    names = draw(st.lists(st.sampled_from([*CHOICES]), min_size=1, max_size=2, unique=True))
    kind = "grid" if sampler == "grid" else "choice"
    values = {name: draw(st.lists(st.sampled_from(CHOICES[name]), min_size=1, unique=True)) for name in names}
    parts: dict[str, Any] = {"space": {name: {kind: values[name]} for name in names}}
    if sampler != "grid":
        parts["space"] |= {name: RANGES[name] for name in names if name in RANGES and draw(st.booleans())}
        parts["trials"] = draw(st.integers(1, 9))
    elif draw(st.booleans()):
        pairs = [(name, value) for name in names for value in values[name]]
        parts = {"points": [{"name": f"{name} {value}", "set": {name: value}} for name, value in pairs]}
    seeds = draw(st.lists(st.integers(0, 9), min_size=1, max_size=3, unique=True))
    return build_study({"name": "any", "doc": "Any.", "sampler": sampler, "seeds": seeds, **parts}, source="")


def score(point: str, seed: int, epoch: int) -> float:
    """Return a number in [0, 1) that depends on all three."""
    return random.Random(f"{point} {seed} {epoch}").random()


def open_queue(folder: StudyFolder, study: Study, storage: InMemoryStorage, *, num_trials: int) -> TrialQueue:
    known = {trial.optuna_number for trial in folder.read_trials() if trial.optuna_number is not None}
    optuna = OptunaStudy(storage, study, objective="label_free_score", known=known)
    return TrialQueue(folder, study, objective="label_free_score", num_trials=num_trials, optuna=optuna)


def run_session(queue: TrialQueue, draw: st.DrawFn) -> None:
    """Run some trials of a study, each of which may fail or be stopped, until one is killed."""
    folder, study = queue.folder, queue.study
    for trial in queue:
        ending = draw(st.sampled_from(["finished", "finished", "finished", "failed", "stopped", "killed"]))
        if ending == "killed":
            return
        epochs = trial.settings.get("train.epochs", 1)
        run = folder.run_folder(trial)
        run.path.mkdir(parents=True, exist_ok=True)
        scores = [score(study.key(trial.point, trial.settings), trial.seed, epoch) for epoch in range(epochs)]
        seconds = {"gcn_seconds": 0, "cnn_seconds": 0}
        rows = [{"epoch": epoch, "label_free_score": value, **seconds} for epoch, value in enumerate(scores)]
        run.write_rows(rows)
        queue.finish(trial, ending)  # type: ignore[arg-type]


def finished(folder: StudyFolder, study: Study) -> Trials:
    found: Trials = defaultdict(lambda: defaultdict(list))
    for trial in folder.read_trials():
        if trial.state == "finished":
            point = study.key(trial.point, trial.settings)
            last = trial.settings.get("train.epochs", 1) - 1
            found[point][trial.seed].append(score(point, trial.seed, last))
    return found


def expected_best(trials: Trials) -> tuple[set[str], int]:
    """Return the points of the highest mean among those with the most seeds, and the number of seeds."""
    most = max(map(len, trials.values()))
    means = {p: sum(scores[0] for scores in seeds.values()) / most for p, seeds in trials.items() if len(seeds) == most}
    return {point for point, mean in means.items() if mean >= max(means.values()) - 1e-12}, most


def repeat_trials(folder: StudyFolder, draw: st.DrawFn) -> None:
    """Repeat and shuffle finished trials, as version 0.1 did beyond the end of a grid."""
    trials = folder.read_trials()
    done = [trial for trial in trials if trial.state == "finished"]
    repeats = draw(st.lists(st.sampled_from(done), max_size=4)) if done else []
    folder.write_trials(draw(st.permutations([*trials, *repeats])))


def check_report(folder: StudyFolder, results: StudyResults, best: set[str], num_seeds: int) -> None:
    """Check that best.yaml, table and page agree on a point among `best`, from so many seeds."""
    study, point = results.study, results.best
    assert point is not None
    assert study.key(point.name, point.settings) in best
    write_best(folder, CONFIG, results, point)
    text = (folder.path / "best.yaml").read_text()
    assert f"{point.name} is best by label-free score over {num_seeds} of {len(study.seeds)} seeds" in text
    config = build_config(yaml.safe_load(text))
    assert all(look_up(config, name) == value for name, value in point.settings.items())
    assert config.train.seed in study.seeds
    assert f"{point.name} *" in [*point_table(results, results.columns).columns[0].cells]
    marked = re.findall(r'<tr class="best"><td>(.*?)</td><td>(\d+)</td>', render(results, {}))
    assert marked == [(point.name, str(num_seeds))]


@settings(max_examples=20, deadline=None, derandomize=True)
@given(study=studies(), data=st.data())
def test_best_settings_table_and_page_show_the_best_point(study: Study, data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, storage = StudyFolder(Path(name) / "study"), InMemoryStorage()
        folder.create(study, CONFIG, StudyOptions("label_free_score", study.num_trials))
        for num_trials in data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=3)):
            run_session(open_queue(folder, study, storage, num_trials=num_trials), data.draw)
        trials = folder.read_trials()
        pairs = [(study.key(trial.point, trial.settings), trial.seed) for trial in trials]
        assert len(set(pairs)) == len(pairs), "a point was run twice with a seed"
        assert len({trial.point for trial in trials}) == len({point for point, _ in pairs}), "two points share a name"
        repeat_trials(folder, data.draw)
        results, known = read_results(folder, study, "label_free_score"), finished(folder, study)
        if known:
            check_report(folder, results, *expected_best(known))
        else:
            assert results.best is None


def test_trials_beyond_the_last_point_and_seed_are_not_run(tmp_path: Path) -> None:
    space = {"pairs.mu": {"choice": [0.3, 0.5, 0.7]}, "neighbors.k": {"low": 2, "high": 5}}
    parts = {"space": space, "sampler": "tpe", "trials": 100, "seeds": [0, 1]}
    study = build_study({"name": "small", "doc": "Twelve points.", **parts}, source="")
    folder = StudyFolder(tmp_path / "study")
    folder.create(study, CONFIG, StudyOptions("mAP", study.num_trials))
    queue = open_queue(folder, study, InMemoryStorage(), num_trials=100)
    assert study.num_trials == queue.num_left == 24
    trials = [*queue]
    assert len({(trial.point, trial.seed) for trial in trials}) == len(trials) == 24
