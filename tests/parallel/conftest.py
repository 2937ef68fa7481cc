from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

NUM_CPUS = 3


@pytest.fixture(scope="package")
def ray_of_three_cpus() -> Iterator[None]:
    ray = pytest.importorskip("ray")
    ray.init(address="local", num_cpus=NUM_CPUS, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def cluster(ray_of_three_cpus: None) -> None:
    """Wait until earlier actors have released all CPUs."""
    wait_for_cpus()


def wait_for_cpus() -> None:
    import ray

    wait_for(lambda: ray.available_resources().get("CPU") == NUM_CPUS)


def wait_for(is_true: Callable[[], bool], seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < until, "waited in vain"
        threading.Event().wait(0.2)
