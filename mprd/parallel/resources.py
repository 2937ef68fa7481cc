"""CPUs and GPUs of a Ray cluster: what its machines have, what an autoscaler brings, and the wait for it."""

from __future__ import annotations

import logging
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import ray
from ray.autoscaler.v2.sdk import get_cluster_status
from ray.util.placement_group import placement_group, remove_placement_group

from mprd.errors import UserError
from mprd.runtime.machine import CpuThreads, num_cores

if TYPE_CHECKING:
    from mprd.config.schema import Config

logger = logging.getLogger("mprd")

SAY_SECONDS = 10
"""Interval of the lines about a wait."""
ASK_SECONDS = 20
"""Limit for an autoscaler to start a machine, once it is asked for."""
WAIT_SECONDS = 1800
"""Longest wait for resources that others hold, or that an autoscaler brings."""
UNIT = 10_000
"""Least shares of a resource that Ray counts."""
Bundle = dict[str, float]
"""Logical resources that are taken of one machine: `CPU`, `GPU`."""


def list_machines() -> list[dict[str, Any]]:
    """Return Ray's record of each machine that is up."""
    return [node for node in ray.nodes() if node["Alive"]]


def count_on(machine: dict[str, Any], bundle: Bundle) -> int:
    """Count how many bundles fit on a machine, whatever others hold there."""
    # in Ray's own unit, as 0.3 / 0.1 is below 3
    return min(
        round(UNIT * machine["Resources"].get(name, 0)) // max(1, round(UNIT * need)) for name, need in bundle.items()
    )


def count_fits(bundle: Bundle) -> int:
    """Count how many bundles fit side by side into the cluster as it is, whatever others hold."""
    return sum(count_on(machine, bundle) for machine in list_machines())


def count_here(bundle: Bundle) -> int:
    """Count how many bundles fit on the machine of this process, of which one is its own."""
    here = ray.get_runtime_context().get_node_id()
    return max([1, *(count_on(machine, bundle) for machine in list_machines() if machine["NodeID"] == here)])


