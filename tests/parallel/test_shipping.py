"""What goes along to the machines of a cluster, and the line about versions that differ there."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mprd
from mprd.parallel.shipping import other_versions, own_versions, shipped


def test_the_package_and_a_few_variables_go_along_but_no_keys_of_storage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracker:5000")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://storage:9000")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "stays")
    found = shipped()
    assert found["py_modules"] == [str(Path(mprd.__file__).parent)]
    assert found["env_vars"]["WANDB_API_KEY"] == "secret"
    assert found["env_vars"]["MLFLOW_TRACKING_URI"] == "http://tracker:5000"
    assert found["env_vars"]["AWS_ENDPOINT_URL"] == "http://storage:9000"
    assert "AWS_SECRET_ACCESS_KEY" not in found["env_vars"]


def test_versions_that_differ_are_named_in_one_line() -> None:
    here = own_versions()
    assert other_versions(here) is None
    line = other_versions({**here, "torch": "1.0", "Python": "3.9.1"})
    assert line == (
        f"{platform.node()} has Python {here['Python']}, not 3.9.1 and torch {here['torch']}, not 1.0, as the starting "
        "machine has"
    )


LOOK = """
import ray, sys
from mprd.parallel.cluster import cluster, find_address

def look():
    import mprd.lazy, os
    return mprd.lazy.CHANGED, os.environ["WANDB_MODE"]

with cluster(find_address(sys.argv[1]), num_cpus=1):
    print(ray.get(ray.remote(look).remote()))
"""
"""Look from a worker at a line that the code of the starting process has, and at a variable of it."""


@pytest.mark.ray
def test_a_line_that_changed_where_a_run_starts_is_changed_on_the_workers(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    for copy in ("mprd", "stale/mprd"):
        shutil.copytree(Path(mprd.__file__).parent, tmp_path / copy)
    with (tmp_path / "mprd" / "lazy.py").open("a") as file:
        file.write("CHANGED = 'here'\n")
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        changed = {"PYTHONPATH": str(tmp_path), "PYTHONSAFEPATH": "1"}
        environment = {**os.environ, **changed, "WANDB_MODE": "offline"}
        command = [sys.executable, "-c", LOOK, nodes.address]
        done = subprocess.run(
            command, cwd=tmp_path / "stale", env=environment, capture_output=True, text=True, timeout=120
        )
    finally:
        nodes.shutdown()
    assert done.stdout.splitlines() == ["('here', 'offline')"], done.stderr
