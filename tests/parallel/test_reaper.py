"""What a killed process leaves of its Ray ends with it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mprd.parallel import reaper
from tests.processes import until

SECONDS = 0.2
"""Between looks, and of grace, of the watcher here."""


@pytest.fixture
def quick(tmp_path: Path) -> Path:
    """Write the watcher's file with shorter times."""
    file = tmp_path / "reaper.py"
    source = Path(reaper.__file__).read_text()
    source, number = re.subn(r"^(LOOK|GRACE)_SECONDS = .*$", rf"\1_SECONDS = {SECONDS}", source, flags=re.MULTILINE)
    assert number == 2
    file.write_text(source)
    return file


def let_it_look() -> None:
    """Wait until a watcher that has been started has listed the processes."""
    time.sleep(1 + 2 * SECONDS)


PARENT = """
import subprocess, sys
children = [subprocess.Popen(command) for command in (["sleep", "60"], [sys.executable, "-S", sys.argv[1]])]
print(*(child.pid for child in children), flush=True)
children[0].wait()
"""


def test_only_the_processes_of_its_ray_are_ended(quick: Path, tmp_path: Path) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("there is no /proc")
    script = tmp_path / "ray" / "raylet.py"
    script.parent.mkdir()
    script.write_text("import time; time.sleep(60)")
    python = [sys.executable, "-S"]
    with subprocess.Popen([*python, "-c", PARENT, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        other, ours = map(int, parent.stdout.readline().split())
        with subprocess.Popen([*python, str(quick), str(parent.pid)], stdin=subprocess.PIPE) as watcher:
            let_it_look()
            parent.kill()
            assert watcher.stdin is not None
            # as the system does when the parent ends
            watcher.stdin.close()
            assert until(lambda: ours not in reaper.list_processes()[1], seconds=20)
            assert watcher.wait(20) == 0
        # what a worker may have started goes on
        os.kill(other, signal.SIGKILL)


DRIVER = """
import os, signal, sys, time
from mprd.parallel import reaper
from mprd.parallel.ray_actors import join_ray
reaper.__file__ = sys.argv[1]
os.environ.pop("RAY_ADDRESS", None)
stop = lambda *_: None
signal.signal(signal.SIGTERM, stop)
join_ray(1)
# Ray replaces it, but a run stops by its own
assert signal.getsignal(signal.SIGTERM) is stop
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.ray
def test_a_ray_leaves_the_signals_to_the_run_and_nothing_of_a_killed_one_survives(quick: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", DRIVER, str(quick)], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "up\n"
        let_it_look()
        seen = reaper.ray_below(driver.pid)
        assert len(seen) > 3
        driver.kill()
    assert until(lambda: not seen.items() & reaper.list_processes()[1].items(), seconds=30)
