"""What a killed process leaves of its Ray ends with it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mprd.parallel import reaper
from tests.processes import until

PARENT = """
import subprocess, sys
children = [subprocess.Popen(command) for command in (["sleep", "60"], [sys.executable, "-S", sys.argv[1]])]
print(*(child.pid for child in children), flush=True)
children[0].wait()
"""


def test_only_the_processes_of_its_ray_are_ended(tmp_path: Path) -> None:
    if not Path("/proc").is_dir():
        pytest.skip("there is no /proc")
    script = tmp_path / "ray" / "raylet.py"
    script.parent.mkdir()
    script.write_text("import time; time.sleep(60)")
    python = [sys.executable, "-S"]
    with subprocess.Popen([*python, "-c", PARENT, str(script)], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        other, ours = map(int, parent.stdout.readline().split())
        with subprocess.Popen([*python, reaper.__file__, str(parent.pid)], stdin=subprocess.PIPE) as watcher:
            time.sleep(2 * reaper.LOOK_SECONDS)
            parent.kill()
            assert watcher.stdin is not None
            # as the system does when the parent ends
            watcher.stdin.close()
            assert until(lambda: ours not in reaper.list_processes()[1], seconds=20)
            assert watcher.wait(20) == 0
        # what a worker may have started goes on
        os.kill(other, signal.SIGKILL)


DRIVER = """
import time
from mprd.parallel.cluster import find_address, start_ray
start_ray(find_address("local"), num_cpus=1)
print("up", flush=True)
time.sleep(600)
"""


@pytest.mark.ray
def test_nothing_of_a_killed_ray_survives() -> None:
    with subprocess.Popen([sys.executable, "-c", DRIVER], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        assert driver.stdout.readline() == "up\n"
        time.sleep(2 * reaper.LOOK_SECONDS)
        seen = reaper.ray_below(driver.pid)
        assert len(seen) > 3
        driver.kill()
    assert until(lambda: not seen.items() & reaper.list_processes()[1].items(), seconds=30)