def choose_threads(config: Config, bundle: Bundle, *, most: int) -> CpuThreads:
    """Return the threads of this process, which holds one of at most `most` bundles: its share of this machine."""
    from joblib import cpu_count

    count = min(count_here(bundle), most)
    # Ray sets OMP_NUM_THREADS, by which torch counts, to the logical CPUs
    threads = config.train.threads or max(1, cpu_count(only_physical_cores=True) // count)
    return CpuThreads(threads, max(threads, num_cores() // count))


def cluster_status() -> Any:
    """Return what Ray's autoscaler, or Ray in its place, says of machines and demands."""
    return get_cluster_status(ray.get_runtime_context().gcs_address)


def has_autoscaler() -> bool:
    """Return whether an autoscaler may add machines; version 1 does not report itself."""
    return cluster_status().stats.autoscaler_version not in (None, "0")


def has_room(bundle: Bundle, count: int = 1) -> bool:
    """Return whether so many bundles fit side by side, or an autoscaler that is asked for them starts a machine."""
    if count_fits(bundle) >= count:
        return True
    if not has_autoscaler():
        return False
    group = placement_group([bundle] * count)
    try:
        for _ in range(ASK_SECONDS):
            if group.wait(1):
                return True
            if starting := list_starting():
                logger.info("no machine has %s: the autoscaler starts %s", name_bundle(bundle), ", ".join(starting))
                return True
        return False
    finally:
        remove_placement_group(group)


def list_starting() -> list[str]:
    """Return the types of machines that the autoscaler is starting, with their numbers."""
    status = cluster_status()
    count = Counter({launch.ray_node_type_name: launch.count for launch in status.pending_launches})
    count.update(node.ray_node_type_name for node in status.pending_nodes)
    return [f"{number} {name}" for name, number in count.items()]


def choose_bundle(
    device: str, *, num_cpus: int, num_gpus: float | None = None, count: int = 1, what: str, remedy: str
) -> Bundle:
    """Return what each of `count` workers or trials takes of one machine.

    `auto` takes a GPU where the cluster has one, or has an autoscaler that starts one.

    Args:
        device: `train.device`.
        num_gpus: of each, instead of one.
        what: what needs it, for the message.
        remedy: what helps, for the message.

    Raises UserError where the machines have too little and no autoscaler starts more: Ray would wait for ever.
    """
    if device.startswith("cuda:"):
        raise UserError(
            f"train.device: Ray chooses each worker's GPU, so give cuda and not {device} (CUDA_VISIBLE_DEVICES limits "
            "the choice)"
        )
    if (device == "cuda" and num_gpus == 0) or (device == "cpu" and num_gpus):
        raise UserError(f"train.device={device} and {num_gpus:g} GPUs contradict each other: change one of them")
    plain: Bundle = {"CPU": num_cpus}
    wanted = plain if device == "cpu" or num_gpus == 0 else {**plain, "GPU": num_gpus or 1}
    if has_room(wanted, count):
        return wanted
    has_gpus = any(machine["Resources"].get("GPU", 0) for machine in list_machines())
    if device == "auto" and not num_gpus and not has_gpus and has_room(plain, count):
        return plain
    raise UserError(
        f"{what} needs {name_bundle(wanted)}{' each' if count > 1 else ''}, but Ray has room for {count_fits(wanted)}, "
        f"on {describe_machines()}: {remedy}, or start Ray with more"
    )


def name_bundle(bundle: Bundle) -> str:
    """Return resources in words."""
    return " and ".join(f"{need:g} {name}{'s' if need > 1 else ''}" for name, need in bundle.items() if need)


def describe_machines() -> str:
    """Return the number of machines of each kind: CPUs, GPUs and their type; the largest first."""
    kinds: Counter[str] = Counter()
    # Ray lists them in no order
    for machine in sorted(list_machines(), key=lambda node: [-node["Resources"].get(n, 0) for n in ("GPU", "CPU")]):
        has = {name: machine["Resources"].get(name, 0) for name in ("CPU", "GPU")}
        types = [name.partition(":")[2] for name in machine["Resources"] if name.startswith("accelerator_type:")]
        kinds[f"{name_bundle(has) or 'no CPU'}{''.join(f' ({kind})' for kind in types)}"] += 1
    return ", ".join(f"{number} machine{'s' if number > 1 else ''} of {kind}" for kind, number in kinds.items())


class Waiting:
    """Say every ten seconds what a wait for CPUs and GPUs lacks, and end it at last."""

    def __init__(self, what: str, bundle: Bundle, count: int = 1) -> None:
        """Start now; `what` needs `count` bundles."""
        self.what, self.needs = what, {name: need * count for name, need in bundle.items() if need}
        self.restart()

    def restart(self) -> None:
        """Count from now on."""
        self.started = self.said = time.monotonic()

    def check(self) -> None:
        """Log a line where one is due; raise UserError after WAIT_SECONDS."""
        if time.monotonic() - self.started > WAIT_SECONDS:
            raise UserError(f"{self.what}: waited {WAIT_SECONDS} s for {self.shortage()}; free them, or ask for fewer")
        self.say()

    def say(self) -> None:
        """Log a line where one is due."""
        now = time.monotonic()
        if now - self.said >= SAY_SECONDS:
            self.said = now
            logger.info("%s: waiting for %s (%.0f s)", self.what, self.shortage(), now - self.started)

    def shortage(self) -> str:
        """Return what is needed, what of it is free, and what is starting: machines, or processes alone."""
        free, total = ray.available_resources(), ray.cluster_resources()
        demands = cluster_status().resource_demands
        if not demands.placement_group_demand and not demands.ray_task_actor_demand:
            return "processes to start, all CPUs and GPUs that they need are there"
        lacks = [
            f"{need:g} logical {name}s, of {total.get(name, 0):g} are {free.get(name, 0):g} free"
            for name, need in self.needs.items()
        ]
        return ", ".join([*lacks, *(f"{machine} starting" for machine in list_starting())])

    @contextmanager
    def said_aside(self) -> Iterator[None]:
        """Log from another thread while the block waits."""
        is_over = threading.Event()

        def say() -> None:
            while not is_over.wait(1):
                self.say()

        threading.Thread(target=say, daemon=True).start()
        try:
            yield
        finally:
            is_over.set()
