"""Layouts of data sets are recognized from the names of folders and files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from mprd.config.loading import parse_override
from mprd.config.schema import DataConfig
from mprd.data.datasets import load_dataset
from mprd.data.naming import NAMINGS
from mprd.data.recognition import recognize
from mprd.errors import UserError
from tests.trees import ints, write_images, write_market, write_msmt17


@pytest.mark.parametrize(
    ("write", "name", "preset"),
    [
        (write_market, "Market-1501", "market1501"),
        (write_msmt17, "MSMT17 V1, official lists", "msmt17"),
        (lambda root: write_msmt17(root, train="mask_train_v2"), "MSMT17 V2, official lists", "msmt17"),
    ],
)
@pytest.mark.parametrize(
    ("place", "words"), [("", ""), ("inner", "one folder below"), ("outer/inner", "two folders below")]
)
def test_published_layouts_are_recognized_up_to_two_folders_below(
    write: Callable[[Path], Path], name: str, preset: str, place: str, words: str, tmp_path: Path
) -> None:
    write(tmp_path / place)
    layout = recognize(tmp_path)
    assert (layout.name, layout.dataset, layout.root, layout.problem) == (name, preset, tmp_path / place, "")
    assert layout.place.startswith(words)


def test_a_folder_that_is_a_part_of_a_data_set_is_recognized(tmp_path: Path) -> None:
    layout = recognize(write_market(tmp_path) / "query")
    assert layout.root == tmp_path
    assert layout.place == f"{tmp_path / 'query'} is a part of it"


@pytest.mark.parametrize(
    ("names", "name", "preset"),
    [
        (["0001_c2_f0046182.jpg", "0001_c5_f0051341.jpg"], "DukeMTMC-reID", "dukemtmcreid"),
        (["0000_c14_0031.jpg", "0001_c1_0001.jpg"], "MSMT17, Market layout", "msmt17"),
        (["0001_c1_0001.jpg"], "Market layout", "market1501"),
    ],
)
def test_data_sets_in_the_market_layout_are_distinguished_by_their_names(
    names: list[str], name: str, preset: str, tmp_path: Path
) -> None:
    for folder in ("bounding_box_train", "query", "bounding_box_test"):
        write_images(tmp_path / folder, names)
    layout = recognize(tmp_path)
    assert (layout.name, layout.dataset) == (name, preset)


@pytest.mark.parametrize("lists", [True, False])
def test_missing_lists_of_msmt17_are_a_problem(lists: bool, tmp_path: Path) -> None:
    missing = ("list_query.txt",) if lists else ("list_train.txt", "list_val.txt", "list_query.txt", "list_gallery.txt")
    write_msmt17(tmp_path)
    for name in missing:
        (tmp_path / name).unlink()
    assert f"{', '.join(missing)} missing" in recognize(tmp_path).problem


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        (["0001_c1_1.jpg", "a/0002_c3_1.jpg"], r"(?P<pid>-?\d+)_c(?P<camid>\d+)"),
        (["0001_003_02_x.jpg"], r"(?P<pid>\d+)_\d{3}_(?P<camid>\d{2})_"),
        (["ann/c1_1.jpg", "bob/c12.jpg"], r"^(?P<pid>[^/]+)/c(?P<camid>\d+)[^/]*$"),
        (["cam1/a.jpg", "cam2/b.jpg"], r"^(?i:c|cam|camera)[-_ ]?(?P<camid>\d+)/"),
        (["ann/1.jpg", "bob/1.jpg"], r"^(?P<pid>[^/]+)/[^/]+$"),
        (["1.jpg", "bob/1.jpg"], "."),
        # most names follow the first convention: the other is a fault
        (["0001_c1_1.jpg", "0002_c3_1.jpg", "x.jpg"], r"(?P<pid>-?\d+)_c(?P<camid>\d+)"),
    ],
)
def test_the_convention_of_names_in_a_tree_is_recognized(names: list[str], pattern: str, tmp_path: Path) -> None:
    write_images(tmp_path, names)
    layout = recognize(tmp_path)
    assert (layout.name, layout.pattern) == ("folder of crops", pattern)


def test_every_pattern_survives_the_command_line() -> None:
    for pattern, _ in NAMINGS:
        assert parse_override(f"data.name_pattern={pattern}") == {"data": {"name_pattern": pattern}}


FRAME = "{pid:04d}_c{cam}s1_{n:06d}_00.jpg"
TRAIN, TEST = ((1, 1), (1, 2), (2, 1), (2, 2)), ((8, 1), (8, 2))


def write_split(root: Path, folders: dict[str, Sequence[tuple[int, int]]], name: str = FRAME) -> Path:
    """Write an image of each (pid, cam) into the folders, given as text or by the folder's name in `name`."""
    for folder, images in folders.items():
        write_images(root / folder, [name.format(pid=pid, cam=cam, n=n) for n, (pid, cam) in enumerate(images)])
    return root


