"""What a terminal shows of a run."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from mprd.runs import console
from mprd.runs.console import EpochLines, closing_lines, final_table

ROW = {
    "epoch": 99,
    "cnn_loss": 3.6114,
    "gcn_loss": None,
    "positives": 1234.5,
    "pair_precision": 1.0,
    "pair_recall": 0.5,
    "labelled_precision": 1.0,
    "mAP": 0.071,
    "rank1": 1.0,
    "mAP_whitened": 0.09,
    "mAP_trapezoid": 0.08,
    "images_per_second": 12345.6,
    "label_free_score": 0.3,
    "seconds": 5,
}


@pytest.mark.parametrize("without", [(), ("pair_precision", "pair_recall")])
def test_rows_of_epochs_fit_a_narrow_terminal_under_titles_told_once(without: tuple[str, ...]) -> None:
    screen = io.StringIO()
    lines = EpochLines(Console(file=screen, width=80), num_epochs=100)
    row = {key: value for key, value in ROW.items() if key not in without}
    lines.epoch(row)
    lines.epoch(row)
    titles, *rows = screen.getvalue().splitlines()
    assert len(rows) == 2
    assert {len(line) for line in (titles, *rows)} == {len(titles)}
    assert len(titles) < 80
    assert titles.split()[:4] == ["epoch", "loss", "gcn", "|P|"]
    assert rows[0].split()[:4] == ["100/100", "3.611", "-", "1234.5"]


def test_without_a_terminal_a_long_epoch_is_told_each_minute(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: clock.now))
    screen = io.StringIO()
    lines = EpochLines(Console(file=screen, width=80), num_epochs=100)
    for clock.now in (30.0, 59.0, 61.0, 90.0, 122.0):
        lines.step(epoch=1, phase="cnn", step=int(clock.now), num_steps=400, loss=2.0)
    assert screen.getvalue() == "".join(f"epoch 2/100 cnn  step {step}/400  loss 2.000\n" for step in (61, 122))


@pytest.mark.parametrize("width", [80, 200])
def test_the_final_table_does_not_wrap(width: int) -> None:
    screen = io.StringIO()
    Console(file=screen, width=width).print(final_table([ROW], {"mAP": 0.01, "rank1": 0.02}))
    text = screen.getvalue()
    assert "..." not in text
    assert "\u2026" not in text
    assert next(line.split() for line in text.splitlines() if line.startswith(" mAP ")) == ["mAP", *["7.1"] * 3, "1.0"]


def test_a_finished_run_names_its_files_and_the_next_command() -> None:
    assert "mprd report runs/first" in closing_lines(Path("runs/first"))
