"""Commands of README and docs run as they are written: ROOT, RUN, crops and the other names they use are made first."""

from __future__ import annotations

import glob
import re
import shlex
import shutil
from pathlib import Path

import pytest

from mprd.__main__ import app
from tests.conftest import TINY

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", DOCS / "own-data.md", *sorted((DOCS / "commands").glob("*.md"))]

SLOW = ("mprd tune --study", "mprd report runs/study-table1")
"""Minutes, and tested in tests/tune and tests/report."""

SMALL = [
    *(f"--set={setting}" for setting in TINY if not setting.startswith(("data.dataset", "train.epochs"))),
    "--set=train.epochs=1",
    "--set=backbone.name=small",
    "--set=backbone.weights=none",
    "--set=data.camera_style=none",
]
DRAWN = [
    "--set=data.synthetic.num_train_ids=6",
    "--set=data.synthetic.num_test_ids=4",
    "--set=data.synthetic.num_cameras=2",
    "--set=data.synthetic.images_per_camera=2",
]


def commands(page: Path) -> list[str]:
    """Return the commands of a page's code blocks, without what is said behind them."""
    lines = re.findall(r"^(?:    )?(mprd .+)$", page.read_text(), re.MULTILINE)
    return [re.split(r"\s{2,}#", line)[0].strip() for line in lines]


def all_commands() -> list[str]:
    return sorted({command for page in PAGES for command in commands(page) if not command.startswith(SLOW)})


def small(words: list[str]) -> list[str]:
    """Return what makes a new run small; it stays in this process."""
    if words[0] != "train":
        return []
    is_new = "--resume" not in words and "--smoke" not in words
    sizes = (SMALL if "--data" in words else [*SMALL, *DRAWN]) if is_new else []
    return [*sizes, "--launcher=local"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in an empty folder, with a doctor that neither asks the network nor measures for seconds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPRD_CACHE", "runs/cache")
    monkeypatch.setattr("mprd.doctor.plans.has_imagenet_weights", lambda _name: False)
    monkeypatch.setattr("mprd.doctor.estimate.MEASURED_SECONDS", 0.01)
    return tmp_path


def type_command(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Run a command line as a shell would, and see that it succeeds."""
    words = [word for pattern in shlex.split(command)[1:] for word in sorted(glob.glob(pattern)) or [pattern]]
    with pytest.raises(SystemExit) as stop:
        app([*words, *small(words)])
    assert not stop.value.code, (command, capfd.readouterr().err)


@pytest.mark.parametrize("command", all_commands())
def test_a_command_runs_as_it_is_written(
    command: str, place: Path, tiny_root: Path, camera_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("ROOT", "OTHER"):
        (place / name).symlink_to(tiny_root)
    for name in ("CROPS", "IMAGES", "crops"):
        (place / name).symlink_to(tiny_root / "query")
    names = ("RUN", "NEW", "runs/NAME", "runs/FIRST", "runs/SECOND", "runs/mine")
    runs = [Path(name) for name in names if name in command]
    for run in runs:
        if f"--out {run}" in command:
            continue
        if "--resume" in command:
            type_command(f"mprd train --data ROOT --out {run}", capfd)
        else:
            shutil.copytree(camera_run, run)
    for name in ("a.jpg", "b.jpg", "crop.jpg"):
        shutil.copy(min((tiny_root / "query").iterdir()), name)
    Path("mine.yaml").write_text("train: {epochs: 1}\n")
    if "--gallery features.parquet" in command:
        type_command("mprd extract runs/NAME CROPS --out features.parquet", capfd)
    type_command(command, capfd)


def test_the_tutorial_runs_from_its_first_command_to_its_last(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    found = commands(DOCS / "tutorial.md")
    assert len(found) >= 10
    for command in found:
        type_command(command, capfd)
    wanted = ("first/report.html", "first/search.html", "first/gallery.parquet", "first/backbone.torchscript")
    assert [name for name in (*wanted, "comparison.html") if not (place / "runs" / name).is_file()] == []
