"""What a command line trains with: the recipe, the user's changes, and what the data can give."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import pytest
import yaml

from mprd.config.loading import load_config, read_given
from mprd.config.schema import Config
from mprd.errors import UserError
from mprd.train.recipe import compose, read_settings
from mprd.tune.paper_results import paper_method
from tests.trees import write_image


@pytest.fixture(autouse=True)
def has_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mprd.backbone.from_torchvision.has_imagenet_weights", lambda _name: True)


def settings(data: Path | None = None, *sets: str, preset: str | None = None, smoke: bool = False) -> Config:
    return read_settings({"preset": preset, "data": data, "set_": sets, "smoke": smoke})


def method(config: Config) -> dict:
    return config.model_dump(exclude={"data": {"dataset", "root"}})


def test_a_folder_alone_is_recognized_and_trained_by_the_recommended_recipe(tiny_root: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_root, tmp_path / "one" / "two")
    config = settings(tmp_path)
    assert (config.data.dataset, config.data.root) == ("market1501", tmp_path / "one" / "two")
    assert method(config) == method(load_config("recommended", values={"data": {"root": tmp_path}}))
    assert method(settings(tiny_root, preset="demo")) == method(load_config("demo"))
    assert settings() == load_config("demo")


def test_without_imagenet_weights_the_demo_recipe_trains_and_a_warning_says_so(
    tiny_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("mprd.backbone.from_torchvision.has_imagenet_weights", lambda _name: False)
    assert method(settings(tiny_root)) == method(load_config("demo"))
    assert [record.getMessage() for record in caplog.records if "--set backbone.weights=FILE" in record.getMessage()]
    caplog.clear()
    weights = tmp_path / "weights.pth"
    for asked in (f"backbone.weights={weights}", "backbone.name=resnet18"):
        assert settings(tiny_root, asked).pairs.labeller == "reciprocal"
    assert settings(tiny_root, preset="recommended").pairs.labeller == "reciprocal"
    assert not [record for record in caplog.records if "--preset demo" in record.getMessage()]


@pytest.mark.parametrize("preset", ["market1501", "dukemtmcreid", "msmt17"])
def test_a_data_sets_name_is_the_papers_recipe_on_its_layout(preset: str, tmp_path: Path) -> None:
    root = {"data": {"root": tmp_path}}
    named, paper = load_config(preset, values=root), load_config("paper", values=root)
    assert (named.data.dataset, paper.data.dataset) == (preset, "auto")
    assert method(named) == method(paper)


def test_what_the_data_cannot_give_is_left_out_and_told(nameless_root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="mprd")
    config = settings(nameless_root)
    assert (config.data.dataset, config.data.name_pattern) == ("folder", ".")
    assert config.meta.num_ids == 0
    assert [record.getMessage().split(": ", 1)[1] for record in caplog.records[1:]] == [
        "no cameras in the file names, so batch norms take the statistics of all images",
        "no identities in the file names, so none labeled (meta.num_ids=0)",
    ]


def test_without_camstyle_files_the_run_is_named_by_what_it_does(
    tiny_root: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="mprd")
    root = Path(shutil.copytree(tiny_root, tmp_path / "data"))
    styles = root / "bounding_box_train_camstyle"
    told = []
    for names in ([], ["other.jpg"], ["0001_c1s1_000001_01_fake_1to2.jpg"]):
        for name in names:
            write_image(styles / name)
        caplog.clear()
        config = settings(root, preset="paper")
        told.append([record.getMessage() for record in caplog.records if "transferred" in record.getMessage()])
        is_there = names == ["0001_c1s1_000001_01_fake_1to2.jpg"]
        assert paper_method(config) == ("MPRD" if is_there else "MPRD#")
    assert told == [
        [f"{root}: no CamStyle files, so no style is transferred, MPRD# (data.camera_style=none)"],
        [
            f"{root}: no CamStyle file of an expected name in {styles}, so no style is transferred, MPRD# "
            "(data.camera_style=none)"
        ],
        [],
    ]
    shutil.rmtree(styles)
    # a file of settings names all of them
    assert settings(root, "data.camera_style=camstyle").data.camera_style == "none"


def test_what_was_asked_for_stays(nameless_root: Path, tmp_path: Path) -> None:
    config = settings(nameless_root, "meta.num_ids=2")
    assert config.meta.num_ids == 2
    file = tmp_path / "mine.yaml"
    file.write_text("pairs: {labeller: mlcr, relabel_meta: true}\n")
    config = read_settings({"preset": None, "data": nameless_root, "set_": None, "config": file})
    # relabeling needs labels, so that their number is no matter of the recipe
    assert config.meta.num_ids == 5
    varied = read_settings({"preset": None, "data": nameless_root, "set_": []}, varied=["meta.num_ids"])
    assert varied.meta.num_ids == 5


def test_as_many_identities_are_labeled_as_there_are(tiny_root: Path, tmp_path: Path) -> None:
    root = tmp_path / "few"
    shutil.copytree(tiny_root, root)
    for path in root.glob("bounding_box_train/000[456]_*"):
        path.unlink()
    assert settings(root).meta.num_ids == 3
    labels = tmp_path / "labels.csv"
    names = [path.relative_to(tiny_root).as_posix() for path in sorted(tiny_root.glob("bounding_box_train/000[12]_*"))]
    labels.write_text("file,identity\n" + "".join(f"{name},{'ann' if '0001_' in name else 'bob'}\n" for name in names))
    assert settings(tiny_root, f"meta.labels={labels}").meta.num_ids == 2


def test_a_pattern_of_ones_own_makes_a_tree_of_crops(tiny_root: Path) -> None:
    config = settings(tiny_root, r"data.name_pattern=_c(?P<camid>\d+)")
    assert (config.data.dataset, config.data.name_pattern) == ("folder", r"_c(?P<camid>\d+)")
    assert settings(tiny_root, "data.dataset=msmt17").data.dataset == "msmt17"


def test_smoke_makes_any_recipe_small_and_the_user_still_wins(tiny_root: Path) -> None:
    config = settings(tiny_root, "train.epochs=3", preset="paper", smoke=True)
    assert (config.backbone.name, config.data.height, config.train.epochs) == ("small", 32, 3)
    assert config.data.max_images == 400
    drawn = settings(smoke=True)
    assert (drawn.data.dataset, drawn.data.synthetic.num_train_ids) == ("synthetic", 24)


def test_an_incomplete_layout_is_told(tmp_path: Path) -> None:
    for folder in ("train", "test"):
        name = tmp_path / folder / "0000" / "0000_001_01_0303morning_0008_0.jpg"
        name.parent.mkdir(parents=True)
        name.touch()
    with pytest.raises(UserError, match=r"list_train\.txt.* missing"):
        settings(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        settings(tmp_path / "gone")


def test_settings_are_asked_for_by_file_or_option(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("pairs: {mu: 0.4}\n")
    options = {"preset": None, "data": None, "set_": ["train.epochs=2"], "config": file, "seed": 3}
    config, asked = compose(options, shared={"gcn": {"batch_size": 16}})
    assert asked == {"pairs.mu", "train.epochs", "train.seed", "gcn.batch_size"}
    assert (config.pairs.mu, config.train.seed, config.gcn.batch_size) == (0.4, 3, 16)
    assert read_given(file, ["pairs.mu=0.6"]) == {"pairs": {"mu": 0.6}}
    with pytest.raises(UserError, match=r"--seed 3 and --set train\.seed=4 differ; give one of them"):
        compose(options | {"set_": ["train.seed=4"]})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("data:\n", "data must be a section, `data: {field: value}`, but got None"),
        ("train: 3\n", "train must be a section"),
        ("3: 4\n", "3 must be a section"),
        ("train: {3: 4}\n", "train.3"),
    ],
)
def test_a_file_without_sections_or_names_is_refused_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as error:
        compose({"preset": "demo", "data": tmp_path, "set_": None, "config": file, "seed": 3})
    assert str(error.value).startswith(message)
    with pytest.raises(UserError, match=r"^backbone must be a section"):
        compose({"preset": None, "data": tmp_path, "set_": ["backbone=small"]})


@pytest.mark.parametrize("named", ["synthetic", "msmt17"])
def test_the_best_settings_of_a_study_train_on_other_data(named: str, tiny_root: Path, tmp_path: Path) -> None:
    best = load_config("recommended", overrides=("pairs.mu=0.3",), values={"data": {"root": "elsewhere"}})
    best = best.model_copy(update={"data": best.data.model_copy(update={"dataset": named})})
    file = tmp_path / "best.yaml"
    file.write_text(yaml.safe_dump(best.model_dump(mode="json")))
    config = read_settings({"preset": None, "data": tiny_root, "set_": [], "config": file})
    assert (config.data.dataset, config.data.root, config.pairs.mu) == ("market1501", tiny_root, 0.3)
