"""The wheel alone, in an environment of its own, away from the checkout.

Dependencies are taken from the environment that runs the tests, through PYTHONPATH: torch and Ray take minutes and 6 GB
to install again. So these tests show that the wheel is whole (presets, studies, templates, entry point) and that it
names every package it imports, and not that pip finds versions that fit: MPRD_WHEEL_FULL=1 installs those as well.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.wheel

ROOT = Path(__file__).parent.parent
IS_FULL = os.environ.get("MPRD_WHEEL_FULL") == "1"
CONSTRAINTS = ["--constraint", str(ROOT / "constraints.txt")]
OPTIONAL = {"onnx", "onnxscript", "onnxruntime", "timm", "wandb", "mlflow", "torch_geometric"}


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy that holds what git would give a stranger."""
    folder = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / "source" / name)
    run([sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(folder / "source")], cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="session")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install the wheel into an empty environment."""
    environment = tmp_path_factory.mktemp("environment")
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    only_wheel = CONSTRAINTS if IS_FULL else ["--no-deps"]
    run([str(python), "-m", "pip", "install", "--quiet", *only_wheel, str(wheel)], cwd=environment)
    return python


def run(command: list[str], *, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def mprd(python: Path, *words: str, cwd: Path) -> str:
    """Run a command of the installed wheel; nothing of the checkout is on its path."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    if not IS_FULL:
        # a folder named here is searched as it is: the checkout's editable install, a .pth file, is not followed
        env["PYTHONPATH"] = sysconfig.get_paths()["purelib"]
    return run([str(python.with_name(words[0])), *words[1:]], cwd=cwd, env=env)


def test_the_package_is_the_installed_one_and_typed(python: Path, tmp_path: Path) -> None:
    code = "import mprd, pathlib; p = pathlib.Path(mprd.__file__).parent; print(p, (p / 'py.typed').is_file())"
    place, is_typed = mprd(python, "python", "-c", code, cwd=tmp_path).split()
    assert Path(place).is_relative_to(python.parent.parent)
    assert is_typed == "True"


def test_a_smoke_run_trains_and_its_page_is_written(python: Path, tmp_path: Path) -> None:
    mprd(python, "mprd", "train", "--smoke", "--out", "run", cwd=tmp_path)
    mprd(python, "mprd", "report", "run", "--out", "run/report.html", cwd=tmp_path)
    assert (tmp_path / "run" / "report.html").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) >= 1


def test_all_studies_and_presets_are_in_the_wheel(python: Path, tmp_path: Path) -> None:
    listed = mprd(python, "mprd", "tune", "--list", cwd=tmp_path)
    studies = [path.stem for path in (ROOT / "mprd" / "tune_configs").glob("*.yaml")]
    assert [name for name in studies if name not in listed] == []
    code = "from mprd.config.loading import *\nfor name in get_args(Preset): read_preset(name)\nread_packaged('smoke')"
    mprd(python, "python", "-c", code, cwd=tmp_path)


def test_each_imported_package_is_a_declared_dependency(wheel: Path) -> None:
    used = {
        name.split(".")[0]
        for path in (ROOT / "mprd").rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", "")])
        if isinstance(node, (ast.Import, ast.ImportFrom)) and name
    }
    owners = metadata.packages_distributions()
    wanted = {
        owner.lower()
        for name in used - set(sys.stdlib_module_names) - OPTIONAL - {"mprd"}
        for owner in owners.get(name, [name])
    }
    with zipfile.ZipFile(wheel) as file:
        text = next(file.read(name).decode() for name in file.namelist() if name.endswith("/METADATA"))
    declared = {
        re.split(r"[^A-Za-z0-9_.-]", line)[0].lower()
        for line in re.findall(r"^Requires-Dist: (.+)$", text, re.MULTILINE)
        if "extra ==" not in line
    }
    assert sorted(wanted - declared) == []
