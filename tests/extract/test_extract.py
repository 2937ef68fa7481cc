"""Features of many files into one file: the same as evaluation's, streamed, resumable, and never half-written."""

from __future__ import annotations

import multiprocessing
import os
import re
import shutil
import signal
import time
from itertools import chain
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch

from mprd import load_model
from mprd.config.schema import DataConfig
from mprd.data.datasets import load_dataset
from mprd.data.layouts import MARKET_NAME
from mprd.errors import UserError
from mprd.evaluate.evaluation import extract_sets
from mprd.extract import stream as extraction
from mprd.extract.cli import app, default_decoders, report
from mprd.extract.inputs import ids_of, list_pictures, name_patterns
from mprd.feature_file import Rows, open_features

SETTINGS = {"best": False, "device": "cpu", "batch_size": None, "decoders": None, "skip_bad": False}


def extract(run: Path, images: Path | str, out: Path, **changes: object) -> Rows:
    """Run the command in this process and read its file."""
    options = {"dtype": "float32", "num_workers": 0, "name_pattern": None}
    options |= {name: changes.pop(name) for name in tuple(changes) if name in options}
    report(run, str(images), out=out, settings={**SETTINGS, **changes}, **options)
    return read(out)


def read(out: Path) -> Rows:
    paths, pids, camids, features = zip(*open_features(out).batches(), strict=True)
    return Rows(*(list(chain.from_iterable(part)) for part in (paths, pids, camids)), np.concatenate(features))


