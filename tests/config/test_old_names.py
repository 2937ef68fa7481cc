"""Settings of earlier versions: refused from users with what is there instead, and read from run folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from mprd.config.loading import load_config, read_config, setting_names
from mprd.config.nested import put
from mprd.config.old_names import GONE_IN_TRAINING, OLD, FixedInTraining, check_resumable
from mprd.config.schema import Config
from mprd.errors import UserError
from mprd.tune.folder import StudyFolder
from mprd.tune.study import build_study

# what the folder of the demo by J held in place of today's settings
DEMO = {
    "data.colour_jitter": 0.3,
    "data.rotation": 5.0,
    "data.crop_area": [0.8, 1.0],
    "data.erasing_probability": 0.3,
    "data.erasing_area": [0.02, 0.2],
    "data.cache": "auto",
    "data.augment": "auto",
    "data.synthetic.camera_gap": 0.6,
    "memory.start_mode": "train",
    "neighbors.num_shards": 0,
    "clusters.mu": None,
    "neighbors.metric": "camera",
    "neighbors.density_k": 20,
    "gcn.variant": "reciprocal",
    "gcn.optimizer": "adam",
    "meta.pairs": "candidates",
    "pairs.labeller": "reciprocal",
    "pairs.decide": "agreement",
    "pairs.refresh": "batch",
    "pairs.jaccard": 0.3,
    "train.nesterov": True,
    "train.optimizer": "sgd",
    "train.momentum": 0.9,
    "train.cuda_graphs": False,
}


J = "pairs.labeller=reciprocal"


def write_old(file: Path, **changes: Any) -> Path:
    """Write the demo's settings as an earlier version did, with changes under `section__field`."""
    settings = load_config("demo").model_dump(mode="json")
    del settings["data"]["augmentation"], settings["pairs"]["threshold"]
    for name, value in {**DEMO, **{name.replace("__", "."): value for name, value in changes.items()}}.items():
        put(settings, name, value)
    file.write_text(yaml.safe_dump(settings))
    return file


def test_no_name_is_both_old_and_current() -> None:
    assert set(OLD) & set(setting_names()) == set()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.momentum=0.9", "train.momentum is now fixed at 0.9 (Sec. 5.2)"),
        ("clusters={k1: 20}", "clusters.k1 is now fixed at 30 (Cluster-Contrast's value)"),
        ("train.nesterov=true", "train.nesterov is now fixed at false (Sec. 5.2)"),
        ("pairs.reciprocal=0.1", "pairs.reciprocal is now pairs.threshold, for the labeller that runs"),
        (
            "neighbors.num_shards=2",
            "neighbors.num_shards is now fixed at 0 (shards on Ray actors brought no measured gain)",
        ),
        ("data.rotation=5", "data.rotation is now a part of data.augmentation, standard or small"),
        ("eval.rerank=true", "eval.rerank is gone: mprd evaluate RUN --rerank"),
    ],
)
def test_an_old_name_is_refused_with_what_is_there_instead(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        load_config("demo", overrides=(override,))
    assert str(error.value) == message
    name = message.split(" ")[0]
    with pytest.raises(UserError) as error:
        build_study({"name": "x", "doc": "", "space": {name: {"grid": [1]}}}, source="x.yaml")
    assert message in str(error.value)


def test_a_run_folder_of_an_earlier_version_is_read_as_it_was(tmp_path: Path) -> None:
    assert read_config(write_old(tmp_path / "config.yaml")) == load_config("demo", overrides=(J,))


@pytest.mark.parametrize(
    ("changes", "overrides"),
    [
        (
            {"pairs__labeller": "ss", "pairs__ss_similarity": 0.7},
            ("pairs={labeller: ss, threshold: 0.7, refresh: batch}",),
        ),
        ({"pairs__labeller": "mlcr", "pairs__mplp_t": 0.6}, ("pairs={labeller: mlcr, refresh: batch}",)),
        # the threshold of a labeller that did not run had no effect
        ({"pairs__labeller": "knn", "pairs__ss_similarity": 0.8}, ("pairs={labeller: knn, refresh: batch}",)),
        ({"pairs__labeller": "dbscan"}, ("pairs={labeller: dbscan, refresh: auto}",)),
        ({"train__optimizer": "adamw"}, ("train.optimizer=adamw",)),
        ({"neighbors__num_shards": 3}, ()),
        ({"data__cache": "ram"}, ()),
        ({"train__compile": True, "gcn__passes": 1}, ()),
        (
            {"data__colour_jitter": 0.2, "data__rotation": 10.0, "data__crop_area": [0.64, 1.0],
             "data__erasing_probability": 0.5},
            ("data.augmentation=standard",),
        ),
    ],
)  # fmt: skip
def test_a_renamed_setting_of_a_run_folder_is_moved(
    changes: dict[str, Any], overrides: tuple[str, ...], tmp_path: Path
) -> None:
    expected = load_config("demo", overrides=(J, *overrides))
    assert read_config(write_old(tmp_path / "config.yaml", **changes)) == expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train__momentum": 0.8}, "train.momentum is now fixed at 0.9 (Sec. 5.2), but this run has 0.8; read it with"),
        ({"data__rotation": 7.0}, "data.augmentation is now standard or small, and this run's 7.0 is of neither"),
        ({"data__rotation": 10.0}, "data.augmentation is now standard or small, and this run's 10.0 is of neither"),
        ({"data__synthetic__seed": 1}, "data.synthetic.seed is now fixed at 0"),
        (
            {"clusters__mu": 0.2},
            "clusters.mu is now fixed at null (clusters beside the GCN",
        ),
        ({"pairs__labeller": "jaccard"}, "pairs.labeller: jaccard is gone; read it with"),
    ],
)
def test_a_run_folder_with_another_value_is_refused_by_name(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"config\.yaml: ") as error:
        read_config(write_old(tmp_path / "config.yaml", **changes))
    assert message in str(error.value)


