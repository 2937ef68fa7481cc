"""The synthetic data set: determined by its settings, in Market-1501's protocol, and not solved by color histograms."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from mprd.data.synthetic import dataset as synthetic
from mprd.data.synthetic.cameras import draw_cameras
from mprd.data.synthetic.dataset import Drawing, choose_models, draw_shot, encode, plan_dataset, write_dataset
from mprd.data.synthetic.pedestrians import DETAILS
from mprd.errors import UserError

SPLITS = ("bounding_box_train", "query", "bounding_box_test")
MARKET = re.compile(r"(-1|\d{4})_c(\d)s1_(\d{6})_(\d{2})\.jpg")
SMALL = {"num_train_ids": 6, "num_test_ids": 6, "num_cameras": 3, "images_per_camera": 3}
ONE = {"num_train_ids": 1, "num_test_ids": 1, "num_cameras": 1}


def settings(**changes: Any) -> Drawing:
    return Drawing(**{**SMALL, **changes})


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


def test_the_same_settings_draw_the_same_bytes_in_another_process(small: Path, tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\n"
        "from mprd.data.synthetic.dataset import Drawing, write_dataset\n"
        f"write_dataset(Path({str(tmp_path / 'again')!r}), Drawing(**{SMALL}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONHASHSEED": "7"})
    assert read_bytes(tmp_path / "again") == read_bytes(small)


def test_an_image_does_not_depend_on_what_was_drawn_before(small: Path) -> None:
    plan = plan_dataset(settings())
    for shot in plan.shots[::-9]:
        drawn = encode(draw_shot(shot, plan, seed=0))
        assert drawn == (small / synthetic.FOLDERS[shot.split] / shot.name).read_bytes()


def test_another_seed_draws_other_identities_and_cameras(small: Path, tmp_path: Path) -> None:
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


def test_images_are_neither_black_nor_flat(tmp_path: Path) -> None:
    for gap in (0, 1, 3):
        root = draw(tmp_path / str(gap), camera_gap=gap, num_train_ids=1, num_test_ids=1)
        pixels = np.stack([np.asarray(Image.open(path)) for path in root.rglob("*.jpg")]).astype(float)
        assert 20 < pixels.mean() < 235
        assert pixels.std(axis=(1, 2, 3)).min() > 5


def test_the_splits_follow_the_market_protocol(small: Path) -> None:
    train, query, gallery = (read_ids(small, split) for split in SPLITS)
    assert {pid for pid, _ in train} == {1, 2, 3, 4, 5, 6}
    assert {pid for pid, _ in query} == {7, 8, 9, 10, 11, 12}
    # one query for each camera of an identity
    assert len(query) == len(set(query))
    assert set(query) == {pair for pair in gallery if pair[0] > 0}
    counts = Counter(pair for pair in train + query + gallery if pair[0] > 0)
    assert max(counts.values()) == 3
    assert min(Counter(pid for pid, _ in counts).values()) >= 2


@pytest.mark.parametrize("changes", [{}, {"images_per_camera": 1, "num_cameras": 2}])
def test_every_query_has_a_match_under_another_camera(tmp_path: Path, changes: dict[str, int]) -> None:
    shots = plan_dataset(settings(**changes)).shots
    gallery = [shot for shot in shots if shot.split == "gallery"]
    for query in (shot for shot in shots if shot.split == "query"):
        assert any(shot.pid == query.pid and shot.camid != query.camid for shot in gallery)


def test_one_camera_and_one_identity_can_be_drawn(tmp_path: Path) -> None:
    root = draw(tmp_path / "one", **ONE)
    assert set(read_ids(root, "bounding_box_train")) == {(1, 1)}
    assert read_ids(root, "query") == [(2, 1)]


def test_the_gallery_has_a_few_distractors_and_junk() -> None:
    shots = plan_dataset(Drawing()).shots
    pids = [shot.pid for shot in shots if shot.split == "gallery"]
    num_identified = sum(pid > 0 for pid in pids)
    assert pids.count(0) == round(0.05 * num_identified) > 10
    assert pids.count(-1) == round(0.03 * num_identified) > 10


def test_the_default_has_about_two_thousand_images() -> None:
    assert 1700 < len(plan_dataset(Drawing()).shots) < 2300


def test_the_manifest_lists_settings_and_counts(small: Path) -> None:
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["version"] == 1
    assert manifest["config"] == {**SMALL, "lookalike_share": 0.5, "camera_gap": 0.6, "seed": 0}
    for name, split in zip(("train", "query", "gallery"), SPLITS, strict=True):
        assert manifest["counts"][name] == len(read_ids(small, split))


def test_look_alikes_share_the_clothes_of_their_models() -> None:
    config = settings(num_train_ids=30, num_test_ids=30, lookalike_share=1)
    plan, models = plan_dataset(config), choose_models(range(1, 31), config) | choose_models(range(31, 61), config)
    assert sorted(models) == [pid for pid in range(1, 61) if pid not in (1, 31)]
    for pid, model in models.items():
        assert (pid <= 30) == (model <= 30)
        assert pid - 6 <= model < pid
        one, other = plan.appearances[pid], plan.appearances[model]
        # drawn with a deviation of 5 gray levels
        assert np.abs(np.subtract(one.top, other.top)).max() < 25
        assert np.abs(np.subtract(one.bottom, other.bottom)).max() < 25
        assert sum(getattr(one, name) == getattr(other, name) for name in DETAILS) >= 4
        assert one != other


def test_the_share_of_look_alikes_is_the_configured_one() -> None:
    def count(share: float) -> int:
        return len(choose_models(range(1, 401), settings(lookalike_share=share)))

    assert count(0) == 0
    # 399 identities can resemble an earlier one; four standard deviations are 40
    assert 159 < count(0.5) < 240


def test_cameras_without_a_gap_have_neutral_colors() -> None:
    for camera in draw_cameras(np.random.default_rng(0), 4, gap=0):
        assert camera.gains.tolist() == [1, 1, 1]
        assert (camera.saturation, camera.light) == (1, 0)
        assert np.allclose(camera.curve, np.linspace(0, 255, 1024), atol=1e-5)


def test_cameras_differ_in_all_that_the_gap_scales() -> None:
    cameras = draw_cameras(np.random.default_rng(0), 5, gap=1)
    gains = sorted(float(camera.gains.mean()) for camera in cameras)
    assert gains[-1] - gains[0] > 0.15
    assert all(low < high for low, high in pairwise(gains))


def test_a_complete_data_set_is_not_changed(copy: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in copy.rglob("*")}
    draw(copy)
    assert {path: path.stat().st_mtime_ns for path in copy.rglob("*")} == before


@pytest.mark.parametrize("text", ["", "{", "[]", '{"counts": 3}', '{"counts": {"train": 3}}'])
def test_a_broken_manifest_is_refused(copy: Path, text: str) -> None:
    (copy / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="copy: exists, but has no readable manifest"):
        draw(copy)


def test_a_data_set_that_lost_an_image_is_refused(copy: Path) -> None:
    next((copy / "query").iterdir()).unlink()
    with pytest.raises(UserError, match=r"copy: incomplete, query has \d+ of \d+ images; remove it"):
        draw(copy)


def test_another_folder_or_a_file_is_refused_and_kept(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for root in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match="exists, but has no readable manifest"):
            draw(root)
    assert (tmp_path / "file").read_text() == "text"


def test_parents_are_created(small: Path, tmp_path: Path) -> None:
    assert read_bytes(draw(tmp_path / "a" / "b")) == read_bytes(small)


@pytest.mark.parametrize(
    ("error", "raised"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError(errno.ENOSPC, "no space"), UserError)]
)
def test_an_interrupted_write_leaves_nothing(
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


def test_two_writers_of_the_same_data_set_do_not_interfere(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        roots = list(pool.map(lambda root: draw(root, **ONE), [tmp_path / "root"] * 2))
    assert read_bytes(roots[0]) == read_bytes(draw(tmp_path / "other" / "root", **ONE))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "root"]


class Images(NamedTuple):
    pixels: np.ndarray  # uint8 [n, 128, 64, 3]
    pids: list[int]
    camids: list[int]


def read_images(root: Path, split: str, *, mode: str, columns: slice) -> Images:
    """Read the given columns of images in a color space."""
    paths = sorted((root / split).iterdir())
    pixels = [np.asarray(Image.open(path).convert(mode))[:, columns] for path in paths]
    pids, camids = zip(*read_ids(root, split), strict=True)
    return Images(np.stack(pixels), list(pids), list(camids))


def histograms(pixels: np.ndarray) -> np.ndarray:
    """Return histograms of 8 x 8 x 8 colors, `[n, 512]`."""
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


def test_a_color_histogram_fails_across_cameras_unless_their_colors_are_alike(tmp_path: Path) -> None:
    size = {"num_train_ids": 1, "num_test_ids": 40, "num_cameras": 5, "images_per_camera": 2}
    apart, alike = (draw(tmp_path / str(gap), **size, camera_gap=gap) for gap in (1, 0))
    for mode in ("RGB", "HSV"):
        assert histogram_rank1(apart, mode=mode, columns=slice(0, 64)) < 0.1
        # better without most of the background, but still low
        assert histogram_rank1(apart, mode=mode, columns=slice(20, 44)) < 0.3
        assert histogram_rank1(alike, mode=mode, columns=slice(20, 44)) > 0.4
