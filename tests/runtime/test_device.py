from __future__ import annotations

import ctypes
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mprd.backbone.features import extract
from mprd.backbone.network import build_backbone
from mprd.config.schema import Config
from mprd.data.cache import Packs
from mprd.data.datasets import load_dataset
from mprd.data.images import PlainImages
from mprd.runtime import device
from mprd.runtime.device import MALLOPT, keep_freed_memory, memory_bytes, more_threads, num_cores, set_threads


@pytest.fixture
def other_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave this process's threads as they were."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(device, "max_threads", device.max_threads)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def four_cores(other_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pretend that there are four cores."""
    monkeypatch.setattr(device, "num_cores", lambda: 4)


@pytest.mark.parametrize(
    ("threads", "most", "num_idle", "expected"),
    [(1, None, 2, 3), (1, None, 9, 4), (1, 2, 9, 2), (2, 1, 9, 2), (1, None, 0, 1), (3, None, 1, 4)],
)
def test_cores_of_idle_processes_are_taken_and_given_back(
    four_cores: None, threads: int, most: int | None, num_idle: int, expected: int
) -> None:
    set_threads(threads, most)
    with more_threads(num_idle):
        assert torch.get_num_threads() == expected
    assert torch.get_num_threads() == threads
    with pytest.raises(ZeroDivisionError), more_threads(num_idle):
        raise ZeroDivisionError
    assert torch.get_num_threads() == threads


def test_torch_takes_no_more_threads_than_there_are_cores_unless_told(
    other_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.set_num_threads(5)
    # as a container's limit does
    monkeypatch.setenv("LOKY_MAX_CPU_COUNT", "1")
    assert num_cores() == 1
    set_threads(0)
    assert torch.get_num_threads() == 1
    set_threads(3)
    assert torch.get_num_threads() == 3
    monkeypatch.setattr(device, "num_cores", lambda: 4)
    set_threads(0)
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize(
    ("said", "expected"), [({}, None), ({"v2": "max\n"}, None), ({"v2": "4096\n"}, 4096), ({"v1": f"{2**63}\n"}, None)]
)
def test_a_container_has_the_memory_that_it_is_given(
    said: dict[str, str], expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in said.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(device, "MEMORY_LIMITS", (tmp_path / "v2", tmp_path / "v1"))
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert memory_bytes() == (expected or machine)


@pytest.mark.parametrize("variable", [None, "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"])
def test_glibc_is_told_to_keep_freed_memory_unless_the_environment_says_how(
    variable: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[int, int] = {}
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=told.__setitem__))
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    if variable is not None:
        monkeypatch.setenv(variable, "1")
    keep_freed_memory()
    assert told == ({} if variable else {-3: 2**25, -1: 2**30})
    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace())
    keep_freed_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_glibc_takes_what_it_is_told() -> None:
    # in a process of its own, or the rest of the tests would run under it
    code = f"import ctypes; print(*(ctypes.CDLL(None).mallopt(*pair) for pair in {list(MALLOPT.items())}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "1"]


def test_extraction_takes_the_loaders_cores_where_the_loader_has_nothing_to_do(
    tiny_config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []

    @contextmanager
    def watched(num_idle: int) -> Iterator[None]:
        taken.append(num_idle)
        yield

    monkeypatch.setattr("mprd.backbone.features.more_threads", watched)
    dataset = load_dataset(tiny_config.data, cache_dir=tmp_path)
    packed = PlainImages(dataset.train, tiny_config.data, packs=Packs(tmp_path, mode="auto"))
    unpacked = PlainImages(dataset.train, tiny_config.data)
    backbone = build_backbone(tiny_config.backbone)
    for images, mode in ((packed, "eval"), (unpacked, "eval"), (packed, "train")):
        extract(backbone, images, batch_size=8, num_workers=3, device=torch.device("cpu"), mode=mode)
    # the statistics of a batch are sums whose last bit depends on the number of threads
    assert taken == [3, 0, 0]


@pytest.mark.parametrize(
    ("given", "expected"), [({}, 1000), ({"GOMP_SPINCOUNT": "7"}, 7), ({"OMP_WAIT_POLICY": "passive"}, 0)]
)
def test_threads_that_wait_soon_sleep_unless_the_environment_says_how(given: dict[str, str], expected: int) -> None:
    usual = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    # what GNU OpenMP itself says that it goes by
    settings = usual | {"OMP_DISPLAY_ENV": "verbose"} | given
    code = [sys.executable, "-c", "import mprd.runtime.device"]
    said = subprocess.run(code, capture_output=True, text=True, check=True, env=settings).stderr
    if "GOMP" not in said:
        pytest.skip("torch comes with another OpenMP")
    assert f"GOMP_SPINCOUNT = '{expected}'" in said
