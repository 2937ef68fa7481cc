"""Exported networks: equal to the original, described, usable without us, and never half there."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mprd.errors import UserError
from mprd.export import formats as network_file
from mprd.export.cli import app
from mprd.export.formats import READERS, export_network
from mprd.model import load_model

DOCS = Path(__file__).parents[2] / "docs"


def export(*args: str) -> None:
    """Run the command, which must end well."""
    with pytest.raises(SystemExit) as stop:
        app(list(args))
    assert stop.value.code == 0


@pytest.fixture(scope="module")
def onnx_file(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Export the tiny run once: ONNX takes seconds."""
    pytest.importorskip("onnxruntime")
    path = tmp_path_factory.mktemp("export") / "new" / "tiny.onnx"
    export(str(tiny_run), "--out", str(path))
    return path


def test_the_description_says_how_to_prepare_an_image(onnx_file: Path) -> None:
    about = json.loads(onnx_file.with_name("tiny.onnx.json").read_text())
    assert (about["file"], about["kind"], about["run"]) == ("tiny.onnx", "onnx", "untrained")
    assert about["input"]["shape"] == ["batch", 3, 32, 16]
    assert about["input"]["mean"] == [0.485, 0.456, 0.406]
    assert about["output"]["shape"] == ["batch", 256]
    assert about["checked"]["num_images"] == 8
    assert about["checked"]["max_difference"] <= 1e-4
    assert sorted(path.name for path in onnx_file.parent.iterdir()) == ["tiny.onnx", "tiny.onnx.json"]


def test_the_snippet_in_the_docs_gives_our_features_without_torch(
    onnx_file: Path, tiny_run: Path, tiny_root: Path, tmp_path: Path
) -> None:
    (snippet,) = re.findall(r"```python\n(.*?)```", (DOCS / "commands" / "export.md").read_text(), re.DOTALL)
    code = snippet + "\nassert not {'torch', 'mprd'} & set(sys.modules)\n"
    paths = sorted((tiny_root / "query").iterdir())[:3]
    command = [sys.executable, "-c", code, str(onnx_file), *map(str, paths)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wanted = load_model(tiny_run, device="cpu").extract(paths)
    np.testing.assert_allclose(np.load(tmp_path / "features.npy"), wanted, atol=1e-4)


@pytest.mark.parametrize(("kind", "name"), [("torchscript", "backbone.torchscript"), ("torch-export", "backbone.pt2")])
def test_other_formats_take_any_number_of_images(
    kind: str, name: str, tiny_run: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    export(str(tiny_run), "--format", kind, "--best")
    assert "max difference" in capfd.readouterr().out
    file = tiny_run / name
    images = torch.rand(5, 3, 32, 16, generator=torch.Generator().manual_seed(0))
    found = READERS[kind](file)(images)
    assert found.shape == (5, 256)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(5), atol=1e-5, rtol=0)
    file.unlink()
    file.with_name(name + ".json").unlink()


@pytest.mark.parametrize(("change", "told"), [(2e-4, r"2\.0e-04"), (float("nan"), "nan")])
def test_a_network_that_answers_otherwise_for_one_image_is_not_left_behind(
    change: float, told: str, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = READERS["torchscript"]

    def read_wrongly(path: Path) -> network_file.Run:
        run = read(path)
        return lambda images: run(images) + (change if len(images) == 1 else 0)

    monkeypatch.setitem(READERS, "torchscript", read_wrongly)
    with pytest.raises(UserError, match=f"not written: its features differ by {told}"):
        export_network(load_model(tiny_run, device="cpu"), tmp_path / "wrong.torchscript", kind="torchscript")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no/such/run"], "no/such/run: not a run folder"),
        (["no/such/run", "--format", "tflite"], "--format must be onnx, torchscript, torch-export, but got 'tflite'"),
    ],
)
def test_mistakes_are_told_in_one_line(args: list[str], message: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        app(args)
    assert stop.value.code == 2
    assert message in capfd.readouterr().err


def test_a_place_that_cannot_be_written_is_named(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x\.torchscript: cannot write"):
        export_network(load_model(tiny_run, device="cpu"), tmp_path / "file" / "x.torchscript", kind="torchscript")


def test_onnx_without_its_packages_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"needs onnx, onnxscript, onnxruntime: pip install 'mprd\[export\]'"):
        network_file.check_packages("onnx")


def test_a_run_whose_images_are_gone_is_checked_on_drawn_ones(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_run, device="cpu")
    gone = model.config.data.model_copy(update={"root": tmp_path / "gone"})
    object.__setattr__(model, "config", model.config.model_copy(update={"data": gone}))
    images, source = network_file.sample_images(model)
    assert source == "drawn pedestrians"
    assert images.shape[1:] == (3, 32, 16)
    assert len(images) > 8
    assert os.listdir(tmp_path) == []
