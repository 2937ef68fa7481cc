"""What training has fitted serves at use: in evaluation, extraction, search, export and from Python.

That is the whitening, and the statistics of batch norms by camera.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

from mprd import load_model
from mprd.config.loading import load_config
from mprd.errors import UserError
from mprd.evaluate import evaluation
from mprd.evaluate.run import evaluate_run
from mprd.export.formats import READERS, export_network, sample_images
from mprd.extract.run import extract_run
from mprd.feature_file import open_features
from mprd.metrics import rank_features
from mprd.runs.folder import RunFolder
from mprd.search.page import render_search
from mprd.search.run import SearchOptions, search_run
from mprd.search.tables import print_tables
from mprd.train.local import run_local
from tests.conftest import BY_CAMERA, TINY


def files(root: Path, split: str = "query") -> list[Path]:
    return sorted((root / split).iterdir())


def test_evaluation_gives_the_figures_of_the_last_epoch(camera_run: Path, tiny_root: Path) -> None:
    row = json.loads((camera_run / "metrics.jsonl").read_text().splitlines()[-1])
    found = evaluate_run(RunFolder(camera_run), data=None, best=False, whitens=True)
    assert found["mAP_whitened"] == pytest.approx(row["mAP_whitened"])
    assert found["mAP"] == pytest.approx(row["mAP"])
    same = evaluate_run(RunFolder(camera_run), data=tiny_root, best=False, whitens=True, same_cameras=True)
    assert same == found


def test_another_data_set_has_other_cameras_unless_told(
    camera_run: Path, tiny_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def watched(features: Tensor, *rest: Any) -> Any:
        seen.append((features, rest[0]))
        return rank_features(features, *rest)

    monkeypatch.setattr(evaluation, "rank_features", watched)
    for is_same in (True, False):
        evaluate_run(RunFolder(camera_run), data=tiny_root, best=False, whitens=True, same_cameras=is_same)
    model = load_model(camera_run, device="cpu")
    # query and gallery as they are whitened, which is ranked first
    for (found, _), cameras in zip(seen[::3], ([1, 2] * 4, None), strict=True):
        expected = model.whiten(model.extract(files(tiny_root), cameras=cameras))
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)
    assert (seen[0][0] - seen[3][0]).abs().max() > 1e-3


CAMERAS = [1, 2] * 4
"""Of the files of query and gallery, as numbered in their names."""


def test_extraction_gives_the_features_of_the_model(
    camera_run: Path, tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="mprd")
    model, paths = load_model(camera_run, device="cpu"), files(tiny_root)
    plain, unknown = model.extract(paths, cameras=CAMERAS), model.extract(paths)
    expected = model.whiten(plain)
    assert np.abs(np.linalg.norm(expected, axis=1) - 1).max() < 1e-5
    assert np.abs(unknown - plain).max() > 1e-3
    np.testing.assert_allclose(model.extract(paths, cameras=[None, 9] * 4), unknown, atol=1e-6)

    def extracted(name: str, **options: Any) -> np.ndarray:
        extract_run(camera_run, str(tiny_root / "query"), tmp_path / name, device="cpu", **options)
        (rows,) = open_features(tmp_path / name).batches()
        return rows.features

    np.testing.assert_allclose(extracted("white.parquet", whiten=True), expected, atol=1e-6)
    np.testing.assert_allclose(extracted("plain.parquet"), plain, atol=1e-6)
    assert "take the statistics of the cameras 1, 2 in the images' names; --other-cameras if" in caplog.text
    caplog.clear()
    np.testing.assert_allclose(extracted("others.parquet", other_cameras=True), unknown, atol=1e-6)
    assert "--other-cameras" not in caplog.text
    assert "no camera in the names" not in caplog.text
    np.testing.assert_allclose(extracted("nameless.parquet", name_pattern="(?P<pid>no such name)"), unknown, atol=1e-6)
    assert "no camera in the names of 8 of 8 images: they take the statistics of all" in caplog.text
    whitened = extracted("white_others.parquet", whiten=True, other_cameras=True)
    np.testing.assert_allclose(whitened, model.whiten(unknown), atol=1e-6)


def test_search_ranks_by_the_features_of_the_model(
    camera_run: Path, tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, paths, gallery = load_model(camera_run, device="cpu"), files(tiny_root), tiny_root / "bounding_box_test"
    crops = (paths, files(tiny_root, gallery.name))
    expected, others = (model.whiten(model.extract(some, cameras=CAMERAS)) for some in crops)
    out = tmp_path / "white.parquet"
    extract_run(camera_run, str(tiny_root / "query"), out, device="cpu", whiten=True)
    # a folder, and features that are whitened already, in which the query itself is left out
    for searched, features in ((gallery, others), (out, expected[1:])):
        found = search_run(camera_run, searched, [str(paths[0])], SearchOptions(top=3, whiten=True, device="cpu"))
        nearest = np.sort(1 - features @ expected[0])[:3]
        np.testing.assert_allclose([hit.distance for hit in found.answers[0].hits], nearest, atol=1e-5)
    assert "but the queries' are of" not in caplog.text
    search_run(camera_run, out, [str(paths[0])], SearchOptions(top=3, device="cpu"))
    assert "features of run by_camera, whitened, but the queries' are of by_camera" in caplog.text


def test_an_export_has_the_features_of_the_model_under_one_camera(camera_run: Path, tmp_path: Path) -> None:
    model = load_model(camera_run, device="cpu")
    images, _ = sample_images(model)
    for camera, whiten in (("1", False), (None, False), ("2", True), (None, True)):
        exported = export_network(model, tmp_path / "net.pt", kind="torchscript", whiten=whiten, camera=camera)
        with torch.no_grad():
            numbers = [None if camera is None else int(camera)] * len(images)
            features = model.backbone(images, model.camera_rows(numbers)).numpy()
            mapped = model.whiten(features) if whiten else features
            np.testing.assert_allclose(READERS["torchscript"](exported.path)(images), mapped, atol=1e-5)
        description = json.loads(exported.description.read_text())
        assert (description["whitening"], description["camera"]) == (whiten, camera)
    with pytest.raises(UserError, match=r"--camera must be one of 1, 2, .* but got 9"):
        export_network(model, tmp_path / "net.pt", kind="torchscript", whiten=True, camera="9")


def test_cameras_may_be_words(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("bounding_box_train", "query", "bounding_box_test"):
        for file in files(tiny_root, split):
            camera = "north" if "_c1" in file.name else "south"
            copy = tmp_path / "data" / split / camera / file.name.replace("_c1s1", "_").replace("_c2s1", "_")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, copy)
    folder = RunFolder(tmp_path / "words")
    names = {"dataset": "folder", "root": tmp_path / "data", "name_pattern": r"(?P<camid>[a-z]+th|west)/(?P<pid>\d+)_"}
    splits = {"train": "bounding_box_train", "query": "query", "gallery": "bounding_box_test"}
    config = load_config("demo", overrides=(*TINY, *BY_CAMERA, "train.epochs=1"), values={"data": names | splits})
    run_local(config, folder, resume=False, console=Console(quiet=True))

    model = load_model(folder.path, device="cpu")
    assert (model.camera_numbers, model.camera_words) == ((1, 2), ("north", "south"))
    assert model.backbone.num_cameras == 2
    out = tmp_path / "features.parquet"
    extract_run(folder.path, str(tmp_path / "data" / "query"), out, device="cpu")
    (rows,) = open_features(out).batches()
    assert rows.camids == [1] * 4 + [2] * 4
    np.testing.assert_allclose(rows.features, model.extract(rows.paths, cameras=rows.camids), atol=1e-6)
    # "2" is south's number and nobody's name
    assert [model.camera_number(name) for name in ("north", "south", "2", "7", "west")] == [1, 2, None, 7, None]
    with pytest.raises(UserError, match="--camera must be one of north, south, the cameras of words, but got west"):
        export_network(model, tmp_path / "net.pt", kind="torchscript", camera="west")

    found = search_run(folder.path, tmp_path / "data" / "query", [rows.paths[0]], SearchOptions(device="cpu"))
    assert {hit.camid: found.camera_name(hit.camid) for hit in found.answers[0].hits} == {1: "north", 2: "south"}
    print_tables(found)
    printed, page = capsys.readouterr().out, render_search(found)
    assert ", camera north" in printed
    assert " south " in printed
    assert "· camera north" in page
    assert " cam south<br>" in page

    # in another data set statistics go to cameras of the same names, whatever their places there
    for split in ("query", "bounding_box_test"):
        (tmp_path / "data" / split / "north").rename(tmp_path / "data" / split / "west")
    (tmp_path / "data").rename(tmp_path / "other")
    shutil.rmtree(tmp_path / "other" / "bounding_box_train")
    rows: list[Tensor] = []
    monkeypatch.setattr(
        "mprd.evaluate.run.evaluate",
        lambda *rest, camera_rows, **how: (rows.append(camera_rows), evaluation.evaluate(*rest, **how))[1],
    )
    evaluate_run(folder, data=tmp_path / "other", best=False, same_cameras=True)
    # south, west
    assert rows[0].tolist() == [1, -1]


def test_a_run_without_whitening_is_refused(trained_run: Path, tiny_root: Path, tmp_path: Path) -> None:
    model, query = load_model(trained_run, device="cpu"), str(tiny_root / "query")
    uses: list[Callable[[], Any]] = [
        lambda: evaluate_run(RunFolder(trained_run), data=None, best=False, whitens=True),
        lambda: extract_run(trained_run, query, tmp_path / "x.parquet", device="cpu", whiten=True),
        lambda: search_run(trained_run, tiny_root / "query", [query], SearchOptions(whiten=True, device="cpu")),
        lambda: export_network(model, tmp_path / "x.pt", kind="torchscript", whiten=True),
    ]
    for use in uses:
        with pytest.raises(UserError, match=r"trained: has no whitening, which neighbors\.whitening=true"):
            use()
