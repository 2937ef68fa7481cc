"""Names, settings and figures of runs side by side."""

from __future__ import annotations

from pathlib import Path

from mprd.config.loading import load_config
from mprd.report.runs import compare_settings, unique_names
from mprd.report.tables import compare


def test_settings_are_marked_if_they_differ_from_the_default_or_each_other() -> None:
    configs = [load_config("demo", overrides=(f"pairs.mu={mu}",)) for mu in (0.5, 0.3)]
    settings = {setting.name: setting for setting in compare_settings(configs)}
    mu = settings["pairs.mu"]
    assert (mu.default, mu.values, mu.is_changed, mu.differs) == ("0.5", ["0.5", "0.3"], [False, True], True)
    assert "(Eq. 7)" in mu.meaning
    assert settings["backbone.name"].is_changed == [True, True]
    assert not settings["backbone.name"].differs


def test_runs_are_named_by_the_end_of_their_paths() -> None:
    assert unique_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert unique_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert unique_names([]) == []


def test_figures_of_several_runs_have_their_difference_to_the_first() -> None:
    cells = compare([0.5, 0.75, None])
    assert [cell.change for cell in cells] == [None, 0.25, None]
    assert [cell.is_best for cell in cells] == [False, True, False]
    assert not any(cell.is_best for cell in compare([0.5, 0.5]))
