"""What a killed process leaves of its Ray ends with it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mprd.parallel import reaper
from tests.processes import until


def test_only_the_processes_of_its_ray_are_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("there is no /proc")
    monkeypatch.setattr(reaper, "watcher", None)
    monkeypatch.delenv(reaper.MARK, raising=False)
    reaper.watch()
    assert reaper.watcher is not None
    assert reaper.watcher.stdin is not None
    script = tmp_path / "ray" / "raylet.py"
    script.parent.mkdir()
    script.write_text("import time; time.sleep(60)")
    command = [sys.executable, "-S", str(script)]
    with (
        subprocess.Popen(command) as ours,
        subprocess.Popen(command, env={**os.environ, reaper.MARK: "x"}) as other,
        # what a worker may have started
        subprocess.Popen(["sleep", "60"]) as bystander,
    ):
        # as the system does when this process ends
        reaper.watcher.stdin.close()
        assert until(lambda: ours.poll() is not None, seconds=20)
        assert reaper.watcher.wait(20) == 0
        assert (other.poll(), bystander.poll()) == (None, None)
        other.kill()
        bystander.kill()
