"""Drawn pedestrians: same settings, same bytes; Market's rules hold; hard for colours."""

from __future__ import annotations

import errno
import json
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from mprd.config.schema import SyntheticConfig
from mprd.data.synthetic import dataset as synthetic
from mprd.data.synthetic.cameras import draw_cameras
from mprd.data.synthetic.dataset import draw_shot, encode, plan_dataset, write_dataset
from mprd.data.synthetic.pedestrians import DETAILS
from mprd.errors import UserError

SPLITS = ("bounding_box_train", "query", "bounding_box_test")
MARKET = re.compile(r"(-1|\d{4})_c(\d)s1_(\d{6})_(\d{2})\.jpg")
SMALL = {"num_train_ids": 6, "num_test_ids": 6, "num_cameras": 3, "images_per_camera": 3}


def settings(**changes: Any) -> SyntheticConfig:
    return SyntheticConfig.model_validate({**SMALL, **changes})


def draw(root: Path, **changes: Any) -> Path:
    write_dataset(root, settings(**changes))
    return root


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw(tmp_path_factory.mktemp("drawn") / "small")


@pytest.fixture
def copy(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small, tmp_path / "copy"))


def read_bytes(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def read_ids(root: Path, split: str) -> list[tuple[int, int]]:
    found = [MARKET.fullmatch(path.name) for path in sorted((root / split).iterdir())]
    assert all(found)
    return [(int(match[1]), int(match[2])) for match in found if match]


def assert_queries_have_matches(root: Path) -> None:
    gallery = read_ids(root, "bounding_box_test")
    for pid, camid in read_ids(root, "query"):
        assert any(other == pid and place != camid for other, place in gallery)


def test_the_same_settings_draw_the_same_bytes(small: Path, tmp_path: Path) -> None:
    assert read_bytes(draw(tmp_path / "again")) == read_bytes(small)


def test_another_process_draws_the_same_bytes(small: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom mprd.config.schema import SyntheticConfig\n"
        "from mprd.data.synthetic.dataset import *\n"
        f"write_dataset(Path({str(tmp_path / 'again')!r}), SyntheticConfig(**{SMALL}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"})
    assert read_bytes(tmp_path / "again") == read_bytes(small)


def test_an_image_does_not_depend_on_what_was_drawn_before(small: Path) -> None:
    plan = plan_dataset(settings())
    for shot in plan.shots[::-9]:
        drawn = encode(draw_shot(shot, plan, seed=0))
        assert drawn == (small / synthetic.FOLDERS[shot.split] / shot.name).read_bytes()


def test_another_seed_draws_other_people_under_other_cameras(small: Path, tmp_path: Path) -> None:
    first, second = read_bytes(small), read_bytes(draw(tmp_path / "other", seed=1))
    assert first.keys() != second.keys()
    shared = first.keys() & second.keys()
    assert "bounding_box_train/0001_c1s1_000001_01.jpg" in shared
    assert [name for name in shared if first[name] == second[name]] == []


def test_all_images_are_128_by_64_jpegs(small: Path) -> None:
    for split in SPLITS:
        for path in (small / split).iterdir():
            with Image.open(path) as image:
                assert (image.size, image.mode, image.format) == ((64, 128), "RGB", "JPEG")


def test_pictures_are_neither_black_nor_flat(tmp_path: Path) -> None:
    for gap in (0, 1, 3):
        root = draw(tmp_path / str(gap), camera_gap=gap, num_train_ids=1, num_test_ids=1)
        pixels = np.stack([np.asarray(Image.open(path)) for path in root.rglob("*.jpg")]).astype(float)
        assert 20 < pixels.mean() < 235
        assert pixels.std(axis=(1, 2, 3)).min() > 5


def test_no_identity_is_in_both_halves(small: Path) -> None:
    train, query, gallery = ({pid for pid, _ in read_ids(small, split)} for split in SPLITS)
    assert train == {1, 2, 3, 4, 5, 6}
    assert query == {7, 8, 9, 10, 11, 12}
    assert gallery - {0, -1} == query


def test_every_identity_is_seen_by_two_cameras_or_more(small: Path) -> None:
    places = {pair for split in SPLITS for pair in read_ids(small, split) if pair[0] > 0}
    assert min(Counter(pid for pid, _ in places).values()) >= 2


def test_a_camera_has_no_more_images_of_an_identity_than_asked_for(small: Path) -> None:
    counts = Counter(pair for split in SPLITS for pair in read_ids(small, split) if pair[0] > 0)
    assert max(counts.values()) == 3


