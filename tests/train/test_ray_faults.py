"""Training on a cluster of several machines, one that runs out of memory, is taken, or whose object store is full."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated.autoscaler_pb2 import DrainNodeReason

from mprd.parallel.ray_actors import actor_options
from mprd.train.cli import launch
from tests.parallel.machines import MACHINE, head_alone, take_machines

from .test_cli import arguments, one_thread, settings
from .test_ray_workers import assert_same_bits, finish, num_rows, until, wait_for

pytestmark = pytest.mark.ray
SHORT = ("train.epochs=1",)
LIMIT = 15
"""Seconds of a stop on a busy machine; a quiet one takes fewer than five."""


@pytest.fixture(scope="module")
def head() -> Iterator[Cluster]:
    with head_alone() as cluster:
        yield cluster


@pytest.fixture
def cluster(head: Cluster) -> Iterator[Cluster]:
    """Take the nodes away that a test adds, which are processes of this machine."""
    yield head
    take_machines(head)


def start(cluster: Cluster, *args: str, command: str = "train") -> subprocess.Popen[str]:
    command = [sys.executable, "-m", f"mprd.{command}", *args, "--launcher", "ray", "--address", cluster.address]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=one_thread())


def test_the_actors_of_a_worker_run_on_its_machine(cluster: Cluster) -> None:
    own = cluster.add_node(num_cpus=4, **MACHINE).node_id
    # larger, so that it would be taken
    cluster.add_node(num_cpus=8, **MACHINE)
    ray.init(address=cluster.address, log_to_driver=False)

    # local, so that actors need not import this module
    class Place:
        """Where it runs: an actor, or a function of Ray Data."""

        def get(self) -> str:
            return ray.get_runtime_context().get_node_id()

        def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[str]]:
            return {"place": [self.get()] * len(batch["item"])}

    @ray.remote(num_cpus=1, label_selector={"ray.io/node-id": own})
    class Worker:
        def places(self) -> list[list[str]]:
            remote = ray.remote(scheduling_strategy="SPREAD", **actor_options(1))(Place)
            rows = ray.data.from_items([*range(4)]).map_batches(
                Place, batch_size=1, compute=ray.data.ActorPoolStrategy(size=1), **actor_options(1)
            )
            one, two = (remote.remote() for _ in range(2))
            return [[ray.get(actor.get.remote()) for actor in (one, two)], [row["place"] for row in rows.take_all()]]

    assert ray.get(Worker.remote().places.remote()) == [[own] * 2, [own] * 4]


def test_a_run_beside_a_full_object_store_ends_in_the_bits_of_one_process(
    cluster: Cluster, tiny_root: Path, tmp_path: Path
) -> None:
    alone, run = tmp_path / "alone", tmp_path / "run"
    launch(settings(tiny_root, *SHORT), out=alone, resume=None, launcher="local")
    machine = cluster.add_node(num_cpus=3, **MACHINE)
    ray.init(address=cluster.address, log_to_driver=False)

    @ray.remote(num_cpus=0)
    class Filler:
        """Three times what the store of its machine holds: what does not fit goes to disk and comes back."""

        def __init__(self) -> None:
            self.arrays = [ray.put(np.full(10 * 2**20, number, dtype=np.uint8)) for number in range(24)]

        def ends(self) -> tuple[int, int]:
            return int(ray.get(self.arrays[0])[0]), int(ray.get(self.arrays[-1])[-1])

    places = [{"ray.io/node-id": node.node_id} for node in (cluster.head_node, machine)]
    fillers = [Filler.options(label_selector=place).remote() for place in places]
    ray.get([filler.__ray_ready__.remote() for filler in fillers])
    actors = ("subgraphs.executor=ray", "subgraphs.num_actors=1")
    process = start(cluster, *arguments(tiny_root, run, *SHORT, *actors))
    finish(process)
    assert_same_bits(alone, run)
    assert ray.get([filler.ends.remote() for filler in fillers]) == [(0, 23)] * 2


def test_two_studies_and_a_run_on_one_cpu_all_end(cluster: Cluster, tiny_root: Path, tmp_path: Path) -> None:
    cluster.add_node(num_cpus=1, **MACHINE)
    sets = arguments(tiny_root, tmp_path / "run", *SHORT)
    processes = [start(cluster, *sets)]
    for name in ("one", "two"):
        study = ["--study", "mu_sweep", "--trials", "1", *arguments(tiny_root, tmp_path / name, *SHORT)]
        processes.append(start(cluster, *study, command="tune"))
    outputs = [process.communicate(timeout=500)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    assert "Ray: trials with 1 CPU each, 1 side by side on 1 machine of 1 CPU, 1 machine of no CPU" in outputs[1]


def take(cluster: Cluster, machine: Any) -> None:
    """Give Ray the notice that a machine will be taken in a minute."""
    accepted, why = GcsClient(address=cluster.address).drain_node(
        machine.node_id, DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, "spot", int(1000 * (time.time() + 60))
    )
    assert accepted, why


def test_what_runs_on_a_machine_that_will_be_taken_saves_and_goes_on_elsewhere(
    cluster: Cluster, tiny_root: Path, tmp_path: Path
) -> None:
    alone, run, study = tmp_path / "alone", tmp_path / "run", tmp_path / "study"
    long = ("train.epochs=40", "eval.every=40", "train.checkpoint_seconds=0")
    launch(settings(tiny_root, *long), out=alone, resume=None, launcher="local")
    machine = cluster.add_node(num_cpus=1, **MACHINE)
    process = start(cluster, *arguments(tiny_root, run, *long))
    wait_for(process, lambda: num_rows(run) > 0)
    take(cluster, machine)
    machine = cluster.add_node(num_cpus=1, **MACHINE)
    output = finish(process)
    assert output.count("will be taken); going on from the last checkpoint (1 of 3 times)") == 1
    assert_same_bits(alone, run)
    process = start(
        cluster, "--study", "mu_sweep", "--trials", "1", *arguments(tiny_root, study, *long), command="tune"
    )
    wait_for(process, lambda: any(num_rows(trial) > 0 for trial in (study / "trials").glob("*")))
    take(cluster, machine)
    cluster.add_node(num_cpus=1, **MACHINE)
    assert finish(process).count("will be taken); going on from the last checkpoint (1 of 3 times)") == 1


def test_a_machine_without_memory_is_named_and_the_run_ends_with_how_to_go_on(
    cluster: Cluster, tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_memory_usage_threshold", "0")
    cluster.add_node(num_cpus=1, **MACHINE)
    run = tmp_path / "run"
    output = start(cluster, *arguments(tiny_root, run, "train.max_restarts=1")).communicate(timeout=300)[0]
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert "ran out of memory" in line
    assert f"go on with --resume {run}" in line


def test_a_mistake_is_one_line_and_frees_its_cpu_and_a_wait_for_a_held_one_is_said_and_ends_at_sigterm(
    cluster: Cluster, tiny_root: Path, tmp_path: Path
) -> None:
    cluster.add_node(num_cpus=1, **MACHINE)
    ray.init(address=cluster.address, log_to_driver=False)
    before = {*ray.util.placement_group_table()}
    process = start(cluster, *arguments(tiny_root, tmp_path / "broken", "train.lr_new=1e30"))
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 2, output
    assert [line for line in output.splitlines() if line.startswith("error: the CNN loss is")], output
    assert "a worker was lost" not in output
    # what is reserved for workers after the end of a job stays reserved for ever
    states = [group["state"] for name, group in ray.util.placement_group_table().items() if name not in before]
    assert states == ["REMOVED"]
    held = ray.util.placement_group([{"CPU": 1}])
    assert held.wait(60)
    process = start(cluster, *arguments(tiny_root, tmp_path / "run"))
    output = until(process, "one worker: waiting for 1 logical CPUs, of 1 are 0 free")
    process.send_signal(signal.SIGTERM)
    sent = time.monotonic()
    output += process.communicate(timeout=60)[0]
    assert time.monotonic() - sent < LIMIT, output
    assert process.returncode == 130
    assert f"go on from the last checkpoint with --resume {tmp_path / 'run'}" in output
