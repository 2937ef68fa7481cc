"""Train on a folder of crops and print the result: `python examples/train_on_crops.py ROOT OUT [SETTING=VALUE ...]`.

`mprd train --data ROOT --out OUT` does the same where ImageNet weights are at hand, on Ray where it is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console

from mprd.runs.folder import RunFolder
from mprd.train.local import run_local
from mprd.train.recipe import read_settings


def main(root: str, out: str, *overrides: str) -> None:
    """Train by the recommended recipe; the layout of the folder is recognized."""
    config = read_settings({"preset": "recommended", "data": Path(root), "set_": list(overrides)})
    print(f"{config.data.dataset}, {config.backbone.name}, {config.train.epochs} epochs")
    rows = run_local(config, RunFolder(Path(out)), resume=False, console=Console(quiet=True))
    for row in rows:
        figures = f"mAP {100 * row['mAP']:.1f}" if row.get("mAP") is not None else "nothing to evaluate on"
        print(f"epoch {row['epoch'] + 1}: {row['positives']:.1f} positives per image, {figures}")


if __name__ == "__main__":
    main(*sys.argv[1:])