@pytest.mark.parametrize(
    ("train", "query", "gallery", "name"),
    [
        ("Train", "Query", "Gallery", FRAME),
        ("BOUNDING_BOX_TRAIN", "QUERY", "BOUNDING_BOX_TEST", FRAME),
        ("image_train", "image_query", "image_test", "{pid:04d}_c{cam:03d}_{n:08d}_0.jpg"),
        ("train", "query", "test", "{pid:03d}_1_c{cam}_{n:06d}.png"),
        ("train", "probe", "gallery", FRAME),
        ("train_images", "probe_images", "gallery_images", FRAME),
        ("TrainSet", "test/query", "test/gallery", "{pid:08d}_{cam:02d}_{n:04d}.jpg"),
        ("train", "test_probe", "test_gallery", FRAME),
        ("train_all", "query", "gallery", "{pid:04d}/{pid:04d}_c{cam}s1_{n:06d}_00.jpg"),
    ],
)
def test_splits_are_told_by_the_names_of_their_folders(
    train: str, query: str, gallery: str, name: str, tmp_path: Path
) -> None:
    write_split(tmp_path, {train: TRAIN, query: TEST[:1], gallery: TEST}, name)
    data = load_dataset(DataConfig(dataset="auto", root=tmp_path))
    assert (len(data.train), len(data.query), len(data.gallery), data.left_out) == (4, 1, 2, ())
    assert (ints(data.train.pids), ints(data.train.camids)) == ([1, 1, 2, 2], [0, 1, 0, 1])
    assert (ints(data.gallery.pids), ints(data.gallery.camids)) == ([8, 8], [0, 1])


@pytest.mark.parametrize(
    ("files", "name", "pids", "camids"),
    [
        # one number is one person in both views
        (
            ["cam_a/000_45.bmp", "cam_a/001_0.bmp", "cam_b/000_90.bmp", "cam_b/001_180.bmp"],
            "VIPeR", [0, 1, 0, 1], [0, 0, 1, 1],
        ),
        # from 201 on it is another one
        (
            [f"single_shot/cam_{view}/person_0{number}.png" for view in "ab" for number in (200, 201)],
            "PRID 2011", [2, 0, 2, 1], [0, 0, 1, 1],
        ),
        (["images_labeled/1_001_1_01.png", "images_labeled/1_001_2_07.png", "images_labeled/2_001_1_01.png"],
         "CUHK03", [0, 0, 1], [0, 1, 0]),
        (["cam1/x/1.jpg", "cam2/1.jpg"], "folder of crops", None, [0, 1]),
        (["camera_a/1.jpg", "camera_b/1.jpg"], "folder of crops", None, [0, 1]),
        # places, dates and containers are not persons
        (["site1/a.jpg", "site2/a.jpg"], "folder of crops", None, None),
        (["2024-05-01/a.jpg", "2024-05-02/a.jpg"], "folder of crops", None, None),
        (["cam1/c1_000123.jpg", "cam2/c2_000124.jpg"], "folder of crops", None, [0, 1]),
        (["2024-05-01/c1_1.jpg", "2024-05-02/c2_1.jpg"], "folder of crops", None, None),
        (["images/c1_0001.jpg", "images/c2_0001.jpg"], "folder of crops", None, None),
        (["ann/a.jpg", "bob/a.jpg"], "folder of crops", [0, 1], None),
    ],
)  # fmt: skip
def test_names_of_sets_without_a_split_are_read(
    files: list[str], name: str, pids: list[int] | None, camids: list[int] | None, tmp_path: Path
) -> None:
    write_images(tmp_path, files)
    data = load_dataset(DataConfig(dataset="auto", root=tmp_path))
    assert recognize(tmp_path).name == name
    assert (ints(data.train.pids), ints(data.train.camids), len(data.query)) == (pids, camids, 0)


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["query", "other"], r"looks split .*query \(4\).*data\.train=FOLDER"),
        (["val", "other"], r"looks split .*val \(4\)"),
        (["test"], r"looks split .*test \(4\)"),
        (["train", "training", "query", "gallery"], "looks split"),
        (["train/a", "train/test"], r"looks split .*train/test \(4\)"),
        (["day/one/noon/query", "day/one/noon/other"], r"looks split .*noon/query \(4\)"),
        (["market_train", "market_query"], "looks split"),
        (["images_labeled", "images_detected"], "two versions of the same images"),
        (["a/cam1", "b/cam1", "c/train"], r"c is split .* \(4 images\), but 8 images lie outside of it"),
    ],
)
def test_what_looks_split_in_an_unknown_way_is_refused_with_what_was_seen(
    folders: list[str], message: str, tmp_path: Path
) -> None:
    write_split(tmp_path, dict.fromkeys(folders, TRAIN))
    with pytest.raises(UserError, match=message):
        load_dataset(DataConfig(dataset="auto", root=tmp_path))


