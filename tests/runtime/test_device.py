"""CPU threads, memory limits, and the choice of the device."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mprd.errors import UserError
from mprd.runtime import device, machine
from mprd.runtime.device import choose_device, keep_freed_memory, more_threads, set_threads
from mprd.runtime.machine import memory_bytes, num_cores


@pytest.fixture
def restored_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    threads = torch.get_num_threads()
    monkeypatch.setattr(device, "max_threads", device.max_threads)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("threads", "limit", "num_idle", "expected"),
    [(1, None, 2, 3), (1, None, 9, 4), (1, 2, 9, 2), (2, 1, 9, 2), (1, None, 0, 1), (3, None, 1, 4)],
)
@pytest.mark.usefixtures("restored_threads")
def test_cores_of_idle_processes_are_added_up_to_the_limit(
    threads: int, limit: int | None, num_idle: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "num_cores", lambda: 4)
    set_threads(threads, limit)
    with more_threads(num_idle):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == threads


@pytest.mark.usefixtures("restored_threads")
def test_torch_uses_no_more_threads_than_a_container_has_cores_unless_configured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.set_num_threads(5)
    # joblib applies it like a container's limit
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert num_cores() == 1
    set_threads(0)
    assert torch.get_num_threads() == 1
    set_threads(3)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("limits", "expected"), [({}, None), ({"v2": "max"}, None), ({"v2": "4096\n"}, 4096), ({"v1": f"{2**63}"}, None)]
)
def test_memory_is_that_of_the_machine_or_the_limit_of_its_container(
    limits: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in limits.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(machine, "MEMORY_LIMITS", (tmp_path / "v2", tmp_path / "v1"))
    whole = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_bytes() == (expected or whole)


@pytest.mark.parametrize("variable", [None, "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_glibc_is_tuned_unless_the_environment_does(variable: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[int, int] = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=calls.__setitem__))
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    keep_freed_memory()
    assert calls == ({} if variable else {-3: 2**25, -1: 2**30})
    # another C library
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    keep_freed_memory()


@pytest.mark.parametrize(
    ("given", "expected"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "None")]
)
def test_waiting_threads_spin_briefly_unless_the_environment_sets_it(given: dict[str, str], expected: str) -> None:
    environment = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ} | given
    # OpenMP reads the variable when torch is loaded
    code = "import mprd, os, sys; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split() == [expected, "False"]


@pytest.mark.parametrize("name", ["tpu", "cuda:99", "cuda:999", "cuda:", "mps", "meta", "cpu:1"])
def test_a_device_that_does_not_exist_or_is_not_supported_is_refused(name: str) -> None:
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(UserError, match=rf"train\.device.*{name}"):
        choose_device(name)