@pytest.mark.parametrize(("name", "value", "other"), GONE_IN_TRAINING)
def test_a_value_that_training_alone_read_is_refused_from_users_and_read_as_another(
    name: str, value: str, other: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=rf"^{name} must be .* but got '{value}'$"):
        load_config("demo", overrides=(f"{name}={value}",))
    file = write_old(tmp_path / "config.yaml", **{name.replace(".", "__"): value})
    assert read_config(file) == load_config("demo", overrides=(J, f"{name}={other}"))
    with pytest.raises(UserError) as error:
        check_resumable(yaml.safe_load(file.read_text()))
    assert str(error.value) == f"{name}: {value} is gone; resume it with the version of mprd that wrote it"


def test_a_run_is_resumed_unless_it_trains_in_a_way_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OLD, "pairs.flag", FixedInTraining(False, "it did not pay"))
    check_resumable({"pairs": {"flag": False}, "gcn": {"variant": "paper"}})
    # the graph network's, which no other labeler reads
    check_resumable({"pairs": {"labeller": "knn"}, "gcn": {"variant": "reciprocal"}})
    for labeller in ("knn", "gcn"):
        with pytest.raises(UserError, match=r"^pairs\.flag is now fixed at false .* has true; resume it with"):
            check_resumable({"pairs": {"labeller": labeller, "flag": True}})


def test_a_study_folder_of_an_earlier_version_is_read(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    old = {"pairs.labeller": "ss", "pairs.ss_similarity": 0.7}
    new = {"pairs.labeller": "ss", "pairs.threshold": 0.7}
    study = {"name": "x", "doc": "", "points": [{"name": "a", "set": old}, {"name": "b"}], "set": {"loss.alpha": 4.0}}
    folder.study_file.write_text(yaml.safe_dump(study))
    folder.trials_file.write_text(json.dumps([{"number": 0, "point": "a", "settings": old, "seed": 0}]))
    assert [point.set for point in folder.read_study().points] == [new, {}]
    assert folder.read_study().set == {}
    assert folder.read_trials()[0].settings == new


def test_a_study_goes_on_unless_its_trials_train_in_a_way_that_is_gone(tmp_path: Path) -> None:
    folder = StudyFolder(tmp_path)
    search = "neighbors.search"

    def check(shared: str, **study: Any) -> None:
        folder.config_file.write_text(yaml.safe_dump({"neighbors": {"search": shared}}))
        folder.study_file.write_text(yaml.safe_dump({"name": "x", "doc": "", **study}))
        folder.check_is_resumable()

    exact, gone = ({"name": value, "set": {search: value}} for value in ("exact", "hnsw"))
    check("exact", points=[exact, {"name": "b"}], space={})
    check("hnsw", points=[exact])
    check("exact", space={"pairs.mu": {"low": 0.1, "high": 0.9, "log": False}, search: {"grid": ["exact"]}})
    for shared, study in (
        ("hnsw", {"points": [exact, {"name": "b"}]}),
        ("exact", {"points": [exact, gone]}),
        ("exact", {"space": {search: {"grid": ["exact", "hnsw"]}}}),
        ("exact", {"space": {search: {"choice": ["hnsw"]}, "pairs.mu": {"low": 0.1, "high": 0.9}}}),
        ("hnsw", {"space": {"pairs.mu": {"low": 0.1, "high": 0.9}}}),
    ):
        with pytest.raises(UserError, match=r"^neighbors\.search: hnsw is gone; resume it with the version of mprd"):
            check(shared, **study)


def test_what_is_drawn_does_not_matter_to_a_run_on_photographs(tmp_path: Path) -> None:
    changes = {"data__dataset": "market1501", "data__root": str(tmp_path), "data__synthetic__camera_gap": 1.0}
    config: Config = read_config(write_old(tmp_path / "config.yaml", **changes))
    assert config.data.dataset == "market1501"
