"""Study files: their points, and the messages of mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mprd.errors import UserError
from mprd.tune.settings import read_settings
from mprd.tune.study import Range, build_study, load_study, study_files, with_pruner, with_sampler, write_study
from mprd.tune.trial import Trial, trial_config

NAMES = ["delta_sweep", "eta_schedules", "joint", "k_sweep", "meta_ids"]
NAMES += ["mu_sweep", "similarity_sweep", "table1", "table2"]

DRAWN = {"space": {"neighbors.k": {"low": 2, "high": 4}}, "sampler": "random", "trials": 3}


def study(**parts: object) -> dict:
    return {"name": "test", "doc": "A test.", **parts}


def test_the_nine_studies_are_there_at_the_top_and_in_the_package() -> None:
    top = Path(__file__).parents[2] / "tune_configs"
    assert sorted(path.stem for path in top.glob("*.yaml")) == NAMES
    assert list(study_files(Path("no/such/folder"))) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_study_reads_back_and_all_its_points_are_valid_runs(name: str) -> None:
    study = load_study(name)
    assert build_study(yaml.safe_load(write_study(study)), source="again") == study
    config = read_settings(study, {"preset": None, "set_": None, "data": None}, smoke=False)
    ranges = {name: dimension for name, dimension in study.space.items() if isinstance(dimension, Range)}
    ends = [{name: getattr(dimension, end) for name, dimension in ranges.items()} for end in ("low", "high")]
    for settings in (*(point.set for point in study.grid()), *ends):
        trial_config(config, Trial(0, "x", dict(settings), 0))


def test_the_sweeps_have_the_values_of_the_paper() -> None:
    mu = load_study("mu_sweep")
    expected = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    assert [point.set for point in mu.grid()] == [{"pairs.mu": value} for value in expected]
    assert mu.num_trials == 9 * len(mu.seeds)
    assert mu.paper is not None
    assert mu.paper.peak == 0.5
    assert [point.set["meta.num_ids"] for point in load_study("meta_ids").grid()] == [0, 1, 3, 5, 10, 20]


def test_the_tables_have_the_methods_and_figures_of_the_paper() -> None:
    first, second = load_study("table1"), load_study("table2")
    methods = ["Super.", "KNN", "SS", "MPLP", "MPRD w/o", "MPRD#", "MPRD", "Single"]
    controls = ["Reciprocal", "Cluster-Contrast"]
    assert [point.name for point in first.points] == methods + controls
    assert [point.name for point in second.points] == ["MLCR", "MLCR(+5id)", "MPRD(0id)", "MPRD"]
    for table in (first, second):
        assert len(table.seeds) > 1
        assert table.paper is not None
        for stated in table.paper.values.values():
            assert list(stated) == [point.name for point in table.points if point.name not in controls]
    assert first.paper is not None
    assert first.paper.values["Market-1501"]["MPRD w/o"].mAP == 0.431
    assert first.paper.values["DukeMTMC-reID"]["Single"].rank1 == 0.383


def test_the_joint_study_draws_its_points_and_stops_poor_trials() -> None:
    joint = load_study("joint")
    assert {"pairs.mu", "neighbors.k", "loss.delta", "meta.eta.kind", "meta.num_ids"} <= set(joint.varied)
    assert joint.grid() == []
    assert joint.sampler == "tpe"
    assert joint.stop is not None


def test_a_grid_of_two_settings_goes_through_all_pairs_in_order() -> None:
    space = {"pairs.mu": {"grid": [0.1, 0.2]}, "neighbors.k": {"grid": [4, 8]}}
    names = [point.name for point in build_study(study(space=space), source="x").grid()]
    assert names == ["mu=0.1, k=4", "mu=0.1, k=8", "mu=0.2, k=4", "mu=0.2, k=8"]


MU = {"pairs.mu": {"grid": [0.1]}}


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"spce": MU}, "unknown key spce, did you mean space?"),
        ({"space": {"pairs.mue": {"grid": [1]}}}, "unknown setting pairs.mue, did you mean pairs.mu?"),
        ({"space": {"pairs.mu": {"gird": [1]}}}, "unknown key space.pairs.mu.gird, did you mean grid?"),
        ({"space": {"train.seed": {"grid": [1]}}}, "train.seed is varied by seeds"),
        ({"space": {"pairs.mu": {"low": 0.5, "high": 0.1}}, "sampler": "tpe"}, "low must lie below high"),
        ({"space": {"pairs.mu": {"low": 0.5}}, "sampler": "tpe"}, "space.pairs.mu.high is missing"),
        ({"space": MU, "sampler": "tpe", "trials": 3}, "sampler tpe needs space as choice or low and high"),
        ({"space": {"pairs.mu": {"choice": [0.1]}}}, "sampler grid needs space as grids"),
        ({"space": {"pairs.mu": {"choice": [0.1]}}, "sampler": "tpe"}, "needs trials"),
        ({"space": MU, "sampler": "tp"}, "sampler must be 'grid', 'tpe' or 'random', but got 'tp'"),
        ({"space": MU, "stop": {"kind": "ashe"}}, "stop.kind must be 'asha', 'median' or 'hyperband', but got 'ashe'"),
        ({"space": MU, "seeds": [1, 2, 1]}, "seeds: 1 is listed twice"),
        ({"space": {"pairs.mu": {"grid": [0.1, 0.1]}}}, "space.pairs.mu.grid: 0.1 is listed twice"),
        ({"space": MU, "seeds": [-1]}, "seeds.0 must be greater than or equal to 0, but got -1"),
        ({"points": [{"name": "a", "sett": {}}]}, "unknown key points.0.sett, did you mean set?"),
        ({"points": [{"name": "a"}, {"name": "a"}]}, "two points share a name: a, a"),
        ({}, "a study needs either space or points"),
    ],
)
def test_a_mistake_in_a_study_is_one_line(parts: dict, message: str) -> None:
    with pytest.raises(UserError) as error:
        build_study(study(**parts), source="mine.yaml")
    assert str(error.value).startswith("mine.yaml: ")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_study_of_the_user_is_read_from_tune_configs(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("name: mine\ndoc: Mine.\nspace: {pairs.mu: {grid: [0.3]}}\n")
    assert load_study("mine", folder=tmp_path).grid()[0].set == {"pairs.mu": 0.3}
    with pytest.raises(UserError, match=r"unknown study 'mien', did you mean mine\?; known: delta_sweep"):
        load_study("mien", folder=tmp_path)


def test_points_are_drawn_from_a_grid_and_a_grid_made_of_whole_numbers() -> None:
    study = build_study({**DRAWN, "name": "drawn", "doc": "Drawn."}, source="")
    grid = with_sampler(study, "grid", trials=None)
    assert [point.set["neighbors.k"] for point in grid.grid()] == [2, 3, 4]
    assert grid.num_trials == 3
    drawn = with_sampler(grid, "tpe", trials=2)
    assert drawn.grid() == []
    assert (drawn.num_trials, drawn.space["neighbors.k"].values()) == (2, (2, 3, 4))


def test_drawn_studies_are_pruned_unless_told_otherwise(tmp_path: Path) -> None:
    for name, stop in (("unsaid", {}), ("never", {"stop": None}), ("asha", {"stop": {"kind": "asha"}})):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump({**DRAWN, "name": name, "doc": "Drawn.", **stop}))
    stops = {name: load_study(name, folder=tmp_path).stop for name in ("unsaid", "never", "asha", "k_sweep")}
    assert {name: stop and stop.kind for name, stop in stops.items()} == {
        "unsaid": "median", "never": None, "asha": "asha", "k_sweep": None
    }  # fmt: skip
    assert with_pruner(load_study("joint"), "none").stop is None
    changed = with_pruner(load_study("joint"), "hyperband").stop
    assert changed is not None
    assert (changed.kind, changed.grace_epochs) == ("hyperband", 8)