def test_an_identity_has_one_query_under_each_of_its_cameras(small: Path) -> None:
    query, gallery = read_ids(small, "query"), read_ids(small, "bounding_box_test")
    assert len(query) == len(set(query))
    assert set(query) == {pair for pair in gallery if pair[0] > 0}


def test_every_query_has_a_match_under_another_camera(small: Path) -> None:
    assert_queries_have_matches(small)


def test_one_image_a_camera_still_leaves_a_match_for_every_query(tmp_path: Path) -> None:
    assert_queries_have_matches(draw(tmp_path / "least", images_per_camera=1, num_cameras=2))


def test_one_camera_and_one_identity_can_be_drawn(tmp_path: Path) -> None:
    root = draw(tmp_path / "one", num_cameras=1, num_train_ids=1, num_test_ids=1)
    assert set(read_ids(root, "bounding_box_train")) == {(1, 1)}
    assert read_ids(root, "query") == [(2, 1)]


def test_the_gallery_has_a_few_distractors_and_junk() -> None:
    shots = plan_dataset(SyntheticConfig()).shots
    pids = [shot.pid for shot in shots if shot.split == "gallery"]
    num_identified = sum(pid > 0 for pid in pids)
    assert pids.count(0) == round(0.05 * num_identified) > 10
    assert pids.count(-1) == round(0.03 * num_identified) > 10


def test_the_default_has_about_two_thousand_images() -> None:
    assert 1700 < len(plan_dataset(SyntheticConfig()).shots) < 2300


def test_the_manifest_tells_what_is_there(small: Path) -> None:
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["config"] == {**SMALL, "lookalike_share": 0.5, "camera_gap": 1.0, "seed": 0}
    for name, split in zip(("train", "query", "gallery"), SPLITS, strict=True):
        ids = read_ids(small, split)
        assert manifest["counts"][name] == len(ids)
        assert manifest["pids"][name] == sorted({pid for pid, _ in ids})


def test_lookalikes_share_the_clothes_of_their_models() -> None:
    plan = plan_dataset(settings(num_train_ids=30, num_test_ids=30, lookalike_share=1))
    assert sorted(plan.models) == [pid for pid in range(1, 61) if pid not in (1, 31)]
    for pid, model in plan.models.items():
        assert (pid <= 30) == (model <= 30)
        assert pid - 6 <= model < pid
        one, other = plan.appearances[pid], plan.appearances[model]
        # dyed anew with a deviation of 5 gray levels
        assert np.abs(np.subtract(one.top, other.top)).max() < 25
        assert np.abs(np.subtract(one.bottom, other.bottom)).max() < 25
        assert sum(getattr(one, name) == getattr(other, name) for name in DETAILS) >= 4
        assert one != other


def test_as_many_identities_are_lookalikes_as_asked_for() -> None:
    def count(share: float) -> int:
        return len(plan_dataset(settings(num_train_ids=200, num_test_ids=200, lookalike_share=share)).models)

    assert count(0) == 0
    # 398 identities can resemble an earlier one; four standard deviations are 40
    assert 159 < count(0.5) < 239


def test_cameras_without_a_gap_have_neutral_colours() -> None:
    for camera in draw_cameras(np.random.default_rng(0), 4, gap=0):
        assert camera.gains.tolist() == [1, 1, 1]
        assert (camera.saturation, camera.light) == (1, 0)
        assert np.allclose(camera.curve, np.linspace(0, 255, 1024), atol=1e-5)


def test_cameras_differ_in_all_that_the_gap_scales() -> None:
    cameras = draw_cameras(np.random.default_rng(0), 5, gap=1)
    gains = sorted(float(camera.gains.mean()) for camera in cameras)
    assert gains[-1] - gains[0] > 0.15
    assert all(low < high for low, high in pairwise(gains))


def test_a_complete_data_set_is_left_alone(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    draw(copy)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


def test_other_settings_are_refused_with_the_first_that_differs(copy: Path) -> None:
    with pytest.raises(UserError, match=r"copy: a synthetic data set of other settings \(seed 0, wanted 3\)"):
        draw(copy, seed=3)


def test_another_version_of_the_drawing_is_refused(copy: Path) -> None:
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, "version": 0}))
    with pytest.raises(UserError, match="another format version"):
        draw(copy)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"config": 3}'])
def test_a_broken_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="copy: "):
        draw(copy)


def test_a_data_set_that_lost_an_image_is_refused(copy: Path) -> None:
    next((copy / "query").iterdir()).unlink()
    with pytest.raises(UserError, match=r"query: wanted \d+ images, but found \d+"):
        draw(copy)


