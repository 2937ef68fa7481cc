"""The Ray cluster of a run: joining or starting one, and the resources it has or may get."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from mprd.errors import UserError

QUIET = {
    # seconds within which the end of a worker is noticed
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # machines that an autoscaler brings take minutes to start and more to install
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800",
    # keep the meaning of relative paths
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""Environment of Ray processes, where nothing else is set."""


@contextmanager
def cluster(address: str, *, num_cpus: int) -> Iterator[None]:
    """Join the Ray cluster at this address while the block runs; `local` starts one with so many logical CPUs.

    Raises UserError where no cluster answers.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, "num_cpus": num_cpus}
    check_address(address)
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        # the error is the same where a cluster refuses for want of a token
        hint = "" if os.environ.get("RAY_AUTH_MODE") else "; one with a token wants RAY_AUTH_MODE=token here as well"
        raise UserError(f"--address {address}: no Ray cluster answers there ({reason}){hint}") from None
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Raise UserError for an address at which nothing listens: Ray would retry for minutes, then end the process."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"--address {address}: nothing listens there ({error.strerror or error})") from None


def find_resources() -> dict[str, float]:
    """Return the resources that the cluster has, or that its autoscaler may add on request."""
    from ray._private.state import state

    # what Ray Train itself reads; None without an autoscaler
    most = state.get_max_resources_from_cluster_config() or {}
    here = ray.cluster_resources()
    return {name: max(here.get(name, 0), most.get(name, 0)) for name in {*here, *most}}
