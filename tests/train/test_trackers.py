"""Live view of a run: TensorBoard's events always, another tracker only where it is asked for and there."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mprd.config.loading import load_config
from mprd.errors import UserError
from mprd.train.trackers import Trackers, check_tracker, tracker_id


class Recorded:
    """A tracker that keeps what it is given, until it is full."""

    def __init__(self, room: int) -> None:
        self.room, self.rows = room, []  # type: ignore[var-annotated]

    def log(self, row: dict[str, float], epoch: int) -> None:
        if len(self.rows) == self.room:
            raise ConnectionError("the server went away\nwith details")
        self.rows.append((epoch, row))

    def close(self) -> None: ...


def test_the_numbers_of_a_row_reach_tensorboard_and_nothing_else_does(tmp_path: Path) -> None:
    trackers = Trackers(load_config(), tmp_path)
    trackers.log({"epoch": 3, "mAP": 0.25, "gcn_loss": None, "labeller": "gcn"})
    trackers.close()
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["epoch", "mAP"]
    assert [(event.step, event.value) for event in events.Scalars("mAP")] == [(3, 0.25)]
    assert [path.name for path in tmp_path.iterdir()] == ["events"]


def test_a_tracker_that_fails_is_told_once_and_the_others_go_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Late(Recorded):
        def close(self) -> None:
            raise TimeoutError("no answer")

    trackers = Trackers(load_config(), tmp_path)
    failing, sound = Recorded(room=1), Late(room=9)
    trackers.all += [failing, sound]
    with caplog.at_level(logging.WARNING, logger="mprd"):
        for epoch in range(3):
            trackers.log({"epoch": epoch, "mAP": 0.5})
        trackers.close()
    assert caplog.messages == [
        "Recorded failed and is dropped: the server went away",
        "Late failed and is dropped: no answer",
    ]
    assert [epoch for epoch, _ in failing.rows] == [0]
    assert [epoch for epoch, _ in sound.rows] == [0, 1, 2]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_is_told_with_its_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=rf"^train\.tracker: {name} is not installed; pip install 'mprd\[{name}\]'"):
        check_tracker(name)
    check_tracker("none")


def test_a_tracker_starts_in_the_group_of_its_run_and_one_that_does_not_start_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail() -> None:
        raise ConnectionError("no server")

    started: list[dict[str, Any]] = []
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: started.append(given)))
    monkeypatch.setitem(sys.modules, "mlflow", SimpleNamespace(MlflowClient=fail))
    for name in ("wandb", "mlflow"):
        Trackers(load_config(overrides=(f"train.tracker={name}", "train.tracker_group=mu_sweep")), tmp_path)
    assert [given["group"] for given in started] == ["mu_sweep"]
    assert caplog.messages == ["mlflow does not start; see MLFLOW_TRACKING_URI: no server"]


def test_a_run_keeps_its_name_at_a_tracker(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    first, again, other = (tracker_id(tmp_path / name) for name in ("a", "a", "b"))
    assert first == again != other
    assert len(first) == 16
