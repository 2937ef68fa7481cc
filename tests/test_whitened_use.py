"""The chain that training has fitted serves at use: in evaluation, extraction, search, export and from Python."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from mprd import load_model
from mprd.config.loading import load_config
from mprd.errors import UserError
from mprd.evaluate.run import evaluate_run
from mprd.export.formats import READERS, export_network, sample_images
from mprd.extract.run import extract_run
from mprd.feature_file import open_features
from mprd.runs.folder import RunFolder
from mprd.search.run import SearchOptions, search_run
from mprd.train.local import run_local
from tests.conftest import TINY

WHITENING = ("neighbors.whitening=true", "pairs.labeller=reciprocal", "pairs.limit=false", "train.epochs=1")


@pytest.fixture(scope="module")
def run(tiny_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with whitening for an epoch."""
    folder = RunFolder(tmp_path_factory.mktemp("runs") / "white")
    # the labeled pairs of six identities are too few to stop the chain
    config = load_config("demo", overrides=(*TINY, *WHITENING), values={"data": {"root": tiny_root}})
    run_local(config, folder, resume=False, console=Console(quiet=True))
    return folder.path


def files(root: Path, split: str = "query") -> list[Path]:
    return sorted((root / split).iterdir())


def test_evaluation_gives_the_figures_of_the_last_epoch(run: Path, tiny_root: Path) -> None:
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    found = evaluate_run(RunFolder(run), data=None, best=False, extras=["whitened"])
    assert found["mAP_whitened"] == pytest.approx(row["mAP_whitened"])
    assert found["mAP"] == pytest.approx(row["mAP"])
    # the cameras of another data set are not those of training
    elsewhere = evaluate_run(RunFolder(run), data=tiny_root, best=False, extras=["whitened"])
    assert 0 < elsewhere["mAP_whitened"] <= 1


def test_extraction_search_and_export_give_the_features_of_the_model(
    run: Path, tiny_root: Path, tmp_path: Path
) -> None:
    model, paths = load_model(run, device="cpu"), files(tiny_root)
    cameras = [1, 2] * 4
    expected = model.whiten(model.extract(paths), cameras)
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).max() < 1e-5
    assert np.abs(model.whiten(model.extract(paths)) - expected).max() > 1e-3

    out = tmp_path / "white.parquet"
    extract_run(run, str(tiny_root / "query"), out, device="cpu", whiten=True)
    (rows,) = open_features(out).batches()
    np.testing.assert_allclose(rows.features, expected, atol=1e-6)

    gallery = tiny_root / "bounding_box_test"
    found = search_run(run, gallery, [str(paths[0])], SearchOptions(top=3, whiten=True, device="cpu"))
    others = model.whiten(model.extract(files(tiny_root, gallery.name)), cameras)
    nearest = np.sort(1 - others @ expected[0])[:3]
    np.testing.assert_allclose([hit.distance for hit in found.answers[0].hits], nearest, atol=1e-5)
    # features that are whitened already
    again = search_run(run, out, [str(paths[0])], SearchOptions(top=3, whiten=True, device="cpu"))
    nearest = np.sort(1 - expected[1:] @ expected[0])[:3]
    np.testing.assert_allclose([hit.distance for hit in again.answers[0].hits], nearest, atol=1e-5)

    images, _ = sample_images(model)
    for camera in (2, None):
        exported = export_network(model, tmp_path / "net.pt", kind="torchscript", whiten=True, camera=camera)
        with torch.no_grad():
            plain = model.backbone(images).numpy()
            network = READERS["torchscript"](exported.path)
            np.testing.assert_allclose(network(images), model.whiten(plain, [camera] * len(plain)), atol=1e-5)
    assert json.loads(exported.description.read_text())["whitening"] == {"applied": True, "camera": None}
    with pytest.raises(UserError, match=r"--camera must be one of 1, 2, .* but got 9"):
        export_network(model, tmp_path / "net.pt", kind="torchscript", whiten=True, camera=9)


def test_a_run_without_whitening_is_refused(trained_run: Path, tiny_root: Path, tmp_path: Path) -> None:
    model, query = load_model(trained_run, device="cpu"), str(tiny_root / "query")
    uses: list[Callable[[], Any]] = [
        lambda: evaluate_run(RunFolder(trained_run), data=None, best=False, extras=["whitened"]),
        lambda: extract_run(trained_run, query, tmp_path / "x.parquet", device="cpu", whiten=True),
        lambda: search_run(trained_run, tiny_root / "query", [query], SearchOptions(whiten=True, device="cpu")),
        lambda: export_network(model, tmp_path / "x.pt", kind="torchscript", whiten=True),
    ]
    for use in uses:
        with pytest.raises(UserError, match=r"trained: has no whitening, which neighbors\.whitening=true"):
            use()
