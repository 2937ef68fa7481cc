"""Curves by epoch: what shares a panel, and the mean over seeds."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from mprd.report.plots import draw_curves
from mprd.runs.curves import PANELS, Panel, mean_rows, plot_curves

ROWS = [{"epoch": 0, "rank1": 0.1, "rank5": 0.2, "rank10": 0.3}]


def test_more_runs_in_a_panel_show_fewer_columns() -> None:
    panel = Panel("Rank-k", (("rank1", "Rank-1"), ("rank5", "Rank-5"), ("rank10", "Rank-10")))
    assert [len(panel.narrowed(count).series) for count in (1, 2, 3, 4)] == [3, 2, 2, 1]
    assert [drawn.title for drawn in draw_curves([("", ROWS)] * 4, [panel])] == ["Rank-k: Rank-1"]
    assert draw_curves([("", [{"epoch": 0, "rank1": None}])], [panel]) == []


def test_every_column_of_a_panel_is_drawn() -> None:
    panel = next(panel for panel in PANELS if panel.title == "AUC on the candidates")
    row = dict.fromkeys((column for column, _ in panel.series), 0.5)
    (drawn,) = draw_curves([("", [{"epoch": 0, **row}, {"epoch": 1, **row}])], [panel])
    assert all(label in drawn.svg and f"stroke: var(--c{n})" in drawn.svg for n, (_, label) in enumerate(panel.series))


def test_a_run_of_one_epoch_has_curves(tmp_path: Path) -> None:
    plot_curves(ROWS, tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").size[0] > 1000


def test_seeds_are_averaged_over_the_epochs_and_columns_that_all_have() -> None:
    first = [{"epoch": 0, "mAP": 0.2, "gcn_auc": None}, {"epoch": 1, "mAP": 0.5}]
    assert mean_rows([first, [{"epoch": 0, "mAP": 0.4, "gcn_auc": 0.9}]]) == [{"epoch": 0, "mAP": pytest.approx(0.3)}]
