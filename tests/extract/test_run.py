"""Features of many files in one file: bit-identical to the model's, resumable, never half-written."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mprd import load_model
from mprd.errors import UserError
from mprd.extract.cli import app
from mprd.extract.parts import Parts
from mprd.extract.run import default_decoders, extract_run
from mprd.extract.stream import stream_parts
from mprd.feature_file import Rows, open_features


def extract(run: Path, images: Path | str, out: Path, **options: Any) -> Rows:
    extract_run(run, str(images), out, device="cpu", **options)
    return read(out)


def read(out: Path) -> Rows:
    paths, pids, camids, features = zip(*open_features(out).batches(), strict=True)
    return Rows(*(list(chain.from_iterable(part)) for part in (paths, pids, camids)), np.concatenate(features))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make parts of two batches of three."""
    monkeypatch.setattr("mprd.extract.parts.PART_IMAGES", 6)


@pytest.fixture
def crops(tiny_root: Path, tmp_path: Path) -> Path:
    """Copy the training crops, so that a test can damage them."""
    return Path(shutil.copytree(tiny_root / "bounding_box_train", tmp_path / "crops"))


def test_features_are_those_of_the_model_to_the_bit(
    tiny_run: Path, tiny_root: Path, tmp_path: Path, small_parts: None
) -> None:
    found = extract(tiny_run, tiny_root / "query", tmp_path / "f.parquet", batch_size=3)
    assert [path.name for path in tmp_path.iterdir()] == ["f.parquet"]
    assert found.paths == sorted(map(str, (tiny_root / "query").iterdir()))
    assert (found.pids, found.camids) == ([7, 7, 8, 8, 9, 9, 10, 10], [1, 2] * 4)
    assert np.array_equal(found.features, load_model(tiny_run, device="cpu").extract(found.paths, batch_size=3))


def test_batch_size_decoders_and_dtype_hardly_change_features(tiny_run: Path, tiny_root: Path, tmp_path: Path) -> None:
    found = extract(tiny_run, tiny_root / "query", tmp_path / "a.parquet")
    assert np.abs(np.linalg.norm(found.features, axis=1) - 1).max() < 1e-6
    other = extract(tiny_run, tiny_root / "query", tmp_path / "b.parquet", batch_size=1, decoders=2)
    assert np.abs(other.features - found.features).max() < 1e-5
    half = extract(tiny_run, tiny_root / "query", tmp_path / "c.parquet", dtype="float16")
    assert np.array_equal(half.features, found.features.astype(np.float16))
    assert open_features(tmp_path / "c.parquet").run == "untrained"


@pytest.mark.parametrize(
    ("configured", "on_gpu", "num_workers", "decoders"),
    [(1, False, 0, 1), (1, False, 4, 0), (32, True, 0, 32), (1, True, 10**6, 1)],
)
def test_an_actor_decodes_itself_and_an_accelerator_gets_more_decoders(
    configured: int, on_gpu: bool, num_workers: int, decoders: int
) -> None:
    assert default_decoders(configured, on_gpu=on_gpu, num_workers=num_workers) == decoders


def test_an_unreadable_image_is_an_error_or_left_out(
    tiny_run: Path,
    crops: Path,
    tmp_path: Path,
    refuse: Callable[..., str],
    small_parts: None,
    capfd: pytest.CaptureFixture[str],
) -> None:
    out, broken = tmp_path / "f.parquet", sorted(crops.iterdir())[14]
    whole = extract(tiny_run, crops, tmp_path / "whole.parquet", batch_size=3)
    broken.write_bytes(broken.read_bytes()[:300])
    args = [str(arg) for arg in (tiny_run, crops, "--out", out, "--batch-size", 3, "--device", "cpu")]
    line = refuse(app, *args)
    assert f"{broken}: cannot read the image" in line
    assert line.endswith("(--skip-bad leaves such files out)")
    assert not out.exists()
    app([*args, "--skip-bad"], standalone_mode=False)
    assert "23 images (1 left out, they cannot be read), 256 numbers each" in capfd.readouterr().out
    found = read(out)
    rows = [row for row in range(24) if row != 14]
    assert found.paths == [whole.paths[row] for row in rows]
    assert found.pids == [whole.pids[row] for row in rows]
    assert np.abs(found.features - whole.features[rows]).max() < 1e-5


def test_no_readable_image_at_all_is_an_error(tiny_run: Path, tmp_path: Path) -> None:
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "a.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"a\.jpg: cannot read this image, nor any other of the 1"):
        extract(tiny_run, tmp_path / "crops", tmp_path / "f.parquet", skip_bad=True)
    assert [path.name for path in tmp_path.iterdir()] == ["crops"]


