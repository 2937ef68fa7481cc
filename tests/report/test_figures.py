"""What a report page counts, ranks and compares, without a run; and what the paper printed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.report.features import choose_changed, choose_shown, has_match, one_an_identity, rank_gallery
from mprd.report.page import figure_row, mean_rows
from mprd.report.pairs import Candidates, camera_counts, stand_in
from mprd.report.plots import Panel, choose_series, draw_curves
from mprd.report.runs import compare_settings, short_names
from mprd.tune.paper_results import paper_dataset, paper_method, paper_rows


def test_pairs_are_counted_by_the_cameras_of_their_images() -> None:
    # images 0 1 2 of person 7 under cameras 0 0 2, image 3 of person 8 under camera 2
    pids, camids = np.array([7, 7, 7, 8]), np.array([0, 0, 2, 2])
    counted = camera_counts(np.array([0, 0, 2]), np.array([2, 3, 3]), pids=pids, camids=camids)
    assert counted.cameras == [1, 3]
    assert counted.num_pairs.tolist() == [[0, 2], [0, 1]]
    assert counted.num_true.tolist() == [[0, 1], [0, 0]]
    assert counted.num_same.tolist() == [[2, 2], [2, 0]]
    assert counted.precision[0, 1] == 0.5
    assert np.isnan(counted.precision[0, 0])
    assert counted.recall.tolist()[0] == [0.0, 0.5]


def test_a_query_is_valid_where_another_camera_saw_its_person() -> None:
    g_pids, g_camids = np.array([1, 1, 2]), np.array([0, 1, 0])
    found = has_match(np.array([1, 2, 2, 3]), g_pids, q_camids=np.array([0, 0, 1, 0]), g_camids=g_camids)
    assert found.tolist() == [True, False, True, False]


def test_a_ranking_ends_with_the_first_right_image_when_that_comes_late() -> None:
    cosines = np.array([0.95, *np.linspace(0.9, 0.2, 12), 0.1])
    is_removed, is_match = np.arange(14) == 0, np.isin(np.arange(14), [12, 13])
    ranking = rank_gallery(cosines, is_match, is_removed=is_removed, precision=0.1)
    assert [hit.row for hit in ranking.hits] == [*range(1, 11), 12]
    assert [hit.rank for hit in ranking.hits] == [*range(1, 11), 12]
    assert (ranking.first_match, ranking.num_matches) == (12, 2)
    assert [hit.is_right for hit in ranking.hits] == [False] * 10 + [True]


def test_a_ranking_of_a_small_gallery_is_the_gallery() -> None:
    cosines, is_match = np.array([0.5, 0.5, 0.9]), np.array([True, False, False])
    ranking = rank_gallery(cosines, is_match, is_removed=np.zeros(3, bool), precision=0.5)
    assert [(hit.row, hit.is_right) for hit in ranking.hits] == [(2, False), (0, True), (1, False)]


def test_one_query_is_kept_of_each_identity() -> None:
    assert one_an_identity([3, 0, 2, 1], np.array([5, 6, 6, 5])) == [3, 2]


def test_the_queries_that_changed_most_are_gains_first_then_losses() -> None:
    gains = np.array([0.1, -0.5, np.nan, 0.4, 0.0, -0.2, 0.3])
    assert choose_changed(gains, np.array([1, 2, 3, 4, 5, 6, 4])) == [3, 0, 1, 5]
    assert choose_changed(np.zeros(3), np.array([1, 2, 3])) == []


def test_identities_are_shown_until_their_images_are_too_many() -> None:
    pids = np.repeat([1, 2, 3], [1500, 400, 300])
    assert choose_shown([1, 2, 3], pids) == [1, 2]
    assert choose_shown([9], np.full(5000, 9)) == [9]


def test_the_precision_of_the_positives_is_that_of_the_candidates_that_became_some() -> None:
    scores = {"g_ij": np.array([0.9, 0.6, 0.5, 0.1]), "cosine": np.zeros(4)}
    is_true, is_positive = np.array([True, False, True, False]), np.array([True, True, False, False])
    candidates = Candidates(scores, is_true, "g_ij", 0.5, is_positive)
    assert (candidates.precision, candidates.positive_precision, candidates.auc("g_ij")) == (0.5, 0.5, 0.75)
    assert candidates.positive_share == 0.5
    assert Candidates(scores, None, "g_ij", 0.5, is_positive).positive_precision is None
    assert Candidates(scores, is_true, "g_ij", 0.5, np.zeros(4, bool)).positive_precision is None
    assert Candidates(scores, is_true, None, 0.5, None).positive_share is None


def test_candidates_that_stand_in_p_are_found_in_any_order_and_padding_is_none() -> None:
    candidates, positives = torch.tensor([[4, 2, 7], [3, -1, -1]]), torch.tensor([[7, 0, 4], [-1, 1, -1]])
    assert stand_in(candidates, positives).tolist() == [[True, False, True], [False, False, False]]


def test_settings_are_marked_where_they_leave_the_default_or_each_other() -> None:
    configs = [load_config("demo", overrides=(f"pairs.mu={mu}",)) for mu in (0.5, 0.3)]
    settings = {setting.name: setting for setting in compare_settings(configs)}
    mu = settings["pairs.mu"]
    assert (mu.default, mu.values, mu.is_changed, mu.differs) == ("0.5", ["0.5", "0.3"], [False, True], True)
    assert mu.meaning == "Likelihood above which a pair is positive (Eq. 7)."
    assert settings["backbone.name"].is_changed == [True, True]
    assert not settings["backbone.name"].differs
    assert settings["data.crop_area"].values == ["0.8, 1", "0.8, 1"]


def test_runs_are_named_by_what_tells_them_apart() -> None:
    assert short_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert short_names([]) == []


def test_figures_of_several_runs_carry_their_difference_to_the_first() -> None:
    cells = figure_row("mAP", [0.5, 0.75, None])["cells"]
    assert [cell["change"] for cell in cells] == [None, 0.25, None]
    assert [cell["is_best"] for cell in cells] == [False, True, False]
    assert not any(cell["is_best"] for cell in figure_row("mAP", [0.5, 0.5])["cells"])


def test_the_more_runs_share_a_panel_the_fewer_kinds_of_line_it_has() -> None:
    panel = Panel("Rank-k", (("rank1", "Rank-1"), ("rank5", "Rank-5"), ("rank10", "Rank-10")), "")
    rows = [{"epoch": 0, "rank1": 0.1, "rank5": 0.2, "rank10": 0.3}]
    assert [len(choose_series(panel, count)) for count in (1, 2, 3, 4)] == [3, 2, 2, 1]
    assert [drawn.title for drawn in draw_curves([("", rows)] * 4, [panel])] == ["Rank-k: Rank-1"]
    assert draw_curves([("", [{"epoch": 0, "rank1": None}])], [panel]) == []


def test_seeds_are_averaged_over_the_epochs_and_figures_that_all_have() -> None:
    first = [{"epoch": 0, "mAP": 0.2, "gcn_auc": None}, {"epoch": 1, "mAP": 0.5}]
    assert mean_rows([first, [{"epoch": 0, "mAP": 0.4, "gcn_auc": 0.9}]]) == [{"epoch": 0, "mAP": pytest.approx(0.3)}]


def test_the_paper_is_quoted_for_its_own_images_alone() -> None:
    market = Config.model_validate({"data": {"dataset": "market1501", "root": "x"}})
    assert paper_dataset(market, num_train=12936) == "Market-1501"
    assert paper_dataset(market, num_train=1783) is None
    assert paper_dataset(market, num_train=None) is None
    assert paper_dataset(Config(), num_train=12936) is None


def test_the_tables_hold_what_the_paper_prints() -> None:
    rows = {(row.source, row.method): row for row in paper_rows("Market-1501")}
    ours = rows["Table 3", "MPRD"]
    assert (ours.rank1, ours.rank5, ours.rank10, ours.mAP) == pytest.approx((0.83, 0.913, 0.936, 0.511))
    assert rows["Table 1", "Super."].mAP == 0.685
    assert rows["Table 2", "MLCR(+5id)"].rank1 == 0.802
    assert rows["Table 3", "TSSL"].rank5 is None
    assert [(row.method, round(row.mAP or 0, 3)) for row in paper_rows("MSMT17")] == [
        ("MLCR", 0.112),
        ("JVTC", 0.151),
        ("MPRD", 0.146),
    ]


@pytest.mark.parametrize(
    ("overrides", "method"),
    [
        (("data.camera_style=colour",), "MPRD"),
        (("data.camera_style=colour", "meta.num_ids=0"), "MPRD(0id)"),
        (("data.camera_style=colour", "gcn.sources=meta"), "MPRD w/o"),
        ((), "MPRD#"),
        (("pairs.labeller=mlcr", "pairs.relabel_meta=true"), "MLCR(+5id)"),
        (("pairs.labeller=supervised",), "Super."),
    ],
)
def test_settings_name_their_row_of_the_paper(overrides: tuple[str, ...], method: str) -> None:
    assert paper_method(load_config("demo", overrides=overrides)) == method