def test_what_is_left_out_is_counted_and_named_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_split(tmp_path / "in", {"train": TRAIN, "val": TEST, "notes": TEST[:1], "gt_bbox": TEST, "probe": TEST})
    write_images(tmp_path, ["figure.png"])
    write_images(tmp_path / "in", ["map.png"])
    data = load_dataset(DataConfig(dataset="auto", root=tmp_path))
    lines = [record.message for record in caplog.records if "left out" in record.message]
    assert lines[0] == f"{tmp_path}: left out: 1 images outside of in (first figure.png)"
    assert lines[1] == (
        f"{tmp_path}/in: left out: 2 images in gt_bbox (first gt_bbox/0008_c1s1_000000_00.jpg); "
        "1 images beside the folders (first map.png); 1 images in notes (first notes/0008_c1s1_000000_00.jpg); "
        "2 images in probe (first probe/0008_c1s1_000000_00.jpg); 2 images in val (first val/0008_c1s1_000000_00.jpg)"
    )
    assert len(data.train) == 4


def test_the_user_names_the_splits(tmp_path: Path) -> None:
    write_split(tmp_path, {"a": TRAIN, "b/x": TEST[:1], "b/y": TEST, "query": TEST})
    named = {"train": "a", "query": "b/x", "gallery": "b/y"}

    def sizes(**folders: str) -> list[int]:
        data = load_dataset(DataConfig.model_validate({"dataset": "auto", "root": tmp_path, **folders}))
        return [len(data.train), len(data.query), len(data.gallery), sum(part.count for part in data.left_out)]

    assert sizes(**named) == [4, 1, 2, 2]
    assert sizes(train=".") == [9, 0, 0, 0]
    # an image to be searched is never trained on
    assert sizes(**{**named, "train": "."}) == [6, 1, 2, 0]
    for wrong, message in (
        ({"train": "c"}, r"c: no such folder \(data\.train\)"),
        ({"train": ".."}, "data.train: wanted a folder below"),
        ({"train": "a", "query": "b/x"}, "data.query and data.gallery are given together"),
    ):
        with pytest.raises(UserError, match=message):
            sizes(**wrong)


def test_query_and_gallery_alone_are_read_for_evaluation(tmp_path: Path) -> None:
    for place, folders in (("market", ("query", "bounding_box_test")), ("nested", ("test/probe", "test/gallery"))):
        root = write_split(tmp_path / place, {folders[0]: TEST[:1], folders[1]: TEST})
        config = DataConfig(dataset="auto", root=root)
        data = load_dataset(config, needs_train=False)
        assert (len(data.train), len(data.query), len(data.gallery), data.num_cameras) == (0, 1, 2, 2)
        with pytest.raises(UserError, match="query and gallery alone, nothing to train on"):
            load_dataset(config)


def test_a_list_names_images_splits_and_ids(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "all", [f"{n}.jpg" for n in range(6)])
    rows = ["1.jpg,Train,ann,gate", "0.jpg,train,bob,door", "2.jpg,probe,eve,gate"]
    rows += ["3.jpg,gallery,eve,door", "4.jpg,val,eve,door"]
    file = tmp_path / "list.csv"
    file.write_text("\n".join(["file,split,identity,camera", *(f"all/{row}" for row in rows)]))
    data = load_dataset(DataConfig(dataset="auto", root=file))
    assert [path.name for path in data.train.paths] == ["0.jpg", "1.jpg"]
    assert (ints(data.train.pids), ints(data.train.camids)) == ([1, 0], [0, 1])
    assert (ints(data.query.pids), ints(data.gallery.camids), data.root) == ([2], [0], tmp_path)
    assert "left out: 1 images of the split val" in caplog.text
    for text, message in (
        ("file,identity\n", "wanted the header file,split,identity,camera"),
        ("file,split\nall/0.jpg,test\n", "line 2: split must be train, query, gallery or val, but got 'test'"),
        ("file,split\nall/0.jpg,train\nall/../all/0.jpg,query\n", r"line 3: all/0\.jpg is on line 2 too"),
        (f"file,split\nall/0.jpg,train\n{tmp_path}/all/0.jpg,query\n", r"line 3: .*all/0\.jpg is on line 2 too"),
        ("file,split\n", r"list\.csv: lists no images"),
        ("file,split\nall/0.jpg,train,ann\n", r"line 2: wanted file,split, but got 'all/0\.jpg,train,ann'"),
        ("file,split\nall/9.jpg,train\n", r"all/9\.jpg: named in .*list\.csv, but missing \(1 of 1 are\)"),
        (
            "file,split,identity\nall/0.jpg,train,a\nall/1.jpg,train,\n",
            r"1\.jpg has no identity, which 1 of 2",
        ),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            load_dataset(DataConfig(dataset="auto", root=file))


def test_several_data_sets_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images, and no data set one or two folders below"):
        recognize(tmp_path)
    write_market(tmp_path / "a")
    write_market(tmp_path / "b")
    with pytest.raises(UserError, match=r"2 data sets inside \(a, b\)"):
        recognize(tmp_path)