def refuse(capfd: pytest.CaptureFixture[str], *args: object) -> str:
    """Run a command that must fail: exit code 2 and one line; return it."""
    with pytest.raises(SystemExit) as stop:
        app([str(arg) for arg in args])
    lines = capfd.readouterr().err.splitlines()
    assert (stop.value.code, len(lines)) == (2, 1)
    return lines[0]


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep parts of two batches of three."""
    monkeypatch.setattr(extraction, "PART_IMAGES", 6)


@pytest.fixture
def crops(tiny_root: Path, tmp_path: Path) -> Path:
    """Copy the training crops, so that a test may break one."""
    return Path(shutil.copytree(tiny_root / "bounding_box_train", tmp_path / "crops"))


# -- what stands in the file ----------------------------------------------------------------------


def test_the_features_are_those_of_evaluation_to_the_bit(
    tiny_run: Path, tiny_root: Path, tmp_path: Path, small_parts: None
) -> None:
    found = extract(tiny_run, tiny_root / "query", tmp_path / "f.parquet", batch_size=3)
    model = load_model(tiny_run, device="cpu")
    config = model.config.model_copy(update={"eval": model.config.eval.model_copy(update={"batch_size": 3})})
    assert [path.name for path in tmp_path.iterdir()] == ["f.parquet"]
    dataset = load_dataset(config.data, cache_dir=tmp_path)
    (after, _), _ = extract_sets(model.backbone, dataset, config, device=torch.device("cpu"))
    assert found.paths == [str(path) for path in dataset.query.paths]
    assert found.pids == [7, 7, 8, 8, 9, 9, 10, 10]
    assert found.camids == [1, 2] * 4
    assert np.array_equal(found.features, after.numpy())


def test_neither_batch_size_nor_decoders_nor_dtype_move_them_far(
    tiny_run: Path, tiny_root: Path, tmp_path: Path
) -> None:
    found = extract(tiny_run, tiny_root / "query", tmp_path / "a.parquet")
    assert np.abs(np.linalg.norm(found.features, axis=1) - 1).max() < 1e-6
    other = extract(tiny_run, tiny_root / "query", tmp_path / "b.parquet", batch_size=1, decoders=2)
    assert np.abs(other.features - found.features).max() < 1e-5
    half = extract(tiny_run, tiny_root / "query", tmp_path / "c.parquet", dtype="float16")
    assert np.array_equal(half.features, found.features.astype(np.float16))
    assert open_features(tmp_path / "c.parquet").run == "untrained"


def test_an_actor_decodes_by_itself_and_an_accelerator_is_given_more_decoders() -> None:
    assert default_decoders(1, on_gpu=False, num_workers=0) == 1
    assert default_decoders(1, on_gpu=False, num_workers=4) == 0
    assert default_decoders(32, on_gpu=True, num_workers=0) == 32
    assert default_decoders(1, on_gpu=True, num_workers=10**6) == 1


# -- which images, and their ids ------------------------------------------------------------------


def test_a_folder_a_list_and_a_glob_name_the_same_images(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_root)
    folder = list_pictures("query")
    assert folder.names[0] == "0007_c1s1_000001_01.jpg"
    assert folder.paths == sorted(map(str, (tiny_root / "query").iterdir()))
    assert list_pictures(f"{tiny_root}/query").paths == folder.paths
    assert list_pictures("query/*.jpg") == (folder.paths, [f"query/{name}" for name in folder.names])
    assert list_pictures("**/*c1s1*1_01.jpg").names[-1] == "query/0010_c1s1_000001_01.jpg"
    lines = tmp_path / "list.txt"
    lines.write_text(f"b.png\n\n{tiny_root}/query/../query/x.jpg\n")
    assert list_pictures(str(lines)).paths == [f"{tmp_path}/b.png", f"{tiny_root}/query/x.jpg"]
    assert list_pictures(folder.paths[3]).paths == [folder.paths[3]]


def test_what_names_no_images_is_told(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "empty").mkdir()
    for source, message in {
        "absent": "absent: no such folder, list or image",
        "*.png": r"\*\.png: no images; looked for \*\.jpg",
        "empty": "empty: no images; looked for",
        "empty.txt": r"empty\.txt: no images; looked for a path a line",
    }.items():
        with pytest.raises(UserError, match=message):
            list_pictures(str(tmp_path / source))


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        ("0002_c1s1_000451_03.jpg", (2, 1)),
        ("gallery/-1_c06s1.jpg", (-1, 6)),
        ("0000/0000_000_01_0303morning_0008_0.jpg", (0, 1)),
        ("holiday.jpg", (None, None)),
    ],
)
def test_names_of_the_published_sets_are_read(name: str, ids: tuple) -> None:
    assert ids_of(name, name_patterns(DataConfig())) == ids


def test_names_are_read_by_the_pattern_that_is_given() -> None:
    own = name_patterns(DataConfig(), r"cam(?P<camid>\w+)/p(?P<pid>\d+)")
    assert ids_of("cam4/p0031/7.jpg", own) == (31, 4)
    assert ids_of("camNorth/p5/7.jpg", own) == (5, None)
    folder = DataConfig(dataset="folder", root=Path("x"), name_pattern=r"of(?P<pid>\d+)")
    assert ids_of("shot_of12.png", name_patterns(folder)) == (12, None)
    assert [pattern.pattern for pattern in name_patterns(folder, "a+")] == ["a+"]
    with pytest.raises(UserError, match="--name-pattern: not a regular expression"):
        name_patterns(DataConfig(), "(")
    assert ids_of("x/0001_c2.jpg", [re.compile("nothing"), MARKET_NAME]) == (1, 2)


# -- images that cannot be read -------------------------------------------------------------------


def test_an_unreadable_image_stops_or_is_left_out(
    tiny_run: Path, crops: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], small_parts: None
) -> None:
    out, broken = tmp_path / "f.parquet", sorted(crops.iterdir())[14]
    whole = extract(tiny_run, crops, tmp_path / "whole.parquet", batch_size=3)
    broken.write_bytes(broken.read_bytes()[:300])
    args = (tiny_run, crops, "--out", out, "--batch-size", 3, "--device", "cpu")
    assert f"{broken}: cannot read the image" in (line := refuse(capfd, *args))
    assert line.endswith("(--skip-bad leaves such files out)")
    assert not out.exists()
    found = extract(tiny_run, crops, out, batch_size=3, skip_bad=True)
    assert "23 images (1 left out, they cannot be read)" in capfd.readouterr().out
    rows = [row for row in range(24) if row != 14]
    assert found.paths == [whole.paths[row] for row in rows]
    assert found.pids == [whole.pids[row] for row in rows]
    assert np.abs(found.features - whole.features[rows]).max() < 1e-5


def test_a_set_without_a_readable_image_is_an_error(
    tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "crops").mkdir()
    (tmp_path / "crops" / "a.jpg").write_text("no picture")
    with pytest.raises(UserError, match=r"a\.jpg: cannot read this image, nor any other of the 1"):
        extract(tiny_run, tmp_path / "crops", tmp_path / "f.parquet", skip_bad=True)
    assert [path.name for path in tmp_path.iterdir()] == ["crops"]


# -- stopping and going on ------------------------------------------------------------------------


def extract_slowly(run: Path, images: Path, out: Path) -> None:
    """Run the command, a pause behind each part."""
    # a shell that starts tests in its background has them ignore Ctrl-C
    signal.signal(signal.SIGINT, signal.default_int_handler)
    write = extraction.Parts.write

    def write_and_rest(parts: extraction.Parts, number: int, rows: Rows) -> None:
        write(parts, number, rows)
        time.sleep(0.3)

    extraction.Parts.write = write_and_rest  # type: ignore[method-assign]
    app([str(run), str(images), "--out", str(out), "--batch-size", "3", "--device", "cpu"])


def start(run: Path, images: Path, out: Path, *, num_parts: int) -> BaseProcess:
    """Start the command in a process of its own, and wait until so many parts are there."""
    process = multiprocessing.get_context("fork").Process(target=extract_slowly, args=(run, images, out))
    process.start()
    deadline = time.monotonic() + 120
    while len(list(out.parent.glob(".*.parts/*.parquet"))) < num_parts:
        assert process.is_alive(), "the command ended before it could be stopped"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGKILL, -9)])
def test_a_stopped_command_goes_on_to_the_same_file(
    number: signal.Signals,
    code: int,
    tiny_run: Path,
    tiny_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    images, out = tiny_root / "bounding_box_train", tmp_path / "f.parquet"
    monkeypatch.setattr(extraction, "PART_IMAGES", 3)
    process = start(tiny_run, images, out, num_parts=2)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(timeout=60)
    assert process.exitcode == code
    assert not out.exists()
    told = capfd.readouterr().err
    assert told == ("" if code < 0 else "stopped; what is done is kept, and the same command goes on from there\n")
    done = {path: path.stat().st_mtime_ns for path in tmp_path.glob(".*.parts/*.parquet")}
    seen: list[tuple[int, bool]] = []
    monkeypatch.setattr("mprd.runs.console.ImageLine.advance", lambda self, n, earlier: seen.append((n, earlier)))
    found = extract(tiny_run, images, out, batch_size=3)
    assert seen == [(3 * len(done), True)] + [(3, False)] * (8 - len(done))
    assert 2 <= len(done) < 8
    undisturbed = extract(tiny_run, images, tmp_path / "g.parquet", batch_size=3)
    assert found[:3] == undisturbed[:3]
    assert np.array_equal(found.features, undisturbed.features)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["f.parquet", "g.parquet"]


def test_going_on_with_other_settings_is_refused(
    tiny_run: Path, crops: Path, tmp_path: Path, small_parts: None, capfd: pytest.CaptureFixture[str]
) -> None:
    out, broken = tmp_path / "f.parquet", sorted(crops.iterdir())[14]
    good = broken.read_bytes()
    broken.write_bytes(b"")
    args = [tiny_run, crops, "--out", out, "--device", "cpu"]
    refuse(capfd, *args, "--batch-size", 3)
    line = refuse(capfd, *args, "--batch-size", 4)
    assert "begun with other settings (--batch-size 3, now 4)" in line
    assert str(tmp_path / ".f.parquet.parts") in line
    assert "--dtype float32, now float16" in refuse(capfd, *args, "--batch-size", 3, "--dtype", "float16")
    (crops / "more.jpg").write_bytes(good)
    assert "images 24, now 25" in refuse(capfd, *args, "--batch-size", 3)
    (crops / "more.jpg").unlink()
    broken.write_bytes(good)
    found = extract(tiny_run, crops, out, batch_size=3)
    assert len(found.paths) == 24
    assert "there already; remove it or give another --out" in refuse(capfd, *args, "--batch-size", 3)


def test_parts_with_images_left_out_want_the_flag_again(
    tiny_run: Path, crops: Path, tmp_path: Path, small_parts: None, capfd: pytest.CaptureFixture[str]
) -> None:
    files = sorted(crops.iterdir())
    files[0].write_bytes(b"")
    shutil.copy(files[20], tmp_path / "late.jpg")
    files[20].unlink()
    (tmp_path / "list.txt").write_text("".join(f"{file}\n" for file in files))
    args = [tiny_run, tmp_path / "list.txt", "--out", tmp_path / "f.parquet", "--device", "cpu", "--batch-size", 3]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extraction.Parts, "join", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(SystemExit):
            app([str(arg) for arg in [*args, "--skip-bad"]])
    capfd.readouterr()
    assert "begun with --skip-bad, which left out 2 images" in refuse(capfd, *args)
    found = extract(tiny_run, tmp_path / "list.txt", tmp_path / "f.parquet", batch_size=3, skip_bad=True)
    assert len(found.paths) == 22


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no/such/run", "."], "no/such/run: not a run folder"),
        (["RUN", "no/such/images"], "no/such/images: no such folder, list or image"),
        (["RUN", "IMAGES", "--dtype", "int8"], "--dtype must be float32 or float16, but got 'int8'"),
        (["RUN", "IMAGES", "--device", "cuda:99"], "--device: cuda:99 is not on this machine"),
        (["RUN", "IMAGES", "--name-pattern", "("], "--name-pattern: not a regular expression"),
    ],
)
def test_mistakes_are_told_in_one_line(
    args: list[str], message: str, tiny_run: Path, tiny_root: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    known = {"RUN": tiny_run, "IMAGES": tiny_root / "query"}
    line = refuse(capfd, *[known.get(arg, arg) for arg in args], "--out", tmp_path / "f.parquet")
    assert message in line
    assert list(tmp_path.iterdir()) == []


# -- on Ray ---------------------------------------------------------------------------------------


@pytest.mark.ray
def test_actors_write_the_file_that_one_process_writes(
    tiny_run: Path, crops: Path, tmp_path: Path, small_parts: None, capfd: pytest.CaptureFixture[str]
) -> None:
    ray = pytest.importorskip("ray")
    serial = extract(tiny_run, crops, tmp_path / "serial.parquet", batch_size=3)
    try:
        actors = extract(tiny_run, crops, tmp_path / "ray.parquet", batch_size=3, num_workers=2)
        assert actors[:3] == serial[:3]
        assert np.array_equal(actors.features, serial.features)
        broken = sorted(crops.iterdir())[14]
        broken.write_bytes(b"")
        with pytest.raises(UserError, match=f"{broken}: cannot read the image"):
            extract(tiny_run, crops, tmp_path / "bad.parquet", batch_size=3, num_workers=2)
        assert not (tmp_path / "bad.parquet").exists()
        skipped = extract(tiny_run, crops, tmp_path / "bad.parquet", batch_size=3, num_workers=2, skip_bad=True)
        assert skipped.paths == [path for path in serial.paths if path != str(broken)]
        with pytest.raises(UserError, match=r"--num-workers: .* actors"):
            extract(tiny_run, crops, tmp_path / "many.parquet", num_workers=999)
    finally:
        ray.shutdown()
