"""A cluster of Ray whose machines are processes of this one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster

from mprd.parallel.cluster import QUIET

MACHINE: dict[str, Any] = {"include_dashboard": False, "object_store_memory": 80 * 2**20}


@contextmanager
def head_alone() -> Iterator[Cluster]:
    """Start a head without CPUs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        for name, value in QUIET.items():
            patch.setenv(name, value)
        # by default nothing is spilled to a disk that is 95 % full, however much is free
        patch.setenv("RAY_local_fs_capacity_threshold", "1")
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **MACHINE})
        yield cluster
        cluster.shutdown()


def take_machines(cluster: Cluster) -> None:
    """Take away what a test has added to the head."""
    ray.shutdown()
    for node in [*cluster.worker_nodes]:
        cluster.remove_node(node)
