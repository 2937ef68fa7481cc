from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from mprd.config.schema import DataConfig, SyntheticConfig
from mprd.data.datasets import ReidDataset, load_dataset, log_warnings
from mprd.data.layouts import list_images
from mprd.errors import UserError
from tests.trees import ints, write_image, write_images, write_market

MSMT17 = [
    "0000_000_01_0303morning_0008_0.jpg",
    "0000_010_14_0303noon_0011_0_ex.jpg",
    "0001_001_12_0303morning_0018_1.jpg",
]


def load(root: Path, dataset: str = "market1501", **settings: object) -> ReidDataset:
    config = DataConfig.model_validate({"dataset": dataset, "root": root, **settings})
    return load_dataset(config, cache_dir=root / "cache")


def names(paths: tuple[Path, ...]) -> list[str]:
    return [path.name for path in paths]


def write_msmt17(root: Path, *, train: str = "train", test: str = "test") -> Path:
    lists = {
        "list_train.txt": (train, [f"0001/{MSMT17[2]} 1", f"0000/{MSMT17[0]} 0"]),
        "list_val.txt": (train, [f"0000/{MSMT17[1]} 0"]),
        "list_query.txt": (test, ["0000/0000_000_03_0113afternoon_0099_0.jpg 0"]),
        "list_gallery.txt": (test, ["0000/0000_001_01_0113noon_0199_0.jpg 0", "0002/0002_001_12_0113noon_0_0.jpg 2"]),
    }
    for file, (folder, lines) in lists.items():
        write_images(root / folder, [line.split()[0] for line in lines])
        (root / file).write_text("\n".join(lines) + "\n")
    return root


def test_market_is_read_in_sorted_order_with_cameras_from_0_and_without_junk(tmp_path: Path) -> None:
    data = load(write_market(tmp_path))
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
    assert (data.num_cameras, len(data.query), len(data.gallery)) == (2, 1, 2)


def test_a_root_one_folder_too_high_is_understood(tmp_path: Path) -> None:
    write_market(tmp_path / "Market-1501-v15.09.15")
    (tmp_path / "readme").mkdir()
    assert len(load(tmp_path).train) == 4


def test_two_data_sets_below_the_root_are_refused_by_name(tmp_path: Path) -> None:
    write_market(tmp_path / "a")
    write_market(tmp_path / "b")
    with pytest.raises(UserError, match=r"2 data sets inside \(a, b\)"):
        load(tmp_path)


def test_files_that_are_no_images_are_passed_over(tmp_path: Path) -> None:
    write_market(tmp_path)
    (tmp_path / "bounding_box_train" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "bounding_box_train" / "._0002_c1s1_000451_03.jpg").write_bytes(b"x")
    assert len(load(tmp_path).train) == 4


def test_duke_names_and_two_digit_cameras_parse(tmp_path: Path) -> None:
    write_images(tmp_path / "bounding_box_train", ["0001_c2_f0046182.jpg", "0001_c10_f0046182.jpg", "0005_c11.jpg"])
    write_images(tmp_path / "query", ["0005_c2_f0046985.jpg"])
    write_images(tmp_path / "bounding_box_test", ["0005_c10_f0047105.jpg"])
    data = load(tmp_path, "dukemtmcreid")
    assert names(data.train.paths) == ["0001_c10_f0046182.jpg", "0001_c2_f0046182.jpg", "0005_c11.jpg"]
    assert ints(data.train.camids) == [1, 0, 2]
    assert data.num_cameras == 3


@pytest.mark.parametrize(("train", "test"), [("train", "test"), ("mask_train_v2", "mask_test_v2")])
def test_both_official_msmt17_versions_train_on_list_train_and_list_val(tmp_path: Path, train: str, test: str) -> None:
    data = load(write_msmt17(tmp_path / "MSMT17", train=train, test=test).parent, "msmt17")
    assert names(data.train.paths) == MSMT17
    assert ints(data.train.pids) == [0, 0, 1]
    # cameras 1, 3, 12, 14 over all splits
    assert ints(data.train.camids) == [0, 3, 2]
    assert ints(data.gallery.pids) == [0, 2]
    assert data.num_cameras == 4


def test_the_market_copy_of_msmt17_is_read(tmp_path: Path) -> None:
    data = load(write_market(tmp_path), "msmt17")
    assert (len(data.train), len(data.query), len(data.gallery)) == (4, 1, 2)


def test_an_image_that_a_list_names_and_is_not_there_is_named(tmp_path: Path) -> None:
    write_msmt17(tmp_path)
    (tmp_path / "train" / "0001" / MSMT17[2]).unlink()
    with pytest.raises(UserError, match=r"0001_001_12_0303morning_0018_1\.jpg: .*missing \(1 of 3 are\)"):
        load(tmp_path, "msmt17")


