"""What commands read and write: they agree about every tree, and change nothing below `--data`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

from mprd.__main__ import app
from mprd.config.schema import DataConfig
from mprd.data.datasets import load_dataset
from mprd.data.scan import is_image, scan
from mprd.doctor import checks, plans
from mprd.errors import UserError
from mprd.extract.inputs import find_images
from mprd.feature_file import open_features
from tests.conftest import TINY, write_crop

Tree = list[tuple[str, str, str]]
"""Entries of a tree: folder, name, kind."""


@pytest.fixture(scope="module", autouse=True)
def quick_doctor() -> Iterator[None]:
    """Ask no server for weights, and try no step: the plan is not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "has_imagenet_weights", lambda _name: False)
        patch.setattr(plans, "try_out", lambda plan, _dataset: plan)
        yield


def run(*words: object) -> int:
    """Run a command in this process; return its exit code."""
    with pytest.raises(SystemExit) as stop:
        app([str(word) for word in words])
    return int(stop.value.code or 0)


def contents(root: Path) -> dict[str, Any]:
    """Return every entry below a folder with mode, time and content."""
    found: dict[str, Any] = {}
    for path in sorted([root, *root.rglob("*")]):
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if stat.S_ISREG(status.st_mode) else ""
        found[str(path.relative_to(root))] = (status.st_mode, status.st_mtime_ns, content)
    return found


def sets(*names: str) -> list[str]:
    return [f"--set={name}" for name in (*TINY[1:], "train.epochs=1", *names)]


