"""Runs and studies by URL on a cluster whose machines share no folder: each has a cache of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.cluster_utils import Cluster

from mprd.runs.folder import RunFolder
from mprd.storage.copies import pull
from mprd.storage.places import local_path
from mprd.train.cli import launch
from tests.parallel.machines import MACHINE, head_alone, take_machines
from tests.train.test_cli import settings
from tests.train.test_ray_workers import assert_same_bits, finish, num_rows, wait_for
from tests.tune.conftest import MIXED, add_perfect_trials, states, write_study_file

from .server import Server, names_of, upload
from .test_copies import tiny

pytestmark = pytest.mark.ray
DATA, RUN, STUDY = "s3://bucket/tiny", "s3://bucket/run", "s3://bucket/study"
SHORT = ("train.epochs=4", "train.checkpoint_seconds=0.02", "eval.every=2")
GIVEN = ["--preset", "demo", "--data", DATA]


@pytest.fixture(scope="module")
def cluster(server: Server, tiny_root: Path) -> Iterator[Cluster]:
    """Start a head without CPUs beside a server with the data."""
    upload(tiny_root, DATA)
    with head_alone() as cluster:
        yield cluster


@pytest.fixture
def machine(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Return a function that adds a machine with one CPU, whose cache has its name."""

    def add(name: str) -> Any:
        monkeypatch.setenv("MPRD_CACHE", str(tmp_path / name))
        return cluster.add_node(num_cpus=1, **MACHINE)

    yield add
    take_machines(cluster)


def start(cluster: Cluster, cache: Path, command: str, *args: str) -> subprocess.Popen[str]:
    """Start a command on the head, with a cache."""
    line = [sys.executable, "-m", f"mprd.{command}", *args, "--launcher", "ray", "--address", cluster.address]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MPRD_CACHE": str(cache)}
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=cache.parent
    )


def test_a_run_whose_machine_went_away_ends_on_another_in_the_bits_of_one_process(
    cluster: Cluster, machine: Callable[[str], Any], tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = tmp_path / "alone"
    launch(settings(tiny_root, *SHORT), out=alone, resume=None, launcher="local")
    machines = {name: machine(name) for name in ("one", "two")}
    copies = {name: tmp_path / name / "remote" / "s3" / "bucket" / "run" for name in machines}
    process = start(cluster, tmp_path / "head", "train", *GIVEN, "--out", RUN, *tiny(*SHORT))
    wait_for(process, lambda: any(num_rows(copy) >= 2 for copy in copies.values()))
    (lost,) = [name for name, copy in copies.items() if num_rows(copy)]
    cluster.remove_node(machines[lost], allow_graceful=False)
    output = finish(process)
    assert "going on from the last checkpoint (1 of 3 times)" in output
    assert f"mprd report {RUN}" in output
    assert not [name for name in machines if str(tmp_path / name) in output]
    assert all((copy / "checkpoints" / "last.pt").exists() for copy in copies.values())
    assert not [*(tmp_path / "head").rglob("*.pt")]
    assert {"config.yaml", "table.txt", "curves.png", "checkpoints/best.pt"} <= {*names_of(RUN)}
    monkeypatch.setenv("MPRD_CACHE", str(tmp_path / "reader"))
    pull(local_path(RUN))
    assert_same_bits(alone, local_path(RUN))


def test_a_study_with_a_failing_and_a_poor_trial_is_resumed_from_another_machine(
    cluster: Cluster, machine: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_study_file(tmp_path, {**MIXED, "points": MIXED["points"][:3]})
    for name in ("one", "two"):
        machine(name)
    given = ["--study", "mixed", "--trials", "2", *GIVEN, *tiny("train.epochs=3")]
    finish(start(cluster, tmp_path / "head", "tune", "--out", STUDY, *given))
    monkeypatch.setenv("MPRD_CACHE", str(tmp_path / "other"))
    study = local_path(STUDY)
    pull(study)
    assert states(study) == ["finished", "failed"]
    add_perfect_trials(study, "mixed")
    output = finish(start(cluster, tmp_path / "other", "tune", "--out", STUDY, "--resume", "--trials", "3"))
    assert not [name for name in ("one", "two") if str(tmp_path / name) in output]
    assert states(study) == ["finished", "failed", "stopped"]
    assert "no/such.pt" in (study / "report.html").read_text()
    assert len(RunFolder(study / "trials" / "002_poor_seed0").read_rows()) == 1
    assert not [*study.rglob("last.pt")]
    ended = {"trials/000_sound_seed0/checkpoints/last.pt", "trials/001_broken_seed0/error.txt"}
    assert {"best.yaml", "table.txt", "report.html", *ended} <= {*names_of(STUDY)}
