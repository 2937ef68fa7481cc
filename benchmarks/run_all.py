"""Run every benchmark one after the other and keep their JSON lines in `benchmarks/results/<device>-<date>.json`."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch

HERE = Path(__file__).parent
ON_ANY = ("labelling", "neighbors", "evaluation", "epoch", "extract", "search", "input", "run")
ON_CPUS = "workers"
ON_RAY = ("subgraphs", "cluster")
BENCHMARKS = (*ON_ANY, ON_CPUS, *ON_RAY)
"""Scripts of this folder, with their options."""
LONG = {"cluster": 3600.0}
"""Seconds that may be more than the others'."""


def left_out(name: str) -> str | None:
    """Say why a benchmark cannot be run here; None where it can."""
    if name in ON_RAY and find_spec("ray") is None:
        return "ray is not installed"
    if name == ON_CPUS and torch.cuda.is_available():
        return "of CPUs alone"
    return None


def run(name: str, *, quick: bool, timeout: float) -> dict:
    """Run one benchmark; a failure is recorded with its last line, not hidden, and so is what is missing here."""
    if reason := left_out(name):
        return {"benchmark": name, "left_out": reason}
    script, *options = name.split()
    command = [sys.executable, str(HERE / f"{script}.py"), *options, *(["--quick"] if quick else [])]
    started, timeout = time.monotonic(), max(timeout, LONG.get(script, 0))
    shown = ["python", f"benchmarks/{script}.py", *command[2:]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired as late:
        said = (late.stdout or b"").decode(errors="replace").strip().splitlines() or ["nothing"]
        return {"benchmark": name, "command": shown, "failed": f"not done after {timeout:.0f} s", "said_last": said[-1]}
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines() or ["no output"]
    took = {"command": shown, "wall_seconds": round(time.monotonic() - started, 1)}
    if done.returncode:
        return {"benchmark": name, **took, "failed": lines[-1]}
    return {"benchmark": name, **took, **json.loads(lines[-1])}


def save(results: list[dict], *, quick: bool) -> Path:
    """Write what there is into the file of the device that the results name, and return its path."""
    device = next((r["device"] for r in results if "device" in r), "unknown")
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    file = HERE / "results" / f"{slug}{'-quick' if quick else ''}-{datetime.date.today().isoformat()}.json"
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(results, indent=2) + "\n")
    return file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--timeout", type=float, default=900, help="seconds a benchmark may take")
    parser.add_argument("names", nargs="*", default=[], help=f"some of {', '.join(BENCHMARKS)}; all by default")
    args = parser.parse_args()
    results = []
    for name in args.names or BENCHMARKS:
        results.append(run(name, quick=args.quick, timeout=args.timeout))
        print(json.dumps(results[-1]), flush=True)
        # as it goes: whoever lent the machine may end this before the last one
        if any("device" in result for result in results):
            save(results, quick=args.quick)
    print(f"wrote {save(results, quick=args.quick).relative_to(HERE.parent)}")
    raise SystemExit(any("failed" in result for result in results))


if __name__ == "__main__":
    main()
