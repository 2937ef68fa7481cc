"""A tiny data set in Market layout, and settings that train on it in a second."""

from __future__ import annotations

import os
import resource
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.engine.state import build_state
from mprd.runs.folder import RunFolder

NUM_IDS = 6

TINY = (
    "data.dataset=market1501",
    "data.height=32",
    "data.width=16",
    "data.num_workers=0",
    "train.epochs=3",
    "train.batch_size=8",
    "train.warmup_epochs=0",
    "train.checkpoint_seconds=0",
    "neighbors.k=3",
    "neighbors.k_max=6",
    "neighbors.whitening=false",
    "neighbors.source=mean",
    "gcn.batch_size=16",
    "pairs.mu=0.5",
    "pairs.limit=true",
    "meta.num_ids=2",
    "loss.r=3",
)


BY_CAMERA = ("backbone.camera_bn=true", "neighbors.whitening=true", "pairs.labeller=reciprocal", "pairs.limit=false")

NAMELESS = ("data.dataset=folder", "data.name_pattern=crop", "meta.num_ids=0")
"""Settings for images whose names have neither identity nor camera."""


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Keep packs and drawn pedestrians out of the user's cache, also those of child processes."""
    os.environ["MPRD_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Fix the order of sums, and leave the other cores to other workers."""
    torch.set_num_threads(1)


def write_crop(path: Path, pid: int, camid: int, number: int) -> None:
    """Write a crop in the identity's colors at the camera's brightness."""
    draw = np.random.default_rng([pid, camid, number])
    top, bottom = np.random.default_rng([99, pid]).uniform(40, 215, (2, 3))
    image = np.concatenate([np.tile(top, (20, 20, 1)), np.tile(bottom, (20, 20, 1))])
    image = image * (0.7 + 0.3 * camid) + draw.normal(0, 12, image.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path, quality=95)


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 6 training identities of 2 x 2 crops, and 4 others as query and gallery."""
    root = tmp_path_factory.mktemp("tiny")
    for pid in range(1, NUM_IDS + 5):
        for camid in (1, 2):
            for number in (1, 2):
                folder = "bounding_box_train" if pid <= NUM_IDS else ("query" if number == 1 else "bounding_box_test")
                write_crop(root / folder / f"{pid:04d}_c{camid}s1_{number:06d}_01.jpg", pid, camid, number)
    return root


@pytest.fixture
def nameless_root(tiny_root: Path, tmp_path: Path) -> Path:
    """Copy the training crops under names without identity and camera."""
    root = tmp_path / "crops"
    root.mkdir()
    for number, path in enumerate(sorted((tiny_root / "bounding_box_train").iterdir())):
        shutil.copy(path, root / f"crop{number:03d}.jpg")
    return root


@pytest.fixture
def tiny_config(tiny_root: Path) -> Config:
    """Return the tiny settings with the tiny data set."""
    return load_config("demo", overrides=TINY, values={"data": {"root": tiny_root}})


@pytest.fixture(scope="session")
def tiny_run(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a run folder of the tiny settings with an untrained network as both last and best checkpoint."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "untrained")
    config = load_config("demo", overrides=TINY, values={"data": {"root": tiny_root}})
    folder.create(config)
    state = build_state(config, num_images=4 * NUM_IDS, device=torch.device("cpu"))
    folder.save(state.state_dict())
    folder.save_best(state.state_dict())
    return folder.path


@pytest.fixture(scope="session")
def trained_run(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with the tiny settings for three epochs."""
    from rich.console import Console

    from mprd.train.local import run_local

    folder = RunFolder(tmp_path_factory.mktemp("runs") / "trained")
    config = load_config("demo", overrides=TINY, values={"data": {"root": tiny_root}})
    run_local(config, folder, resume=False, console=Console(quiet=True))
    return folder.path


@pytest.fixture(scope="session")
def camera_run(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with whitening and statistics of each camera for an epoch."""
    from rich.console import Console

    from mprd.train.local import run_local

    folder = RunFolder(tmp_path_factory.mktemp("runs") / "by_camera")
    config = load_config("demo", overrides=(*TINY, *BY_CAMERA, "train.epochs=1"), values={"data": {"root": tiny_root}})
    run_local(config, folder, resume=False, console=Console(quiet=True))
    return folder.path


@pytest.fixture
def refuse(capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs a command with wrong arguments, and returns the one line that it prints."""

    def run(app: Callable[[list[str]], None], *args: object) -> str:
        with pytest.raises(SystemExit) as stop:
            app([str(arg) for arg in args])
        lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith(("INFO", "WARNING"))]
        assert (stop.value.code, len(lines)) == (2, 1)
        return lines[0]

    return run


@pytest.fixture
def tiny_disk() -> Iterator[None]:
    """Limit the files of this process to 100 kB."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Escape bytes that are not UTF-8 in captured log records, which pytest-xdist could not send."""
    report = yield
    report.sections = [(name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections]
    return report
