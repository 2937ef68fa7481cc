"""Where the time of a run goes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.runs.folder import RunFolder
from mprd.train.local import run_local
from mprd.train.profiler import PARTS, Profile
from tests.conftest import TINY


def test_a_part_inside_another_is_taken_off_it(tmp_path: Path) -> None:
    profile = Profile(torch.device("cpu"), tmp_path / "trace.json")
    inner = profile.timed("memory", lambda: time.sleep(0.02))

    def outer() -> None:
        inner()
        inner()
        time.sleep(0.05)

    profile.timed("GCN", outer)()
    assert profile.calls == {"memory": 2, "GCN": 1}
    assert profile.seconds["memory"] >= 0.04
    assert profile.seconds["GCN"] >= 0.05
    assert profile.seconds["GCN"] < profile.seconds["memory"] + 0.05
    with pytest.raises(ZeroDivisionError):
        profile.timed("GCN", lambda: 1 / 0)()
    assert profile.inner == []


def test_a_profiled_run_says_where_its_time_went_and_ends_in_the_same_bits(
    tiny_config: Config, tiny_root: Path, tmp_path: Path
) -> None:
    live = ("neighbors.source=memory", "neighbors.metric=cosine", "neighbors.standardise=false")
    live += ("gcn.variant=structure", "train.epochs=2", "train.batch_size=4")
    config = load_config("demo", overrides=(*TINY, *live), values={"data": {"root": tiny_root}})
    folder = RunFolder(tmp_path / "profiled")
    rows = run_local(config, folder, resume=False, console=Console(quiet=True), profiled=True)
    plain = run_local(config, RunFolder(tmp_path / "plain"), resume=False, console=Console(quiet=True))
    for name in ("cnn_loss", "gcn_loss", "mAP"):
        assert [row[name] for row in rows] == [row[name] for row in plain]
    table = (folder.path / "profile.txt").read_text().splitlines()
    calls = {line.split()[0]: int(line.split()[3]) for line in table[1:]}
    assert set(calls) == {*PARTS, "other"}
    # 2 epochs of 6 CNN steps: each a forward and a step, a loss, a memory update; batches end with an empty wait
    assert (calls["network"], calls["loss"], calls["memory"]) == (24, 12, 12)
    # begun, ended and written down; two searches a step, and one of all images an epoch, beside those of copies
    assert calls["labels"] == 36
    assert 26 <= calls["neighbors"] <= 28
    assert calls["evaluation"] == 2
    assert min(calls.values()) > 0
    assert sum(float(line.split()[1]) for line in table[1:]) > 0
    trace = json.loads((folder.path / "trace.json").read_text())
    assert any("backward" in str(event.get("name")) for event in trace["traceEvents"])
    assert not (tmp_path / "plain" / "profile.txt").exists()
