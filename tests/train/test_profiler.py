"""Where the time of a run goes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import torch
from rich.console import Console

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.runs.folder import RunFolder
from mprd.runtime.spans import span, spanned
from mprd.train.local import run_local
from mprd.train.profiler import PARTS, TRACED, Profile
from tests.conftest import TINY


def test_a_span_inside_another_is_subtracted_from_it(tmp_path: Path) -> None:
    profile = Profile(torch.device("cpu"), tmp_path / "trace.json")
    with profile.listening(), span("GCN"):
        for _ in spanned("load", range(2)):
            with span("memory"):
                time.sleep(0.02)
        time.sleep(0.05)
    with span("GCN"):
        time.sleep(0.02)  # nothing listens any more
    assert profile.calls == {"memory": 2, "GCN": 1, "load": 3}
    assert profile.seconds["memory"] >= 0.04
    assert 0.05 <= profile.seconds["GCN"] < profile.seconds["memory"] + 0.05


def test_a_run_of_few_steps_leaves_a_trace_and_no_profiler(tmp_path: Path) -> None:
    profile = Profile(torch.device("cpu"), tmp_path / "trace.json")
    with profile.listening():
        for _ in range(TRACED.start + 1):
            profile.count_step()
            torch.ones(3).sum()
    assert "aten::sum" in (tmp_path / "trace.json").read_text()
    assert not torch.autograd.profiler._is_profiler_enabled


def test_a_profiled_run_shows_every_part_and_ends_in_the_same_bits(
    tiny_config: Config, tiny_root: Path, tmp_path: Path
) -> None:
    live = ("neighbors.source=memory", "train.epochs=2", "train.batch_size=4")
    config = load_config("demo", overrides=(*TINY, *live), values={"data": {"root": tiny_root}})
    folder = RunFolder(tmp_path / "profiled")
    rows = run_local(config, folder, resume=False, console=Console(quiet=True), profiled=True)
    plain = run_local(config, RunFolder(tmp_path / "plain"), resume=False, console=Console(quiet=True))
    for name in ("cnn_loss", "gcn_loss", "mAP"):
        assert [row[name] for row in rows] == [row[name] for row in plain]
    table = (folder.path / "profile.txt").read_text().splitlines()
    calls = {line.split()[0]: int(line.split()[3]) for line in table[1:]}
    assert set(calls) == {*PARTS, "other"}
    # 2 epochs of 6 CNN steps
    assert (calls["loss"], calls["labels"], calls["memory"], calls["evaluation"]) == (12, 12, 12, 2)
    assert min(calls.values()) > 0
    trace = json.loads((folder.path / "trace.json").read_text())
    assert any("backward" in str(event.get("name")) for event in trace["traceEvents"])
    assert not (tmp_path / "plain" / "profile.txt").exists()
