"""The house: a module imports only modules above it, and each heavy dependency has its doors."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from mprd.__main__ import COMMANDS

PACKAGE = Path(__file__).parent.parent / "mprd"

# in the order in which data flows; a module may import what stands above it
ORDER = [
    "errors",
    "device",
    "config",
    "config_loading",
    "studies",
    "seeding",
    "schedules",
    "world",
    "batch_norm",
    "data.decode",
    "data.cache",
    "data.layouts",
    "data.camera_style",
    "data.pedestrians",
    "data.cameras",
    "data.synthetic",
    "data.datasets",
    "data.labelled",
    "data.pictures",
    "data.recognition",
    "data.inspection",
    "data.augment",
    "data.augment_batch",
    "data.images",
    "cuda_graph",
    "backbone",
    "features",
    "memory",
    "neighbors",
    "neighbor_search",
    "subgraphs",
    "ray_data",
    "executors",
    "reranking",
    "reciprocal",
    "gcn_inputs",
    "gcn",
    "losses",
    "pairs",
    "gcn_pairs",
    "gcn_pool",
    "gcn_loss",
    "camera_bias",
    "neighbor_lists",
    "clusters",
    "agreement",
    "labelling",
    "diagnostics",
    "checkpoint",
    "state",
    "requirements",
    "engine",
    "profiling",
    "metrics",
    "retrieval",
    "epoch_row",
    "folder_lock",
    "run_folder",
    "feature_file",
    "gallery_index",
    "gallery",
    "search_results",
    "model",
    "network_file",
    "extraction",
    "extract_actors",
    "study_folder",
    "optuna_study",
    "console",
    "html_page",
    "search_page",
    "paper_tables",
    "study_plots",
    "study_report",
    "curves",
    "trackers",
    "launch",
    "report_runs",
    "report_snapshot",
    "report_pairs",
    "report_features",
    "report_plots",
    "report_page",
    "noticeboard",
    "ray_train",
    "study_loop",
    "ray_tune",
    "cli",
    "train",
    "tune",
    "evaluate",
    "report",
    "extract",
    "search",
    "export",
    "cost",
    "checkup",
    "doctor",
    "__main__",
]

DOORS = {
    "ray": {"ray_data", "ray_train", "ray_tune"},
    "optuna": {"optuna_study"},
    "faiss": {"gallery_index", "neighbor_search"},
    "torch_geometric": {"gcn"},
    "pyarrow": {"subgraphs", "ray_data", "study_report", "feature_file"},
    "torchvision": {"backbone", "data.augment"},
    "pydantic": {"config", "config_loading", "studies"},
    "matplotlib": {"curves", "report_plots", "study_plots"},
    "onnxruntime": {"network_file"},
    "wandb": {"trackers"},
    "mlflow": {"trackers"},
    "jinja2": {"html_page"},
    "sklearn": {"clusters", "report_features"},
    "rich": {
        *("checkup", "console", "doctor", "evaluate", "extract", "launch", "ray_tune", "report"),
        *("search", "study_loop", "study_report", "train", "tune"),
    },
    "typer": {"__main__", "doctor", "report", "export", "train", "evaluate", "extract", "tune", "search"},
    "PIL": {
        f"data.{name}"
        for name in ("decode", "cache", "camera_style", "cameras", "pedestrians", "augment", "images")
    },
}


def modules() -> dict[str, Path]:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"]
    return {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in files}


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(path: Path) -> set[str]:
    """List the full names that a module imports when it runs, those inside functions included."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        if is_type_checking(node):
            return
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
            if node.module.startswith("mprd"):
                found.update(f"{node.module}.{alias.name}" for alias in node.names)
        for child in ast.iter_child_nodes(node):
            walk(child)

    walk(ast.parse(path.read_text()))
    return found


def test_every_module_has_its_place() -> None:
    assert sorted(modules()) == sorted(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_a_module_imports_only_what_is_above_it(name: str) -> None:
    above = {f"mprd.{other}" for other in ORDER[: ORDER.index(name)]}
    everything = {f"mprd.{other}" for other in ORDER}
    assert (imports(modules()[name]) & everything) - above == set()


@pytest.mark.parametrize("dependency", sorted(DOORS))
def test_a_dependency_is_imported_by_its_doors_alone(dependency: str) -> None:
    users = {
        name
        for name, path in modules().items()
        if any(full == dependency or full.startswith(f"{dependency}.") for full in imports(path))
    }
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


def test_no_file_is_longer_than_it_may_be() -> None:
    lengths = {name: len(path.read_text().splitlines()) for name, path in modules().items()}
    # config is a list of documented settings and grows by a line or two for each
    limits = {"config": 458}
    assert {name: n for name, n in lengths.items() if n > limits.get(name, 400)} == {}
