"""What fits is counted by machines, a cluster that lacks it says what would help, and waits are said and end."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from mprd.errors import UserError

pytest.importorskip("ray")
from mprd.parallel import resources
from mprd.parallel.resources import Waiting, choose_bundle, count_fits, describe_machines

GPU_BOX = {"CPU": 8.0, "GPU": 4.0, "accelerator_type:A10G": 1.0}


def have(monkeypatch: pytest.MonkeyPatch, *machines: dict[str, float]) -> None:
    """Put these machines into the place of a cluster without autoscaler."""
    records = [{"NodeID": str(n), "Alive": True, "Resources": has} for n, has in enumerate(machines)]
    monkeypatch.setattr(resources.ray, "nodes", lambda: [*records, {"Alive": False, "Resources": {"CPU": 99.0}}])
    monkeypatch.setattr(resources, "has_autoscaler", lambda: False)


def choose(device: str, **options: Any) -> dict[str, float]:
    return choose_bundle(device, **{"num_cpus": 1, "what": "a trial", "remedy": "change it", **options})


@pytest.mark.parametrize(
    ("bundle", "fits"),
    [
        ({"CPU": 1}, 3 + 3 + 8),
        # two machines of three CPUs hold one each, though all have six
        ({"CPU": 2}, 1 + 1 + 4),
        ({"CPU": 1, "GPU": 2}, 2),
        ({"CPU": 1, "GPU": 3}, 1),
        ({"CPU": 1, "GPU": 8}, 0),
        # 0.9 / 0.3 is 2.9999999999999996
        ({"CPU": 0.1, "GPU": 0.3}, 13),
        ({"CPU": 1, "GPU": 0.25}, 8),
    ],
)
def test_what_fits_is_counted_by_machines(bundle: dict[str, float], fits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, {"CPU": 3.0}, {"CPU": 3.0}, GPU_BOX, {})
    assert count_fits(bundle) == fits
    assert describe_machines() == "1 machine of 8 CPUs and 4 GPUs (A10G), 2 machines of 3 CPUs, 1 machine of no CPU"


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, {"CPU": 3.0}, GPU_BOX)
    assert choose("auto", num_cpus=3) == choose("cuda", num_cpus=3) == {"CPU": 3, "GPU": 1}
    assert choose("auto", num_gpus=0.5) == {"CPU": 1, "GPU": 0.5}
    assert choose("cpu") == choose("auto", num_gpus=0) == {"CPU": 1}
    have(monkeypatch, {"CPU": 3.0})
    assert choose("auto") == {"CPU": 1}


@pytest.mark.parametrize(
    ("device", "options", "message"),
    [
        ("cuda:1", {}, r"train\.device: Ray chooses each worker's GPU, so give cuda and not cuda:1"),
        ("cuda", {"num_gpus": 0}, "train.device=cuda and 0 GPUs contradict each other"),
        ("cpu", {"num_gpus": 0.5}, "train.device=cpu and 0.5 GPUs contradict each other"),
        (
            "cpu",
            {"num_cpus": 9},
            "a trial needs 9 CPUs, but Ray has room for 0, on 1 machine of 8 CPUs and 4 GPUs .*",
        ),
        (
            "auto",
            {"count": 5},
            "a trial needs 1 CPU and 1 GPU each, but Ray has room for 4, .* change it",
        ),
        ("auto", {"num_gpus": 5}, "a trial needs 1 CPU and 5 GPUs, but Ray has room for 0"),
    ],
)
def test_what_no_machine_has_is_refused(
    device: str, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, {"CPU": 3.0}, GPU_BOX)
    with pytest.raises(UserError, match=message):
        choose(device, **options)


def test_a_wait_is_said_with_what_is_missing_and_ends(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mprd")
    clock = SimpleNamespace(now=0.0)
    demands = SimpleNamespace(placement_group_demand=[1], ray_task_actor_demand=[])
    launch = SimpleNamespace(ray_node_type_name="gpu_spot", count=2)
    status = SimpleNamespace(resource_demands=demands, pending_launches=[launch], pending_nodes=[])
    monkeypatch.setattr(resources, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(resources, "get_cluster_status", lambda _address: status)
    monkeypatch.setattr(resources.ray, "get_runtime_context", lambda: SimpleNamespace(gcs_address=""))
    monkeypatch.setattr(resources.ray, "available_resources", lambda: {"CPU": 1.0})
    monkeypatch.setattr(resources.ray, "cluster_resources", lambda: {"CPU": 4.0, "GPU": 1.0})
    waiting = Waiting("2 workers", {"CPU": 1, "GPU": 1}, 2)
    for clock.now in (5.0, 10.0, 15.0, 21.0):
        waiting.check()
    missing = "2 logical CPUs, of 4 are 1 free, 2 logical GPUs, of 1 are 0 free, 2 gpu_spot starting"
    assert [record.getMessage() for record in caplog.records] == [
        f"2 workers: waiting for {missing} ({seconds} s)" for seconds in (10, 21)
    ]
    clock.now = 1801.0
    with pytest.raises(UserError, match="2 workers: waited 1800 s for 2 logical CPUs"):
        waiting.check()
