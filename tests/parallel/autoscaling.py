"""A cluster that grows from nothing: a head without CPUs, and an autoscaler whose machines are processes here."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
HEAD = "ray.head.default"
"""The name that the provider gives it."""
PORT = 6379
"""The one that the provider's machines join."""
STORE = {"object_store_memory": 80 * 2**20}
UNUSED = ("auth", "file_mounts", "cluster_synced_files", "initialization_commands", "setup_commands")
UNUSED += ("head_setup_commands", "worker_setup_commands", "head_start_ray_commands", "worker_start_ray_commands")


def write_config(file: Path, machines: dict[str, tuple[dict[str, int], int]], head: str) -> None:
    """Write an autoscaler's configuration with types of machines: their resources, and how many there may be."""
    types: dict[str, Any] = {HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}}
    for name, (resources, most) in machines.items():
        types[name] = {"resources": {**resources, **STORE}, "node_config": {}, "min_workers": 0, "max_workers": most}
    provider = {"type": "external", "module": PROVIDER, "launch_multiple": True, "head_node_id": head}
    config = {"cluster_name": "test", "max_workers": 8, "upscaling_speed": 1.0, "idle_timeout_minutes": 5}
    config |= {"provider": provider, "available_node_types": types, "head_node_type": HEAD}
    config |= {name: {} if name in ("auth", "file_mounts") else [] for name in UNUSED}
    file.write_text(json.dumps(config))


@contextmanager
def growing_cluster(folder: Path, **machines: tuple[dict[str, int], int]) -> Iterator[str]:
    """Start the cluster, yield its address, and end all of its processes."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID

    write_config(folder / "autoscaler.json", machines, FAKE_HEAD_NODE_ID)
    environment = {
        **{name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"},
        "RAY_AUTH_MODE": "disabled",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block", f"--port={PORT}"]
    command += [f"--temp-dir={folder}/ray", "--num-cpus=0", "--include-dashboard=false"]
    command += ["--object-store-memory=80000000", f"--autoscaling-config={folder}/autoscaler.json"]
    with (folder / "head.log").open("w") as log:
        head = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        ready = subprocess.run([sys.executable, "-c", READY, f"127.0.0.1:{PORT}"], env=environment, capture_output=True)
        assert ready.returncode == 0, (folder / "head.log").read_text()
        yield f"127.0.0.1:{PORT}"
    finally:
        head.terminate()
        for process in Path("/proc").iterdir():
            if process.name.isdigit() and int(process.name) != os.getpid() and runs_below(process, folder):
                os.kill(int(process.name), signal.SIGKILL)
        head.wait()


READY = """
import sys, time
from ray.autoscaler.v2.sdk import get_cluster_status
until = time.monotonic() + 200
while time.monotonic() < until:
    try:
        if get_cluster_status(sys.argv[1]).stats.autoscaler_version not in (None, "0"):
            sys.exit()
    except Exception:  # of many types, while the head starts
        pass
    time.sleep(1)
sys.exit(1)
"""
"""Wait until the autoscaler has reported itself; in a process of its own, as Ray keeps its token for good."""


def runs_below(process: Path, folder: Path) -> bool:
    """Return whether a process has the cluster's folder in its command."""
    try:
        return f"{folder}/ray".encode() in (process / "cmdline").read_bytes()
    except OSError:
        return False
