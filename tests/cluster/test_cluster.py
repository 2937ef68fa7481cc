"""The cluster files: valid, closed, from zero; and one of them really comes up on hosts made of namespaces."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.cluster.hosts import ROOT, SHARED, Host, make_hosts

CLOUD = ROOT / "cluster.yaml"
LOCAL = ROOT / "cluster.local.yaml"


def read(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", [CLOUD, LOCAL], ids=lambda path: path.name)
def test_a_cluster_file_is_valid_by_rays_own_validation(path: Path) -> None:
    code = (
        "import sys, yaml\n"
        "from ray.autoscaler._private.util import prepare_config, validate_config\n"
        "validate_config(prepare_config(yaml.safe_load(open(sys.argv[1]))))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", [CLOUD, LOCAL], ids=lambda path: path.name)
def test_every_ray_command_of_a_cluster_asks_for_the_token(path: Path) -> None:
    config = read(path)
    commands = [*config["head_start_ray_commands"], *config["worker_start_ray_commands"]]
    assert len(commands) == 4
    assert all(re.match(r"export RAY_AUTH_MODE=token\b.*; ray (start|stop)", text) for text in commands)
    assert config["file_mounts"]["~/.ray/auth_token"] == "~/.ray/auth_token"


@pytest.mark.parametrize("path", [CLOUD, LOCAL], ids=lambda path: path.name)
def test_the_dashboard_of_a_cluster_listens_on_loopback_alone(path: Path) -> None:
    assert re.findall(r"--dashboard-host=(\S+)", path.read_text()) == ["127.0.0.1"]


@pytest.mark.parametrize("path", [CLOUD, LOCAL], ids=lambda path: path.name)
def test_what_a_cluster_copies_is_there_and_installs_itself(path: Path) -> None:
    config = read(path)
    assert all((ROOT / local).exists() for local in config["file_mounts"].values() if not local.startswith("~"))
    assert config["setup_commands"][0] == "cd ~/mprd-project && make .venv/installed-cluster"
    assert 0 < config["idle_timeout_minutes"] <= 60


def test_gpu_workers_start_from_zero_at_the_spot_price_with_a_fall_back() -> None:
    config = read(CLOUD)
    types = config["available_node_types"]
    head, spot, fallback = (types[name] for name in ("head", "gpu_spot", "gpu_on_demand"))
    assert config["head_node_type"] == "head"
    assert "GPU" not in head["resources"]
    assert [kind["min_workers"] for kind in (head, spot, fallback)] == [0, 0, 0]
    assert spot["resources"] == fallback["resources"] == {"CPU": 8, "GPU": 1}
    assert spot["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert "InstanceMarketOptions" not in fallback["node_config"]
    assert spot["priority"] > fallback["priority"]


def test_rays_own_provider_starts_the_machines_of_the_cloud_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import boto3
    from moto import mock_aws

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, "testing")
    # Ray keeps a new key pair there
    monkeypatch.setenv("HOME", str(tmp_path))
    with mock_aws():
        from ray.autoscaler._private.aws.config import bootstrap_aws
        from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
        from ray.autoscaler._private.util import prepare_config

        region = read(CLOUD)["provider"]["region"]
        ec2, iam = boto3.client("ec2", region), boto3.client("iam", region)
        group = ec2.create_security_group(GroupName="mprd", Description="mprd")["GroupId"]
        ssh = {"IpProtocol": "tcp", "FromPort": 22, "ToPort": 22, "IpRanges": [{"CidrIp": "203.0.113.7/32"}]}
        ec2.authorize_security_group_ingress(GroupId=group, IpPermissions=[ssh])
        for name in ("mprd-head", "mprd-worker"):
            iam.create_instance_profile(InstanceProfileName=name)
        image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
        text = CLOUD.read_text().replace("ami-00000000000000000", image).replace("sg-00000000000000000", group)
        config = bootstrap_aws(prepare_config(yaml.safe_load(text)))
        provider = AWSNodeProvider(config["provider"], config["cluster_name"])
        for kind in config["available_node_types"].values():
            provider.create_node(kind["node_config"], {}, 1)
        started = [each for kind in ec2.describe_instances()["Reservations"] for each in kind["Instances"]]
        (rules,) = ec2.describe_security_groups(GroupIds=[group])["SecurityGroups"]
    assert [(each["InstanceType"], each.get("InstanceLifecycle")) for each in started] == [
        ("m6i.xlarge", None),
        ("g5.2xlarge", "spot"),
        ("g5.2xlarge", None),
    ]
    assert {each["SecurityGroups"][0]["GroupId"] for each in started} == {group}
    assert [rule["IpRanges"][0]["CidrIp"] for rule in rules["IpPermissions"]] == ["203.0.113.7/32"]


TINY = (
    "backbone.name=small",
    "backbone.weights=none",
    "backbone.num_stripes=1",
    "data.height=32",
    "data.width=16",
    "data.num_workers=0",
    "data.synthetic.num_train_ids=24",
    "data.synthetic.num_test_ids=12",
    "data.synthetic.images_per_camera=2",
    "neighbors.k=4",
    "train.epochs=2",
    "train.warmup_epochs=0",
    "train.threads=1",
    "meta.num_ids=2",
)


@pytest.mark.cluster
def test_a_cluster_of_three_hosts_comes_up_trains_loses_a_node_and_goes_down(tmp_path: Path) -> None:
    before = namespaces()
    with make_hosts(tmp_path, number=3) as (desk, hosts):
        config = fill_in(tmp_path, hosts)
        desk.run("ray get-auth-token --generate", timeout=180)
        ray_up(desk, config)
        wait_for_nodes(desk, config, number=3)
        refuses_without_the_token(desk, config, hosts[0])

        with watch_workers(hosts) as used:
            out = f"{SHARED}/runs/one"
            sets = " ".join(f"--set {text}" for text in TINY)
            submit(desk, config, f"python -m mprd.train --launcher ray --num-workers 2 --out {out} {sets}")
        assert len(used) == 2
        rows = (tmp_path / "shared" / "runs" / "one" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["epoch"] for row in rows] == [0, 1]

        # each host has its own /tmp
        own = f"python -m mprd.train --launcher ray --num-workers 2 --out /tmp/own {sets}"
        with pytest.raises(AssertionError, match=r"error: /tmp/own: machine mprd\d+-h\d has no such folder"):
            submit(desk, config, own)

        assert look_from_all(hosts[0]) == str([("here", "offline")] * 3)

        lost = study_that_loses_a_node(desk, config, hosts)
        assert lost in hosts[1:]
        states = read_states(tmp_path / "shared" / "runs" / "study")
        assert states == ["finished", "finished"]

        desk.run(f"ray down -y {config}", timeout=300)
        stop_what_ray_down_leaves(desk, hosts)
        assert {host.name: host.ray_processes() for host in hosts} == {host.name: {} for host in hosts}
    assert namespaces() == before
    assert not mentions(tmp_path)


def fill_in(folder: Path, hosts: list[Host]) -> Path:
    """Write the local file with these hosts, one logical CPU each, and nothing else changed."""
    config = read(LOCAL)
    head, *workers = (host.address for host in hosts)
    config["cluster_name"] = "test"
    config["provider"] |= {"head_ip": head, "worker_ips": workers}
    config["auth"] = {"ssh_user": "root", "ssh_private_key": "~/.ssh/id_ed25519"}
    small = " --num-cpus=1 --object-store-memory=100000000"
    for name in ("head_start_ray_commands", "worker_start_ray_commands"):
        config[name][-1] += small
    path = folder / "shared" / "cluster.yaml"
    path.write_text(yaml.safe_dump(config))
    return SHARED / path.name


def ray_up(desk: Host, config: Path) -> None:
    """Bring the cluster up."""
    desk.run(f"ray up -y --no-config-cache {config}", timeout=300)


def ray_exec(desk: Host, config: Path, command: str, *, timeout: float) -> str:
    """Run a command on the head."""
    return desk.run(f"ray exec --no-config-cache {config} {json.dumps(command)}", timeout=timeout)


def wait_for_nodes(desk: Host, config: Path, *, number: int, seconds: float = 300) -> None:
    """Wait until so many nodes are active by `ray status` on the head."""
    deadline = time.monotonic() + seconds
    while True:
        status = ray_exec(desk, config, "ray status", timeout=180)
        active = status.partition("Active:")[2].partition("Pending:")[0]
        if sum(int(count) for count in re.findall(r"^ *(\d+) \S+", active, re.MULTILINE)) == number:
            return
        assert time.monotonic() < deadline, status
        time.sleep(3)


def refuses_without_the_token(desk: Host, config: Path, head: Host) -> None:
    """See that the dashboard turns away who has no token, and is not to be reached from another host."""
    url = "http://127.0.0.1:8265/api/jobs/"
    answer = head.run(f"curl -s -o /dev/null -w '%{{http_code}}' {url}", timeout=20)
    assert answer == "401"
    with pytest.raises(AssertionError):
        desk.run(f"curl -s -m 5 {url.replace('127.0.0.1', head.address)}", timeout=20)


def submit(desk: Host, config: Path, command: str) -> str:
    """Run a command as a job and wait for its end; it must succeed."""
    job = f"ray job submit --address http://127.0.0.1:8265 -- {command}"
    return ray_exec(desk, config, job, timeout=420)


@contextmanager
def watch_workers(hosts: list[Host]) -> Iterator[set[str]]:
    """Collect the names of the hosts on which workers of Ray Train are seen."""
    used: set[str] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.wait(0.3):
            used.update(host.name for host in hosts if is_training(host))

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield used
    finally:
        ended.set()
        thread.join()


def is_training(host: Host) -> bool:
    """Say whether a worker of Ray Train runs on a host."""
    return any("ray::" in line and "TrainWorker" in line for line in host.ray_processes().values())


def study_that_loses_a_node(desk: Host, config: Path, hosts: list[Host]) -> Host:
    """Run a study, kill Ray on the first host but the head that works for it, and see it end; return that host."""
    lost: list[Host] = []

    def lose() -> None:
        for _ in range(1200):
            working = [host for host in hosts[1:] if is_working(host)]
            if working:
                working[0].lose_ray()
                lost.append(working[0])
                return
            time.sleep(0.2)

    thread = threading.Thread(target=lose)
    thread.start()
    try:
        submit(desk, config, f"python -m mprd.tune --study mu_sweep --smoke --trials 2 --out {SHARED}/runs/study")
    finally:
        thread.join()
    return lost[0]


def is_working(host: Host) -> bool:
    """Say whether a trial runs on a host."""
    words = ("ImplicitFunc", "run_trial")
    return any("ray::" in line and any(word in line for word in words) for line in host.ray_processes().values())


def look_from_all(head: Host) -> str:
    """Change a line of the code on the head; return it, and a variable of the head's, as every host sees them."""
    code = (
        "import ray\n"
        "from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy as At\n"
        "from mprd.parallel.cluster import cluster, find_address\n"
        "def look():\n"
        "    import mprd.lazy, os\n"
        "    return mprd.lazy.CHANGED, os.environ['WANDB_MODE']\n"
        "with cluster(find_address('auto'), num_cpus=1):\n"
        "    places = [At(node['NodeID'], soft=False) for node in ray.nodes()]\n"
        "    print(ray.get([ray.remote(look).options(scheduling_strategy=place).remote() for place in places]))\n"
    )
    change = "cd ~/mprd-project && echo \"CHANGED = 'here'\" >> mprd/lazy.py"
    return head.run(f"{change} && WANDB_MODE=offline python -c {shlex.quote(code)}", timeout=180).splitlines()[-1]


def read_states(study: Path) -> list[str]:
    """Return how the trials of a study ended."""
    from mprd.tune.folder import StudyFolder

    return [trial.state for trial in StudyFolder(study).read_trials()]


def stop_what_ray_down_leaves(desk: Host, hosts: list[Host]) -> None:
    """Do what docs/cluster.md says follows `ray down` on machines of one's own."""
    for host in hosts:
        options = "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null -o LogLevel=ERROR"
        desk.run(f"ssh {options} {host.address} mprd-project/.venv/bin/ray stop", timeout=180)


def namespaces() -> set[str]:
    """Return the names of this machine's network namespaces that a test of this process made."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    return {line.split()[0] for line in listed.splitlines()}


def mentions(folder: Path) -> list[str]:
    """Return the command lines of this machine's processes that name a folder."""
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return [line for line in lines if str(folder) in line]
