"""Layouts of data sets are recognized from the names of folders and files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mprd.config.loading import parse_override
from mprd.data.recognition import TREE_PATTERNS, recognize
from mprd.errors import UserError
from tests.trees import write_images, write_market, write_msmt17


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
    assert (layout.name, layout.preset, layout.root, layout.problem) == (name, preset, tmp_path / place, "")
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
    assert (layout.name, layout.preset) == (name, preset)


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
        (["cam1/a.jpg", "cam2/b.jpg"], r"^[cC](?:am|amera)?[-_]?(?P<camid>\d+)/"),
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
    for pattern in TREE_PATTERNS:
        assert parse_override(f"data.name_pattern={pattern}") == {"data": {"name_pattern": pattern}}


def test_several_data_sets_and_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images, and no data set one or two folders below"):
        recognize(tmp_path)
    write_market(tmp_path / "a")
    write_market(tmp_path / "b")
    with pytest.raises(UserError, match=r"2 data sets inside \(a, b\)"):
        recognize(tmp_path)
