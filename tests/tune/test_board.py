"""The live table of a study, and the line each minute without a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from mprd.text import new_console
from mprd.tune import board, trial_queue
from mprd.tune.board import TrialBoard

from .test_trial_queue import open_study


def lines(shown: TrialBoard) -> list[list[str]]:
    console = new_console(file=io.StringIO(), width=100, record=True)
    console.print(shown.table())
    return [line.split() for line in console.export_text().splitlines() if "mu=" in line or "trials" in line]


def test_trials_are_shown_with_state_epoch_score_and_time_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=0.0)
    for module in (board, trial_queue):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    queue = open_study(tmp_path, num_trials=4)
    shown = TrialBoard(queue, new_console(file=io.StringIO()), num_epochs=10)
    assert shown.heartbeat() == "0 of 4 trials ended, 0 running"
    first, second = queue.next(), queue.next()
    assert first is not None
    assert second is not None
    queue.report(first, {"epoch": 0, "label_free_score": 0.25})
    clock.now = 20.0
    queue.report(first, {"epoch": 1, "label_free_score": 0.5})
    clock.now = 25.0
    # ten seconds an epoch: 8 epochs but 5 s of the first trial, three whole trials, two side by side
    assert lines(shown) == [
        ["mu=0.3", "0", "epoch", "2/10", "done", "0.500", "0:01:15"],
        ["mu=0.5", "0", "no", "epoch", "yet", "-", "-"],
        ["0", "of", "4", "trials", "ended,", "2", "running,", "about", "0:03:08", "left"],
    ]
    queue.finish(first, "failed", "broken")
    assert shown.heartbeat().startswith("1 of 4 trials ended, 1 running, about ")
    assert shown.heartbeat().endswith(" left; mu=0.5, seed 0: no epoch yet")
    assert lines(shown)[0] == ["mu=0.3", "0", "failed", "0.500", "-"]


def test_without_a_terminal_a_line_is_printed_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board, "HEARTBEAT_SECONDS", 0.01)
    screen = io.StringIO()
    with TrialBoard(open_study(tmp_path, num_trials=4), Console(file=screen), num_epochs=1) as shown:
        while screen.getvalue().count("\n") < 2:
            shown.is_over.wait(0.01)
    assert screen.getvalue().startswith("0 of 4 trials ended, 0 running\n" * 2)