def test_no_command_changes_the_data_or_writes_beside_its_output(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # where earlier versions kept their own files, beside the run
    data = Path(shutil.copytree(tiny_root, tmp_path / "data"))
    (tmp_path / "tune_configs").mkdir()
    study = {"name": "one", "doc": "One.", "points": [{"name": "a"}], "seeds": [0], "sampler": "grid"}
    (tmp_path / "tune_configs" / "one.yaml").write_text(yaml.safe_dump(study))
    query, before = "data/query", contents(data)
    written = {"one", "drawn", "page.html", "report.html", "f.parquet", "net.pt", "net.pt.json", "study"}
    tiny = ["data.synthetic.num_train_ids=6", "data.synthetic.num_test_ids=4", "data.synthetic.images_per_camera=2"]
    for words in (
        ["doctor", "data"],
        ["train", "--preset=demo", "--data=data", "--out=one", "--launcher=local", *sets()],
        ["train", "--out=drawn", "--launcher=local", *sets("data.dataset=synthetic", *tiny)],
        ["train", "--resume=one", "--launcher=local"],
        ["evaluate", "one", "--data=data"],
        ["search", "one", f"--gallery={query}", f"--query={query}", "--html=page.html"],
        ["extract", "one", "data", "--out=f.parquet"],
        ["export", "one", "--out=net.pt", "--format=torchscript"],
        ["report", "one", "--out=report.html"],
        ["tune", "--study=one", "--preset=demo", "--data=data", "--out=study", "--launcher=local", *sets()],
        ["doctor", "data"],
    ):
        assert run(*words) == 0, words
        assert contents(data) == before, words
        assert {path.name for path in tmp_path.iterdir()} <= {"data", "tune_configs", *written}, words
    cache = {path.name.split("-")[0] for path in Path(os.environ["MPRD_CACHE"]).iterdir()}
    assert cache == {"CACHEDIR.TAG", "images", "synthetic"}


def test_the_folder_of_a_run_is_not_the_data(tiny_root: Path, tmp_path: Path, refuse: Any) -> None:
    from mprd.train.cli import app as train_app

    data = Path(shutil.copytree(tiny_root, tmp_path / "data"))
    line = refuse(train_app, "--preset=demo", "--data", data, "--out", data, "--launcher=local", *sets())
    assert "--out must not be the folder of the data" in line
    # inside it, a run is passed over when the data are read again
    inside = data / "runs" / "a"
    assert run("train", "--preset=demo", "--data", data, "--out", inside, "--launcher=local", *sets()) == 0
    found = load_dataset(DataConfig(dataset="auto", root=data))
    assert len(found.train) == 24
    assert "mprd's own folders" in "; ".join(map(str, found.left_out))


FOLDERS = (
    *("", "cam1", "cam_b", "ann", "train", "Train", "bounding_box_train", "query", "image_query", "probe", "gallery"),
    *("bounding_box_test", "test", "test/query", "test/gallery", "val", "gt_bbox", "a/b/c", "train_all"),
    *(".hidden", "@eaDir", "lost+found", "na[me] {pid}", "ab\udcff"),
)
KINDS = ("image", "image", "image", "image", "other", "broken", "link to folder", "broken link", "fifo", "closed")
SUFFIXES = (".jpg", ".PNG", ".bmp", ".heic")
MARKET_NAMES = st.builds("{:04d}_c{}s1_0{}".format, st.integers(1, 3), st.integers(1, 2), st.sampled_from(SUFFIXES))
NAMES = st.one_of(MARKET_NAMES, st.sampled_from(("x.jpg", ".y.png")))
ENTRIES = st.tuples(st.sampled_from(FOLDERS), NAMES, st.sampled_from(KINDS))
TREES = st.lists(ENTRIES, min_size=1, max_size=14)


def build(root: Path, tree: Tree) -> None:
    """Write a tree; an entry whose place is taken is left out."""
    root.mkdir()
    for number, (folder, name, kind) in enumerate(tree):
        place = root / folder
        place.mkdir(parents=True, exist_ok=True)
        path = place / name
        if path.exists() or path.is_symlink():
            continue
        if kind == "image":
            write_crop(path.with_suffix(".png"), number % 3, number % 2, number)
            path.with_suffix(".png").rename(path)
        elif kind in ("other", "broken"):
            (path.with_suffix(".txt") if kind == "other" else path).write_bytes(b"x")
        elif kind == "link to folder":
            (place / f"link{number}").symlink_to(root / FOLDERS[number % 8], target_is_directory=True)
        elif kind == "broken link":
            path.symlink_to(root / "nowhere.jpg")
        elif kind == "fifo":
            os.mkfifo(path)
        else:
            (place / f"closed{number}").mkdir(mode=0)


def count_images(root: Path) -> int:
    """Count the image files of a tree, without following links: the same by another way."""
    return sum(
        is_image(name) and stat.S_ISREG(os.lstat(os.path.join(place, name)).st_mode)
        for place, _, files in os.walk(root)
        for name in files
    )


def split_tree(train: str, query: str, gallery: str) -> Tree:
    """Return entries of training, query and gallery folders of 6, 2 and 3 images, and others that are left out."""
    numbers = {train: (6, 0), query: (2, 10), gallery: (3, 10)}
    names = [(folder, pid + first) for folder, (count, first) in numbers.items() for pid in range(count)]
    crops = [(folder, f"{pid:04d}_c{1 + (folder == query)}s1_000{pid}_00.jpg", "image") for folder, pid in names]
    return [*crops, (train, "gone.jpg", "broken link"), ("ann", "x.jpg", "image"), (gallery, "z", "link to folder")]


SPLIT = [
    split_tree("bounding_box_train", "query", "bounding_box_test"),
    split_tree("train", "probe", "gallery"),
    split_tree("Train", "test/query", "test/gallery"),
]


# to explain a failure takes minutes
@settings(max_examples=25, deadline=None, derandomize=True, phases=(Phase.explicit, Phase.generate, Phase.shrink))
@given(tree=TREES)
@example(tree=SPLIT[0])
@example(tree=SPLIT[1])
@example(tree=SPLIT[2])
def test_doctor_and_readers_agree_about_any_tree(tree: Tree) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "tree"
        build(root, tree)
        before = sorted(os.listdir(root))
        report = checks.examine(root)
        found = scan(root)
        reasons = [part for part in found.left_out if "images" in part.reason and "no files" not in part.reason]
        passed_over = sum(part.count for part in reasons)
        assert len(found.names) + passed_over == count_images(root)
        data = None
        with suppress(UserError):
            data = load_dataset(DataConfig(dataset="auto", root=root), needs_train=False)
        if data is None:
            assert report.has_problem
            assert tree not in SPLIT
            return
        read = {str(path) for images in (data.train, data.query, data.gallery) for path in images.paths}
        numbers = {"train": len(data.train), "query": len(data.query), "gallery": len(data.gallery)}
        if report.splits or tree in SPLIT:
            assert {split: counts["images"] for split, counts in report.splits.items()} == numbers
        # of trees that are drawn few have a query
        assert tree not in SPLIT or numbers == {"train": 6, "query": 2, "gallery": 3}
        assert len(data.train) or report.has_problem
        # no image is in two splits, and what is in none is counted
        assert len(read) == len(data.train) + len(data.query) + len(data.gallery)
        assert {*map(os.path.realpath, read)} <= {*map(os.path.realpath, find_images(str(root)).paths)}
        counted = [part.count for part in data.left_out if "images" in part.reason and "hidden" not in part.reason]
        assert len(read) + sum(counted) + count_outside(root, data.root) >= len(found.names)
        assert sorted(os.listdir(root)) == before


def count_outside(root: Path, inner: Path) -> int:
    """Count the images that lie outside of the folder that was chosen."""
    return count_images(root) - count_images(inner) if inner.is_relative_to(root) else 0


WHOLE: list[Tree] = [
    [("image_train", f"{n:04d}_c{c}s1_{n:06d}_0{c}.jpg", "image") for n in range(6) for c in (1, 2)]
    + [("image_query", "0007_c1s1_1.jpg", "image"), ("Image_Test", "0007_c2s1_1.jpg", "image")]
    + [("val", "x.jpg", "broken"), ("image_train", "gone.jpg", "broken link"), ("", "1_c1.jpg", "fifo")],
    [(f"cam{c}", f"{n}.PNG", "image") for n in range(7) for c in (1, 2)]
    + [("cam1", "b.jpg", "broken"), ("cam2", "c", "link to folder"), ("@eaDir", "x.jpg", "image")],
    [("test", f"{n}_c1.jpg", "image") for n in range(12)],
]


@pytest.mark.parametrize("tree", WHOLE, ids=["split", "cameras", "unclear"])
def test_commands_agree_about_a_tree_or_end_in_one_line(
    tree: Tree, tiny_run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cwd = tmp_path / "tree", tmp_path / "cwd"
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    build(root, tree)

    def command(*words: object) -> tuple[int, str]:
        code = run(*words)
        captured = capfd.readouterr()
        assert "Traceback" not in captured.err
        if code == 2:
            assert len([line for line in captured.err.splitlines() if line.startswith("error:")]) == 1
        return code, captured.out

    code, printed = command("doctor", root, "--json")
    found = json.loads(printed)
    skip = "--set=data.on_bad_image=skip"
    trained = command("train", "--data", root, "--smoke", "--launcher=local", "--out=run", skip)[0]
    assert (trained == 0) == (code == 0)
    assert command("extract", tiny_run, root, "--out=f.parquet", "--skip-bad")[0] == 0
    assert command("search", tiny_run, "--gallery", root, "--query", next(root.rglob("*_c1*.jpg"), root))[0] in (0, 2)
    evaluated = command("evaluate", tiny_run, "--data", root)[0]
    if code == 0:
        images = {split: counts["images"] for split, counts in found["splits"].items()}
        assert (evaluated == 0) == (images["query"] > 0)
        num_bad = sum("unreadable" in finding["text"] for finding in found["findings"])
        assert open_features("f.parquet").num_rows >= sum(images.values()) - num_bad
    assert {path.name for path in cwd.iterdir()} <= {"run", "f.parquet"}
