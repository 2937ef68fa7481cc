"""Images are found by folder, list or glob, and ids are read from their names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mprd.config.schema import DataConfig
from mprd.errors import UserError
from mprd.extract.inputs import find_images, ids_from_name, name_patterns


def test_a_folder_a_list_and_a_glob_name_the_same_images(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_root)
    folder = find_images("query")
    assert folder.names[0] == "0007_c1s1_000001_01.jpg"
    assert folder.paths == sorted(map(str, (tiny_root / "query").iterdir()))
    assert find_images(f"{tiny_root}/query").paths == folder.paths
    assert find_images("query/*.jpg") == (folder.paths, [f"query/{name}" for name in folder.names])
    assert find_images("**/*c1s1*1_01.jpg").names[-1] == "query/0010_c1s1_000001_01.jpg"
    lines = tmp_path / "list.txt"
    lines.write_text(f"b.png\n\n{tiny_root}/query/../query/x.jpg\n")
    assert find_images(str(lines)).paths == [f"{tmp_path}/b.png", f"{tiny_root}/query/x.jpg"]
    assert find_images(folder.paths[3]).paths == [folder.paths[3]]


def test_a_glob_reads_what_a_folder_would(tiny_root: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_root / "query", tmp_path / "cam1"))
    (folder / "back").symlink_to(tmp_path)
    (folder / "gone.jpg").symlink_to("nowhere")
    (folder / "@eaDir").mkdir()
    shutil.copy(min((tiny_root / "query").iterdir()), folder / "@eaDir" / "thumb.jpg")
    assert find_images(f"{tmp_path}/**/*.jpg").paths == find_images(str(tmp_path)).paths
    assert len(find_images(str(tmp_path)).paths) == 8


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("absent", "absent: no such folder, list or image"),
        ("*.png", r"\*\.png: no images; looked for \*\.jpg"),
        ("empty", "empty: no images; looked for"),
        ("empty.txt", r"empty\.txt: no images; looked for a path a line"),
    ],
)
def test_a_source_without_images_is_refused(source: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=message):
        find_images(str(tmp_path / source))


FOLDER = DataConfig(dataset="folder", root=Path("x"), name_pattern=r"of(?P<pid>\d+)")
OWN = r"cam(?P<camid>\w+)/p(?P<pid>\d+)"


@pytest.mark.parametrize(
    ("name", "config", "pattern", "ids"),
    [
        ("0002_c1s1_000451_03.jpg", DataConfig(), None, (2, 1)),
        ("gallery/-1_c06s1.jpg", DataConfig(), None, (-1, 6)),
        ("0000/0000_000_01_0303morning_0008_0.jpg", DataConfig(), None, (0, 1)),
        ("holiday.jpg", DataConfig(), None, (None, None)),
        ("cam4/p0031/7.jpg", DataConfig(), OWN, (31, 4)),
        ("camNorth/p5/7.jpg", DataConfig(), OWN, (5, None)),
        ("shot_of12.png", FOLDER, None, (12, None)),
        ("shot_of12.png", FOLDER, "nothing", (None, None)),
    ],
)
def test_ids_are_read_by_the_given_pattern_or_that_of_the_data_set(
    name: str, config: DataConfig, pattern: str | None, ids: tuple
) -> None:
    assert ids_from_name(name, name_patterns(config, pattern)) == ids


def test_an_invalid_pattern_is_refused() -> None:
    with pytest.raises(UserError, match="--name-pattern: not a regular expression"):
        name_patterns(DataConfig(), "(")
