"""Exported networks equal the original, are described, run without mprd, and are never half-written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from mprd.errors import UserError
from mprd.export import formats
from mprd.export.cli import app
from mprd.export.formats import READERS, export_network
from mprd.model import Model, load_model

DOCS = Path(__file__).parents[2] / "docs"


@pytest.fixture(scope="module")
def model(tiny_run: Path) -> Model:
    return load_model(tiny_run, device="cpu")


@pytest.fixture(scope="module")
def onnx_file(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export once, as ONNX takes seconds."""
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("export") / "new" / "tiny.onnx"
    app([str(tiny_run), "--out", str(path)], standalone_mode=False)
    return path


def test_the_description_holds_pre_processing_and_output(onnx_file: Path) -> None:
    description = json.loads(onnx_file.with_name("tiny.onnx.json").read_text())
    assert (description["file"], description["kind"], description["run"]) == ("tiny.onnx", "onnx", "untrained")
    assert description["input"]["shape"] == ["batch", 3, 32, 16]
    assert description["input"]["mean"] == [0.485, 0.456, 0.406]
    assert description["output"]["shape"] == ["batch", 256]
    assert description["checked"]["num_images"] == 8
    assert description["checked"]["max_difference"] <= 1e-4
    assert sorted(path.name for path in onnx_file.parent.iterdir()) == ["tiny.onnx", "tiny.onnx.json"]


def test_the_code_in_the_docs_gives_the_same_features_without_torch(
    onnx_file: Path, model: Model, tiny_root: Path, tmp_path: Path
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (DOCS / "commands" / "export.md").read_text(), re.DOTALL)
    code = snippet + "\nassert not {'torch', 'mprd'} & set(sys.modules)\n"
    paths = sorted((tiny_root / "query").iterdir())[:3]
    command = [sys.executable, "-c", code, str(onnx_file), *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), model.extract(paths), atol=1e-4)


@pytest.mark.parametrize("kind", ["torchscript", "torch-export"])
def test_other_formats_take_any_number_of_images(kind: str, model: Model, tmp_path: Path) -> None:
    exported = export_network(model, tmp_path / "network", kind=kind)
    images = torch.rand(5, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    found = READERS[kind](exported.path)(images)
    assert found.shape == (5, 256)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("change", "shown"), [(2e-4, r"2\.0e-04"), (float("nan"), "nan")])
def test_a_network_that_differs_for_a_single_image_is_not_written(
    change: float, shown: str, model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = READERS["torchscript"]

    def read_wrongly(path: Path) -> formats.Network:
        network = read(path)
        return lambda images: network(images) + (change if len(images) == 1 else 0)

    monkeypatch.setitem(READERS, "torchscript", read_wrongly)
    with pytest.raises(UserError, match=f"not written: its features differ by {shown}"):
        export_network(model, tmp_path / "wrong.torchscript", kind="torchscript")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_no_file_to_write_and_gets_no_description(model: Model, tmp_path: Path) -> None:
    (tmp_path / "exports").mkdir()
    with pytest.raises(UserError, match="exports: is a folder; name a file in it"):
        export_network(model, tmp_path / "exports", kind="torchscript")
    assert [path.name for path in tmp_path.rglob("*")] == ["exports"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no/such/run"], "no/such/run: not a run folder"),
        (["no/such/run", "--format", "tflite"], "--format must be onnx, torchscript, torch-export, but got 'tflite'"),
        (["RUN", "--format", "torchscript", "--out", "FILE/x"], "x: cannot write"),
        (["RUN", "--format", "torchscript", "--camera", "1"], "has no statistics of cameras (backbone.camera_bn)"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    args: list[str], message: str, tiny_run: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    (tmp_path / "file").write_text("")
    known = {"RUN": tiny_run, "FILE/x": tmp_path / "file" / "x"}
    assert message in refuse(app, *[known.get(arg, arg) for arg in args])


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'mprd\[export\]'"):
        formats.check_packages("onnx")


def test_without_the_run_s_images_the_comparison_uses_synthetic_ones(model: Model, tmp_path: Path) -> None:
    gone = model.config.data.model_copy(update={"root": tmp_path / "gone"})
    images, source = formats.sample_images(replace(model, config=model.config.model_copy(update={"data": gone})))
    assert source == "drawn pedestrians"
    assert images.shape[1:] == (3, 32, 16)
    assert len(images) > 8
    assert list(tmp_path.iterdir()) == []
