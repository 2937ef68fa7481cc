"""A small study, and how to run it on the tiny data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml

from mprd.tune.run import run_study
from tests.conftest import TINY

STUDY: dict[str, Any] = {
    "name": "small",
    "doc": "A small study.",
    "space": {"pairs.mu": {"grid": [0.3, 0.5]}},
    "seeds": [0, 1],
    "paper": {"source": "Fig. 4", "text": "Rises, then drops.", "peak": 0.5},
}
MIXED: dict[str, Any] = {
    "name": "mixed",
    "doc": "One fails, one is stopped, one is as poor but at its end.",
    "points": [
        {"name": "sound"},
        {"name": "broken", "set": {"backbone.weights": "no/such.pt"}},
        {"name": "poor"},
        {"name": "short", "set": {"train.epochs": 1}},
    ],
    "stop": {"kind": "median", "grace_epochs": 1},
}
NAMES = ["000_mu=0.3_seed0", "001_mu=0.5_seed0", "002_mu=0.3_seed1", "003_mu=0.5_seed1"]
"""Run folders of the small study."""


@pytest.fixture(autouse=True)
def own_studies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with the small study and the mixed one."""
    write_study_file(tmp_path, STUDY)
    write_study_file(tmp_path, MIXED)
    monkeypatch.chdir(tmp_path)


def write_study_file(folder: Path, study: dict[str, Any]) -> None:
    (folder / "tune_configs").mkdir(exist_ok=True)
    (folder / "tune_configs" / f"{study['name']}.yaml").write_text(yaml.safe_dump(study))


def overrides(*extra: str) -> list[str]:
    return [*TINY, "train.epochs=1", "train.threads=1", *extra]


def run(name: str | None, root: Path | None, out: Path, *extra: str, **options: Any) -> None:
    """Run a study with tiny settings, or resume one where no name is given."""
    settings = {"preset": "demo", "data": root, "set_": overrides(*extra)} if name else {}
    run_study(name, settings, out=out, **{"resume": name is None, "launcher": "local", **options})


def read_trials(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "trials.json").read_text())


def states(out: Path) -> list[str]:
    return [trial["state"] for trial in read_trials(out)]


def checkpoint_times(out: Path) -> dict[str, int]:
    return {path.parts[-3]: path.stat().st_mtime_ns for path in out.glob("trials/*/checkpoints/last.pt")}


def add_perfect_trials(out: Path, name: str) -> None:
    """Add trials of the highest objective, so that the median rule stops the next one."""
    study = optuna.load_study(study_name=name, storage=f"sqlite:///{out / 'study.db'}")
    perfect = optuna.trial.create_trial(value=1.0, intermediate_values=dict.fromkeys(range(1, 5), 1.0))
    study.add_trials([perfect] * 6)


@pytest.fixture(scope="package")
def finished(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the small study to its end."""
    base = tmp_path_factory.mktemp("study")
    write_study_file(base, STUDY)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(base)
        run("small", tiny_root, base / "out")
    return base / "out"
