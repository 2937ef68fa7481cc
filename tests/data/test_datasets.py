"""Published layouts and trees of crops become paths, pids and camids; faulty ones are refused with the file named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from mprd.config.schema import DataConfig, SyntheticConfig
from mprd.data.datasets import ReidDataset, load_dataset
from mprd.errors import UserError
from tests.trees import MSMT17, ints, write_image, write_images, write_market, write_msmt17


def load(root: Path, dataset: str = "market1501", **settings: object) -> ReidDataset:
    config = DataConfig.model_validate({"dataset": dataset, "root": root, **settings})
    return load_dataset(config)


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def sizes(data: ReidDataset) -> tuple[int, int, int]:
    return len(data.train), len(data.query), len(data.gallery)


def write_splits(root: Path, train: list[str], query: list[str], gallery: list[str]) -> Path:
    for folder, files in (("bounding_box_train", train), ("query", query), ("bounding_box_test", gallery)):
        write_images(root / folder, files)
    return root


def test_market_is_read_in_sorted_order_with_cameras_from_0_and_without_junk(tmp_path: Path) -> None:
    train = write_market(tmp_path / "one folder above") / "bounding_box_train"
    for name in ("Thumbs.db", "._0002_c1s1_000451_03.jpg"):
        (train / name).write_bytes(b"x")
    data = load(tmp_path)
    assert names(data.train.paths) == [
        "0002_c1s1_000451_03.jpg",
        "0002_c2s1_000776_01.jpg",
        "0007_c1s3_000102_01.jpg",
        "0007_c2s3_000202_02.jpg",
    ]
    assert ints(data.train.pids) == [2, 2, 7, 7]
    assert ints(data.train.camids) == [0, 1, 0, 1]
    assert ints(data.gallery.pids) == [0, 1]
    assert ints(data.query.camids) == [0]
    assert (data.num_cameras, *sizes(data)) == (2, 4, 1, 2)


def test_duke_names_and_two_digit_cameras_parse(tmp_path: Path) -> None:
    train = ["0001_c2_f0046182.jpg", "0001_c10_f0046182.jpg", "0005_c11.jpg"]
    data = load(write_splits(tmp_path, train, ["0005_c2_f0046985.jpg"], ["0005_c10_f0047105.jpg"]), "dukemtmcreid")
    assert names(data.train.paths) == ["0001_c10_f0046182.jpg", "0001_c2_f0046182.jpg", "0005_c11.jpg"]
    assert ints(data.train.camids) == [1, 0, 2]
    assert data.num_cameras == 3


@pytest.mark.parametrize("train", ["train", "mask_train_v2"])
def test_both_official_msmt17_versions_train_on_list_train_and_list_val(tmp_path: Path, train: str) -> None:
    data = load(write_msmt17(tmp_path / "MSMT17", train=train).parent, "msmt17")
    assert names(data.train.paths) == [*MSMT17]
    assert ints(data.train.pids) == [0, 0, 1]
    # those of the training images first
    assert data.camera_numbers == (1, 12, 14, 3)
    assert ints(data.train.camids) == [0, 2, 1]
    assert ints(data.gallery.pids) == [0, 2]
    assert data.num_cameras == 4


def test_published_counts_are_logged_where_they_differ(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_market(tmp_path)
    for name in ("market1501", "msmt17", "dukemtmcreid"):
        assert sizes(load(tmp_path, name)) == (4, 1, 2)
    assert "4 training images of 2 identities, 1 query, 2 gallery" in caplog.text
    assert "the published market1501 has 12936 of 751, 3368, 15913" in caplog.text
    assert "msmt17 has 32621 of 1041, 11659, 82161" in caplog.text
    assert "dukemtmcreid has 16522 of 702, 2228, 17661" in caplog.text


def test_a_single_camera_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = load(write_splits(tmp_path, ["0001_c1_0.jpg"], ["0002_c1_0.jpg"], ["0002_c1_1.jpg"]))
    assert data.num_cameras == 1
    assert "one camera only" in caplog.text


def remove_train_image(root: Path) -> None:
    (root / "train" / "0001" / MSMT17[2]).unlink()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove_train_image, r"0001_001_12_0303morning_0018_1\.jpg: .*missing \(1 of 3 are\)"),
        (
            lambda root: (root / "list_query.txt").write_text("0000/none.jpg 0\n"),
            r"list_query\.txt: '0000/none\.jpg 0' does not parse \(1 of 1",
        ),
        (lambda root: (root / "list_query.txt").write_text("\n"), r"no images in list_query\.txt"),
        (lambda root: (root / "list_query.txt").write_bytes(b"a\0b"), r"list_query\.txt: .*not text"),
        (lambda root: (root / "list_val.txt").unlink(), r"list_val\.txt: cannot read the list"),
        (lambda root: (root / "train").rename(root / "other"), "wanted a folder train or mask_train_v2, but found"),
    ],
)
def test_faults_of_msmt17_are_named(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    change(write_msmt17(tmp_path))
    with pytest.raises(UserError, match=message):
        load(tmp_path, "msmt17")


def write_two(root: Path) -> None:
    write_market(root / "a")
    write_market(root / "b")


def empty_gallery(root: Path) -> None:
    for file in (write_market(root) / "bounding_box_test").iterdir():
        file.unlink()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: root.rmdir(), "no such folder"),
        (write_two, r"2 data sets inside \(a, b\)"),
        (lambda root: write_image(root / "0001_c1.jpg"), r"wanted images in bounding_box_train, .* but found 0001"),
        (
            lambda root: write_image(root / "bounding_box_train" / "0001_c1.jpg"),
            "wanted .* query and bounding_box_test",
        ),
        (empty_gallery, "wanted images in bounding_box_train, query and bounding_box_test"),
        (
            lambda root: write_images(write_market(root) / "bounding_box_train", ["b.jpg", "a.jpg"]),
            r"bounding_box_train/a\.jpg: the name does not parse \(2 of 6 do not\)",
        ),
        (
            lambda root: write_splits(root, ["-1_c1.jpg"], ["0001_c1.jpg"], ["0001_c1.jpg"]),
            "no training images but junk",
        ),
    ],
)
def test_faults_of_the_market_layout_are_named(tmp_path: Path, write: Callable[[Path], None], message: str) -> None:
    write(tmp_path)
    with pytest.raises(UserError, match=message):
        load(tmp_path)


def test_a_tree_without_ids_is_a_training_set_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    hidden = ["bounding_box_train_camstyle/1_c2_fake_2to1.jpg", ".cache/1_c1.jpg"]
    write_images(tmp_path, ["b/2.png", "a/10.JPG", "a/9.jpg", *hidden])
    data = load(tmp_path, "folder", name_pattern="")
    assert [path.relative_to(tmp_path).as_posix() for path in data.train.paths] == ["a/10.JPG", "a/9.jpg", "b/2.png"]
    assert data.train.pids is None
    assert data.train.camids is None
    assert (*sizes(data), data.num_cameras) == (3, 0, 0, 0)
    assert "0 query and 0 gallery images: no evaluation" in caplog.text


@pytest.mark.parametrize(
    ("files", "pattern", "pids", "camids"),
    [
        # adam, zoe, zoe; yard, door, yard
        (["zoe/door.jpg", "adam/yard.jpg", "zoe/yard_2.jpg"], r"^(?P<pid>\w+)/(?P<camid>[a-z]+)", [0, 1, 1], [1, 0, 1]),
        (["5_a.jpg", "40_b.jpg"], r"^(?P<pid>\d+)", [40, 5], None),
    ],
)
def test_ids_of_a_tree_may_be_words_or_numbers(
    tmp_path: Path, files: list[str], pattern: str, pids: list[int], camids: list[int] | None
) -> None:
    write_images(tmp_path, files)
    train = load(tmp_path, "folder", name_pattern=pattern).train
    assert (ints(train.pids), ints(train.camids)) == (pids, camids)


@pytest.mark.parametrize(("train", "gallery"), [("train", "gallery"), ("bounding_box_train", "bounding_box_test")])
def test_a_tree_with_query_and_gallery_is_evaluated(tmp_path: Path, train: str, gallery: str) -> None:
    root = tmp_path / "one folder above"
    write_images(root / train, ["1_c3.jpg", "2_c7.jpg"])
    write_images(root / "query", ["9_c3.jpg"])
    write_images(root / gallery, ["9_c7.jpg", "8_c3.jpg"])
    data = load(tmp_path, "folder")
    assert sizes(data) == (2, 1, 2)
    assert (ints(data.gallery.pids), ints(data.gallery.camids)) == ([8, 9], [0, 1])


def test_query_and_gallery_without_identities_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, ["train/1.jpg", "query/1.jpg", "gallery/1.jpg"])
    assert sizes(load(tmp_path, "folder", name_pattern="")) == (1, 0, 0)
    assert "no group pid" in caplog.text


@pytest.mark.parametrize(
    ("files", "pattern", "message"),
    [
        ([], ".", "no images, and no data set one or two folders below"),
        (["1.jpg"], "(", r"data\.name_pattern: not a regular expression"),
        (["1.jpg"], r"(?P<cam>\d)", r"data\.name_pattern: unknown group cam; the groups are pid and camid"),
        (["query/9_c3.jpg", "gallery/9_c7.jpg"], ".", "query and gallery alone, nothing to train on"),
        # an optional group that does not match
        (["1_c2.jpg", "1.jpg"], r"(?P<pid>\d+)(_c(?P<camid>\d+))?", r"1\.jpg: the name does not parse \(1 of 2"),
    ],
)
def test_faults_of_a_tree_are_named(tmp_path: Path, files: list[str], pattern: str, message: str) -> None:
    write_images(tmp_path, files)
    with pytest.raises(UserError, match=message):
        load(tmp_path, "folder", name_pattern=pattern)


def test_the_synthetic_data_set_is_drawn_once_for_each_setting(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = {"num_train_ids": 2, "num_test_ids": 2, "num_cameras": 2, "images_per_camera": 1}
    config = DataConfig(synthetic=SyntheticConfig.model_validate(settings))
    first = load_dataset(config)
    assert (first.num_cameras, len(np.unique(first.train.pids))) == (2, 2)
    drawn_at = first.train.paths[0].stat().st_mtime_ns
    again = load_dataset(config)
    assert again.train.paths == first.train.paths
    assert again.train.paths[0].stat().st_mtime_ns == drawn_at
    other = DataConfig(synthetic=SyntheticConfig.model_validate({**settings, "num_test_ids": 3}))
    assert load_dataset(other).root != first.root
    assert "published" not in caplog.text
    with pytest.raises(UserError, match=r"data\.root: data\.dataset=synthetic takes no folder"):
        load(tmp_path, "synthetic")