def test_a_list_line_that_does_not_parse_is_named(tmp_path: Path) -> None:
    (write_msmt17(tmp_path) / "list_query.txt").write_text("0000/none.jpg 0\n")
    with pytest.raises(UserError, match=r"list_query\.txt: '0000/none\.jpg 0' does not parse \(1 of 1"):
        load(tmp_path, "msmt17")


@pytest.mark.parametrize("file", ["list_val.txt", "list_gallery.txt"])
def test_a_missing_list_is_named(tmp_path: Path, file: str) -> None:
    (write_msmt17(tmp_path) / file).unlink()
    with pytest.raises(UserError, match=file):
        load(tmp_path, "msmt17")


def test_an_empty_list_is_named(tmp_path: Path) -> None:
    (write_msmt17(tmp_path) / "list_query.txt").write_text("\n")
    with pytest.raises(UserError, match=r"no images in list_query\.txt"):
        load(tmp_path, "msmt17")


def test_msmt17_lists_without_their_folders_say_which_are_wanted(tmp_path: Path) -> None:
    (tmp_path / "list_train.txt").write_text("")
    with pytest.raises(UserError, match=r"wanted a folder train or mask_train_v2, but found list_train\.txt"):
        load(tmp_path, "msmt17")


def test_a_missing_root_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder"):
        load(tmp_path / "nowhere")


def test_a_root_of_another_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    write_image(tmp_path / "0001_c1.jpg")
    with pytest.raises(UserError, match=r"wanted a folder bounding_box_train.* but found 0001_c1\.jpg"):
        load(tmp_path)


def test_a_missing_query_folder_is_named(tmp_path: Path) -> None:
    write_images(tmp_path / "bounding_box_train", ["0001_c1.jpg"])
    with pytest.raises(UserError, match=r"query: no such folder"):
        load(tmp_path)


def test_an_empty_split_says_what_was_looked_for(tmp_path: Path) -> None:
    write_market(tmp_path)
    for file in (tmp_path / "bounding_box_test").iterdir():
        file.unlink()
    with pytest.raises(UserError, match=r"bounding_box_test: no images; looked for \*\.jpg"):
        load(tmp_path)


def test_names_that_do_not_parse_are_counted_and_the_first_is_named(tmp_path: Path) -> None:
    write_images(write_market(tmp_path) / "bounding_box_train", ["b.jpg", "a.jpg"])
    with pytest.raises(UserError, match=r"bounding_box_train/a\.jpg: the name does not parse \(2 of 6 do not\)"):
        load(tmp_path)


def test_a_training_set_of_junk_is_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "bounding_box_train", ["-1_c1.jpg"])
    write_images(tmp_path / "query", ["0001_c1.jpg"])
    write_images(tmp_path / "bounding_box_test", ["0001_c1.jpg"])
    with pytest.raises(UserError, match="no training images but junk"):
        load(tmp_path)


def test_counts_other_than_the_published_ones_are_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    load(write_market(tmp_path))
    assert "4 training images of 2 identities, 1 query, 2 gallery" in caplog.text
    assert "the published market1501 has 12936 of 751, 3368, 15913" in caplog.text


def test_the_published_counts_of_msmt17_and_duke_are_known(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_market(tmp_path)
    load(tmp_path, "msmt17")
    load(tmp_path, "dukemtmcreid")
    assert "msmt17 has 32621 of 1041, 11659, 82161" in caplog.text
    assert "dukemtmcreid has 16522 of 702, 2228, 17661" in caplog.text


def test_one_camera_alone_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path / "bounding_box_train", ["0001_c1_0.jpg"])
    write_images(tmp_path / "query", ["0002_c1_0.jpg"])
    write_images(tmp_path / "bounding_box_test", ["0002_c1_1.jpg"])
    assert load(tmp_path).num_cameras == 1
    assert "one camera only" in caplog.text


def test_a_folder_without_ids_is_a_training_set_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_images(tmp_path, ["b/2.png", "a/10.JPG", "a/9.jpg"])
    data = load(tmp_path, "folder", name_pattern="")
    assert [path.relative_to(tmp_path).as_posix() for path in data.train.paths] == ["a/10.JPG", "a/9.jpg", "b/2.png"]
    assert data.train.pids is None
    assert data.train.camids is None
    assert (len(data.query), len(data.gallery), data.num_cameras) == (0, 0, 0)
    assert "0 query and 0 gallery images: no evaluation" in caplog.text


