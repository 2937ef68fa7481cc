"""Training on a cluster of several nodes that lose one, and whose object store is full."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import ray
from ray.cluster_utils import Cluster

from mprd.parallel.cluster import QUIET, find_resources
from mprd.train.cli import launch

from .test_cli import SLOW, arguments, one_thread, settings
from .test_ray_workers import assert_same_bits, finish, first_worker, num_rows, wait_for

pytestmark = pytest.mark.ray
STORE_BYTES = 80 * 2**20
SHORT = ("train.epochs=2",)


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Start a head without CPUs; tests add nodes, which are processes of this machine."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": False, "object_store_memory": STORE_BYTES},
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def start(cluster: Cluster, *args: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "mprd.train", *args, "--launcher", "ray", "--address", cluster.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=one_thread())


def ancestors(pid: int) -> list[int]:
    """List the processes that a process descends from."""
    found = []
    while pid > 1:
        # the name, in brackets, may hold blanks
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        found.append(pid)
    return found


def test_resources_are_what_the_nodes_have_where_no_autoscaler_brings_more(cluster: Cluster) -> None:
    cluster.add_node(num_cpus=3, num_gpus=2, object_store_memory=STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False)
    found = find_resources()
    assert (found["CPU"], found["GPU"]) == (3, 2)


def test_a_run_whose_node_went_away_ends_in_the_bits_of_one_process(
    cluster: Cluster, tiny_root: Path, tmp_path: Path
) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    launch(settings(tiny_root, *SLOW), out=alone, resume=None, launcher="local")
    nodes = [cluster.add_node(num_cpus=1, object_store_memory=STORE_BYTES) for _ in range(2)]
    process = start(cluster, *arguments(tiny_root, run, *SLOW))
    wait_for(process, lambda: num_rows(run) >= 2)
    above = ancestors(first_worker(run))
    raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
    (lost,) = [node for node, raylet in zip(nodes, raylets, strict=True) if raylet in above]
    cluster.remove_node(lost, allow_graceful=False)
    output = finish(process)
    assert "a worker was lost; going on from the last checkpoint (1 of 3 times)" in output
    assert_same_bits(alone, run)


def test_a_run_beside_a_full_object_store_ends_in_the_bits_of_one_process(
    cluster: Cluster, tiny_root: Path, tmp_path: Path
) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    launch(settings(tiny_root, *SHORT), out=alone, resume=None, launcher="local")
    cluster.add_node(num_cpus=3, object_store_memory=STORE_BYTES)
    ray.init(address=cluster.address, log_to_driver=False)

    @ray.remote(num_cpus=0)
    def fill(number: int) -> np.ndarray:
        return np.full(10 * 2**20, number, dtype=np.uint8)

    # three times what both stores hold: what does not fit goes to disk and comes back
    ballast = [fill.remote(number % 256) for number in range(3 * 2 * STORE_BYTES // (10 * 2**20))]
    ray.wait(ballast, num_returns=len(ballast), fetch_local=False)
    actors = ("subgraphs.executor=ray", "subgraphs.num_actors=1")
    process = start(cluster, *arguments(tiny_root, run, *SHORT, *actors))
    finish(process)
    assert_same_bits(alone, run)
    assert int(ray.get(ballast[0])[0]) == 0
    assert int(ray.get(ballast[-1])[-1]) == (len(ballast) - 1) % 256
