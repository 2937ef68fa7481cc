"""The structure: folders import one way, each heavy dependency has few doors, and `--help` answers at once."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mprd
from mprd.__main__ import COMMANDS

PACKAGE = Path(mprd.__file__).parent

# a folder or file imports only what stands before it
ORDER = [
    *("errors", "lazy", "storage", "text", "losses", "memory"),
    *("config", "runtime", "cli"),
    *("data", "neighbors", "subgraphs", "feature_file"),
    *("backbone", "gcn", "metrics", "parallel", "runs"),
    *("pairs", "model"),
    *("engine", "export", "extract"),
    "adapt",
    "evaluate",
    *("train", "doctor", "search"),
    "tune",
    "report",
    "__main__",
]

DOORS = {
    "ray": {
        *("parallel/cluster", "parallel/ray_actors", "parallel/ray_subgraphs"),
        "parallel/resources",
        *("train/mailbox", "train/notice", "train/ray_workers", "tune/ray_trials"),
    },
    "optuna": {"tune/optuna_backend"},
    "faiss": {"neighbors/approximate"},
    "torch_geometric": {"gcn/reference"},
    "timm": {"backbone/from_timm"},
    "onnxruntime": {"export/formats"},
    "wandb": {"train/trackers"},
    "mlflow": {"train/trackers"},
    "jinja2": {"runs/html"},
}


def modules() -> dict[str, Path]:
    """Map `folder/name` to the file, packages by their own name."""
    files = {path.relative_to(PACKAGE).with_suffix(""): path for path in PACKAGE.rglob("*.py")}
    return {str(name.parent if name.name == "__init__" else name): path for name, path in files.items()}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(node: ast.AST) -> Iterator[str]:
    """Yield the full names that a module imports when it runs, those inside functions included."""
    if is_type_checking(node):
        return
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    if isinstance(node, ast.ImportFrom) and node.module:
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def imported(path: Path) -> set[str]:
    return set(imports(ast.parse(path.read_text())))


def test_every_folder_has_its_place() -> None:
    assert sorted({name.split("/")[0] for name in modules()} - {"."}) == sorted(ORDER)


@pytest.mark.parametrize("place", ORDER)
def test_a_folder_imports_only_what_stands_before_it(place: str) -> None:
    before = {*ORDER[: ORDER.index(place) + 1]}
    inside = [path for name, path in modules().items() if name.split("/")[0] == place]
    used = {full.split(".")[1] for path in inside for full in imported(path) if full.startswith("mprd.")}
    assert used & {*ORDER} - before == set()


@pytest.mark.parametrize("dependency", sorted(DOORS))
def test_a_heavy_dependency_is_imported_by_its_doors_alone(dependency: str) -> None:
    users = {name for name, path in modules().items() if dependency in {full.split(".")[0] for full in imported(path)}}
    assert users == DOORS[dependency]


@pytest.mark.parametrize("command", ["__main__", *COMMANDS])
def test_help_needs_neither_torch_nor_ray(command: str) -> None:
    code = (
        f"import sys; sys.argv = ['x', '--help']\nfrom mprd.{command} import app\n"
        "try: app()\nexcept SystemExit: pass\n"
        "assert not {'torch', 'ray', 'torchvision', 'pydantic'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


@pytest.mark.parametrize("module", ["tune.run", pytest.param("tune.ray_trials", marks=pytest.mark.ray)])
def test_the_process_of_a_study_on_ray_holds_no_torch(module: str, tiny_root: Path, tmp_path: Path) -> None:
    code = f"""if True:
        import sys
        import mprd.{module}
        from mprd.config.loading import load_config
        from mprd.data.same_images import record_images
        from mprd.runs.dataset import open_dataset
        from mprd.tune.folder import StudyFolder

        config = load_config("recommended", values={{"data": {{"root": sys.argv[1]}}}})
        record = record_images(open_dataset(config), config.data)
        for _ in ("first", "resumed"):
            StudyFolder(sys.argv[2]).check_images(record, on_changed="stop")
        assert not {{"torch", "torchvision"}} & set(sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code, tiny_root, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_file_is_too_long_to_read() -> None:
    # the settings are one list, with a docstring each
    too_long = {name for name, path in modules().items() if len(path.read_text().splitlines()) > 400}
    assert too_long <= {"config/schema"}