def test_a_folder_pattern_may_read_ids_from_subfolders_and_words(tmp_path: Path) -> None:
    write_images(tmp_path, ["zoe/door_1.jpg", "adam/yard_1.jpg", "zoe/yard_2.jpg"])
    data = load(tmp_path, "folder", name_pattern=r"^(?P<pid>\w+)/(?P<camid>[a-z]+)")
    # adam, zoe, zoe; yard, door, yard
    assert ints(data.train.pids) == [0, 1, 1]
    assert ints(data.train.camids) == [1, 0, 1]


def test_a_folder_with_ids_alone_has_no_cameras(tmp_path: Path) -> None:
    write_images(tmp_path, ["5_a.jpg", "40_b.jpg"])
    data = load(tmp_path, "folder", name_pattern=r"^(?P<pid>\d+)")
    assert ints(data.train.pids) == [40, 5]
    assert data.train.camids is None


@pytest.mark.parametrize(("train", "gallery"), [("train", "gallery"), ("bounding_box_train", "bounding_box_test")])
def test_a_folder_with_query_and_gallery_is_evaluated(tmp_path: Path, train: str, gallery: str) -> None:
    write_images(tmp_path / train, ["1_c3.jpg", "2_c7.jpg"])
    write_images(tmp_path / "query", ["9_c3.jpg"])
    write_images(tmp_path / gallery, ["9_c7.jpg", "8_c3.jpg"])
    data = load(tmp_path, "folder")
    assert (len(data.train), len(data.query), len(data.gallery)) == (2, 1, 2)
    assert ints(data.gallery.pids) == [8, 9]
    assert ints(data.gallery.camids) == [0, 1]


def test_a_folder_one_level_too_high_does_not_train_on_its_gallery(tmp_path: Path) -> None:
    write_market(tmp_path / "inner")
    assert len(load(tmp_path, "folder").train) == 4


def test_query_and_gallery_without_a_training_folder_are_refused(tmp_path: Path) -> None:
    write_images(tmp_path / "query", ["9_c3.jpg"])
    write_images(tmp_path / "gallery", ["9_c7.jpg"])
    with pytest.raises(UserError, match="wanted a folder train or bounding_box_train beside query and gallery"):
        load(tmp_path, "folder")


def test_query_and_gallery_without_identities_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("train", "query", "gallery"):
        write_image(tmp_path / name / "1.jpg")
    data = load(tmp_path, "folder", name_pattern="")
    assert (len(data.train), len(data.query), len(data.gallery)) == (1, 0, 0)
    assert "no group pid" in caplog.text


def test_a_name_pattern_that_is_no_expression_is_refused(tmp_path: Path) -> None:
    write_image(tmp_path / "1.jpg")
    with pytest.raises(UserError, match=r"data\.name_pattern: not a regular expression"):
        load(tmp_path, "folder", name_pattern="(")


def test_a_group_that_matches_nothing_counts_as_a_name_that_does_not_parse(tmp_path: Path) -> None:
    write_images(tmp_path, ["1_c2.jpg", "1.jpg"])
    with pytest.raises(UserError, match=r"1\.jpg: the name does not parse \(1 of 2"):
        load(tmp_path, "folder", name_pattern=r"(?P<pid>\d+)(_c(?P<camid>\d+))?")


def test_camstyle_pictures_are_no_training_images(tmp_path: Path) -> None:
    write_images(tmp_path, ["1_c2.jpg", "bounding_box_train_camstyle/1_c2_fake_2to1.jpg", ".cache/1_c1.jpg"])
    assert list_images(tmp_path) == ["1_c2.jpg"]


def test_an_empty_folder_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images; looked for"):
        load(tmp_path, "folder")


def test_drawn_pedestrians_are_drawn_once_for_each_setting(tmp_path: Path) -> None:
    settings = {"num_train_ids": 2, "num_test_ids": 2, "num_cameras": 2, "images_per_camera": 1}
    config = DataConfig(synthetic=SyntheticConfig.model_validate(settings))
    first = load_dataset(config, cache_dir=tmp_path / "new")
    assert (first.num_cameras, len(np.unique(first.train.pids))) == (2, 2)
    drawn_at = first.train.paths[0].stat().st_mtime_ns
    again = load_dataset(config, cache_dir=tmp_path / "new")
    assert again.train.paths == first.train.paths
    assert again.train.paths[0].stat().st_mtime_ns == drawn_at
    other = DataConfig(synthetic=SyntheticConfig.model_validate({**settings, "seed": 1}))
    assert load_dataset(other, cache_dir=tmp_path / "new").root != first.root


def test_a_folder_for_drawn_pedestrians_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root: data\.dataset=synthetic takes no folder"):
        load(tmp_path, "synthetic")


def test_drawn_pedestrians_have_no_published_counts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        data = load(write_market(tmp_path))
        caplog.clear()
        log_warnings(ReidDataset("synthetic", tmp_path, data.train, data.query, data.gallery, 2, None))
    assert caplog.text == ""