def test_an_interrupted_command_resumes_to_the_same_file(
    tiny_run: Path, tiny_root: Path, tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    images, out = tiny_root / "bounding_box_train", tmp_path / "f.parquet"

    def interrupted(*args: Any) -> Iterator[Any]:
        yield from islice(stream_parts(*args), 2)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("mprd.extract.run.stream_parts", interrupted)
        with pytest.raises(SystemExit) as stop:
            app([str(tiny_run), str(images), "--out", str(out), "--batch-size", "3", "--device", "cpu"])
    assert stop.value.code == 130
    first, second = sorted(tmp_path.glob(".*.parts/*.parquet"))
    # as left behind by a kill
    second.write_bytes(second.read_bytes()[:100])
    first.with_name(".000002.parquet.0.tmp").write_bytes(b"PAR1")
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr("mprd.extract.run.ImageLine.advance", lambda self, n, earlier: seen.append((n, earlier)))
    found = extract(tiny_run, images, out, batch_size=3)
    assert seen == [(6, True), (6, False), (6, False), (6, False)]
    undisturbed = extract(tiny_run, images, tmp_path / "g.parquet", batch_size=3)
    assert found[:3] == undisturbed[:3]
    assert np.array_equal(found.features, undisturbed.features)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.parquet", "g.parquet"]


def test_parts_of_other_settings_are_refused(
    tiny_run: Path, crops: Path, tmp_path: Path, small_parts: None, refuse: Callable[..., str]
) -> None:
    out, broken = tmp_path / "f.parquet", sorted(crops.iterdir())[14]
    good = broken.read_bytes()
    broken.write_bytes(b"")
    args = [tiny_run, crops, "--out", out, "--device", "cpu"]
    refuse(app, *args, "--batch-size", 3)
    line = refuse(app, *args, "--batch-size", 4)
    assert "begun with other settings (--batch-size 3, now 4)" in line
    assert str(tmp_path / ".f.parquet.parts") in line
    assert "--dtype float32, now float16" in refuse(app, *args, "--batch-size", 3, "--dtype", "float16")
    (crops / "more.jpg").write_bytes(good)
    assert "images 24, now 25" in refuse(app, *args, "--batch-size", 3)
    (crops / "more.jpg").unlink()
    settings = tmp_path / ".f.parquet.parts" / "settings.json"
    saved = settings.read_text()
    settings.write_text("{")
    assert "damaged; remove" in refuse(app, *args, "--batch-size", 3)
    settings.write_text(saved)
    broken.write_bytes(good)
    # of a part that is complete already
    first = min(crops.iterdir())
    first.write_bytes(good)
    found = extract(tiny_run, crops, out, batch_size=3)
    assert len(found.paths) == 24
    assert np.allclose(found.features[0], found.features[14], atol=1e-6)
    assert "exists already; remove it or give another --out" in refuse(app, *args, "--batch-size", 3)


def test_parts_without_unreadable_images_need_the_flag_again(
    tiny_run: Path, crops: Path, tmp_path: Path, small_parts: None
) -> None:
    files = sorted(crops.iterdir())
    for file in (files[0], files[20]):
        file.write_bytes(b"")
    out = tmp_path / "f.parquet"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Parts, "join", lambda _: (_ for _ in ()).throw(UserError("stopped")))
        with pytest.raises(UserError, match="stopped"):
            extract(tiny_run, crops, out, batch_size=3, skip_bad=True)
    with pytest.raises(UserError, match="begun with --skip-bad, which left out 2 images"):
        extract(tiny_run, crops, out, batch_size=3)
    assert len(extract(tiny_run, crops, out, batch_size=3, skip_bad=True).paths) == 22


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no/such/run", "."], "no/such/run: not a run folder"),
        (["RUN", "no/such/images"], "no/such/images: no such folder, list or image"),
        (["RUN", "IMAGES", "--dtype", "int8"], "--dtype must be float32 or float16, but got 'int8'"),
        (["RUN", "IMAGES", "--device", "cuda:99"], "--device: cuda:99 is not on this machine"),
    ],
)
def test_mistakes_are_refused_in_one_line(
    args: list[str], message: str, tiny_run: Path, tiny_root: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    known = {"RUN": tiny_run, "IMAGES": tiny_root / "query"}
    assert message in refuse(app, *[known.get(arg, arg) for arg in args], "--out", tmp_path / "f.parquet")
    assert list(tmp_path.iterdir()) == []
