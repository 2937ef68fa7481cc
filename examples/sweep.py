"""Sweep the threshold mu over two seeds, one run after another: `python examples/sweep.py OUT [SETTING=VALUE ...]`.

`mprd tune --study mu_sweep` does the same on Ray, side by side, with resume and a report.
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path

from rich.console import Console

from mprd.config.loading import load_config
from mprd.runs.folder import RunFolder
from mprd.train.local import run_local

SEEDS = (0, 1)
MUS = (0.2, 0.35, 0.5)


def main(out: str, *overrides: str, mus: tuple[float, ...] = MUS, seeds: tuple[int, ...] = SEEDS) -> None:
    """Train each point and print the score that chooses without labels, and mAP beside it."""
    quiet = Console(quiet=True)
    print("mu     silhouette of P  mAP")
    for mu in mus:
        last = []
        for seed in seeds:
            config = load_config("demo", overrides=(*overrides, f"pairs.mu={mu}", f"train.seed={seed}"))
            folder = RunFolder(Path(out) / f"mu{mu}-seed{seed}")
            last.append(run_local(config, folder, resume=False, console=quiet)[-1])
        silhouette, mean_ap = (statistics.mean(row[key] for row in last) for key in ("silhouette", "mAP"))
        print(f"{mu:<5}  {100 * silhouette:>15.1f}  {100 * mean_ap:.1f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
