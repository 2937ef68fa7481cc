"""Settings: validated, merged in order, and refused with the nearest name."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from mprd.config.loading import absolute, load_config, parse_override, setting_names
from mprd.config.schema import Config, Preset
from mprd.errors import UserError


def test_defaults_are_the_numbers_of_section_5_2() -> None:
    c = Config()
    assert (c.data.height, c.data.width) == (256, 128)
    assert (c.train.epochs, c.train.batch_size, c.train.lr_backbone, c.train.lr_new, c.train.lr_step) == (
        40,
        32,
        0.01,
        0.1,
        20,
    )
    assert (c.gcn.learning_rate, c.gcn.batch_size, c.pairs.mu) == (0.001, 32, 0.5)
    assert (c.loss.delta, c.loss.r) == (5, 0.01)
    assert (c.meta.num_ids, c.neighbors.k, c.neighbors.similarity) == (5, 8, 0.6)
    assert c.backbone.name == "resnet50"
    assert c.searches_live


@pytest.mark.parametrize("preset", get_args(Preset))
def test_every_preset_is_valid(preset: str, tmp_path: Path) -> None:
    values = {} if preset in ("demo", "bench") else {"data": {"root": tmp_path}}
    assert load_config(preset, values=values).data.dataset in (preset, "synthetic", "auto")


def test_the_bench_preset_is_the_demo_on_more_images() -> None:
    demo, bench = load_config("demo"), load_config("bench")
    assert bench.data.synthetic.num_train_ids == 200
    assert bench.data.height == demo.data.height == 64
    same = ("backbone", "memory", "neighbors", "gcn", "pairs", "meta")
    assert all(getattr(bench, section) == getattr(demo, section) for section in same)


def test_the_paper_presets_change_nothing_of_the_method(tmp_path: Path) -> None:
    market = load_config("market1501", values={"data": {"root": tmp_path}})
    paper = Config()
    for section in ("memory", "neighbors", "gcn", "pairs", "meta", "loss", "train"):
        assert getattr(market, section) == getattr(paper, section)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("pairs: {mu: 0.3}\ntrain: {epochs: 7, seed: 4}\n")
    config = load_config("demo", file=file, overrides=("train.epochs=9", "loss.r=2e-2"), values={"train": {"seed": 5}})
    assert (config.pairs.mu, config.train.epochs, config.train.seed, config.loss.r) == (0.3, 9, 5, 0.02)
    assert config.backbone.name == "small"


def test_an_override_is_read_as_yaml() -> None:
    assert parse_override("meta.eta.kind=cosine") == {"meta": {"eta": {"kind": "cosine"}}}
    assert parse_override("pairs.limit=true") == {"pairs": {"limit": True}}
    assert parse_override("train.lr_new=1e-4") == {"train": {"lr_new": 1e-4}}
    assert parse_override("data.name_pattern=c(.)") == {"data": {"name_pattern": "c(.)"}}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pairs.mo=0.3", "unknown setting pairs.mo, did you mean pairs.mu?"),
        ("pairs.mu=1.3", "pairs.mu must be less than 1, but got 1.3"),
        ("pairs.labeller=gnc", "pairs.labeller must be 'gcn'"),
        ("loss.r=.inf", "loss.r must be a finite number, but got inf"),
        ("train.epochs=0", "train.epochs must be greater than or equal to 1, but got 0"),
        ("train.epochs", "--set wants section.field=value"),
        ("neighbors.k_max=4", "neighbors.k_max must be at least neighbors.k = 8, but got 4"),
        ("meta.eta.end=2", "meta.eta.end must be less than or equal to 1, but got 2"),
        ("data.dataset=folder", "data.root: the data set folder needs a folder"),
        ("pairs.refresh=batch", "neighbors.whitening needs pairs.refresh=epoch"),
        ("pairs={labeller: reciprocal, relabel_meta: true}", "pairs.relabel_meta: with reciprocal"),
        ("pairs={labeller: dbscan, relabel_meta: true}", "pairs.relabel_meta: with dbscan"),
        ("pairs={labeller: single, relabel_meta: true}", "pairs.relabel_meta: with single"),
        ("pairs={labeller: reciprocal, refresh: batch}", "pairs.labeller: reciprocal labels all images at once"),
        ("pairs={labeller: dbscan, refresh: batch}", "pairs.labeller: dbscan labels all images at once"),
        ("pairs.threshold=0.4", "pairs.threshold is for the labellers ss, mplp, mlcr, reciprocal, but"),
    ],
)
def test_a_wrong_setting_is_named_in_one_line(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        load_config("demo", overrides=("neighbors.source=memory", override))
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_similarities_of_all_images_are_refused_where_the_memory_moves_between_batches() -> None:
    live = ("neighbors.source=memory",)
    with pytest.raises(UserError, match=r"neighbors\.whitening needs pairs\.refresh=epoch or"):
        load_config("demo", overrides=live)
    live += ("neighbors.whitening=false",)
    assert load_config("demo", overrides=live).searches_live
    assert not load_config("demo", overrides=(*live, "pairs.refresh=epoch")).searches_live


def test_an_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean market1501"):
        load_config("market")


def test_a_broken_settings_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "broken.yaml"
    file.write_text("pairs: [unclosed")
    with pytest.raises(UserError, match=r"broken\.yaml: not valid YAML"):
        load_config("demo", file=file)
    with pytest.raises(UserError, match=r"absent\.yaml: cannot read"):
        load_config("demo", file=tmp_path / "absent.yaml")


def test_settings_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Config().pairs.mu = 0.4  # type: ignore[misc]


def test_every_setting_has_a_docstring() -> None:
    def described(section: type[BaseModel], prefix: str = "") -> dict[str, str | None]:
        found: dict[str, str | None] = {}
        for name, field in section.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found |= described(field.annotation, f"{prefix}{name}.")
            else:
                found[prefix + name] = field.description
        return found

    texts = described(Config)
    assert [name for name, text in texts.items() if not text] == []
    assert {"meta.eta.kind", "data.synthetic.num_cameras"} < {*texts}
    assert setting_names() == [*texts]


def test_absolute_settings_name_the_same_files_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.pth").touch()
    overrides = ("data.dataset=folder", "data.root=crops", "meta.labels=who.csv")
    config = absolute(load_config("demo", overrides=(*overrides, "backbone.weights=net.pth")))
    assert (config.data.root, config.meta.labels) == (tmp_path / "crops", tmp_path / "who.csv")
    assert config.backbone.weights == str(tmp_path / "net.pth")
    # a name that is no file stays a name
    bare = absolute(load_config("demo", overrides=("backbone.weights=imagenet",)))
    assert (bare.backbone.weights, bare.data.root, bare.meta.labels) == ("imagenet", None, None)