def test_a_folder_of_something_else_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="exists, but has no readable manifest"):
        draw(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_a_file_in_place_of_the_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: exists"):
        draw(tmp_path / "file")


def test_an_empty_folder_is_filled_and_missing_parents_are_made(small: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert read_bytes(draw(tmp_path / "empty")) == read_bytes(small)
    assert read_bytes(draw(tmp_path / "a" / "b")) == read_bytes(small)


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "no space"), UserError)]
)
def test_a_write_that_breaks_off_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, raised: type[BaseException]
) -> None:
    num_calls = 0

    def fail_at_the_tenth(image: Image.Image) -> bytes:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 10:
            raise error
        return encode(image)

    monkeypatch.setattr(synthetic, "encode", fail_at_the_tenth)
    with pytest.raises(raised):
        draw(tmp_path / "root")
    assert num_calls == 10
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_leaves_nothing_under_the_final_name(small: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom mprd.config.schema import SyntheticConfig\n"
        "from mprd.data.synthetic.dataset import *\n"
        f"write_dataset(Path({str(tmp_path / 'root')!r}), SyntheticConfig(num_train_ids=1000))"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    while process.poll() is None and not any(tmp_path.rglob("*.jpg")):
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert any(tmp_path.rglob("*.jpg"))
    assert not (tmp_path / "root").exists()
    assert read_bytes(draw(tmp_path / "root")) == read_bytes(small)


def test_two_writers_of_the_same_data_set_do_not_disturb_each_other(small: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        roots = list(pool.map(draw, [tmp_path / "root"] * 2))
    assert read_bytes(roots[0]) == read_bytes(small)
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


class Images(NamedTuple):
    pixels: np.ndarray  # uint8 [n, 128, 64, 3]
    pids: list[int]
    camids: list[int]


def read_images(root: Path, split: str, *, mode: str, columns: slice) -> Images:
    """Read images in a colour space, the given columns alone."""
    paths = sorted((root / split).iterdir())
    pixels = [np.asarray(Image.open(path).convert(mode))[:, columns] for path in paths]
    pids, camids = zip(*read_ids(root, split), strict=True)
    return Images(np.stack(pixels), list(pids), list(camids))


def histograms(pixels: np.ndarray) -> np.ndarray:
    """Count 8 x 8 x 8 colours, `[n, 512]`."""
    bins = pixels.astype(int) // 32
    codes = (bins[..., 0] * 64 + bins[..., 1] * 8 + bins[..., 2]).reshape(len(pixels), -1)
    return np.stack([np.bincount(row, minlength=512) for row in codes])


def histogram_rank1(root: Path, *, mode: str, columns: slice) -> float:
    """Match each query to the gallery image with the largest histogram intersection, by the Market protocol."""
    query = read_images(root, "query", mode=mode, columns=columns)
    gallery = read_images(root, "bounding_box_test", mode=mode, columns=columns)
    query_bins, gallery_bins = histograms(query.pixels), histograms(gallery.pixels)
    hits = []
    for bins, pid, camid in zip(query_bins, query.pids, query.camids, strict=True):
        shared = np.minimum(bins, gallery_bins).sum(axis=1)
        # junk is ignored, and so are the identity's other images under the query's own camera
        is_out = [
            other == -1 or (other == pid and place == camid)
            for other, place in zip(gallery.pids, gallery.camids, strict=True)
        ]
        best = int(np.where(is_out, -1, shared).argmax())
        hits.append(gallery.pids[best] == pid)
    return float(np.mean(hits))


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, size = tmp_path_factory.mktemp("many"), {"num_train_ids": 1, "num_test_ids": 40, "num_cameras": 5}
    return {name: draw(root / name, **size, camera_gap=gap) for name, gap in (("apart", 1), ("alike", 0))}


@pytest.mark.parametrize("mode", ["RGB", "HSV"])
def test_a_colour_histogram_fails_across_cameras(many: dict[str, Path], mode: str) -> None:
    assert histogram_rank1(many["apart"], mode=mode, columns=slice(0, 64)) < 0.1
    # without most of the background it does better, but not well
    assert histogram_rank1(many["apart"], mode=mode, columns=slice(20, 44)) < 0.3


@pytest.mark.parametrize("mode", ["RGB", "HSV"])
def test_the_same_histogram_does_well_where_cameras_have_the_same_colours(many: dict[str, Path], mode: str) -> None:
    assert histogram_rank1(many["alike"], mode=mode, columns=slice(20, 44)) > 0.4
