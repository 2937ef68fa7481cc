"""A whole run of MPRD at the size of Market-1501 on random images: ResNet-50 from random weights, batch 32, bf16.

12,936 training images of 751 identities, 3,368 queries, 15,913 gallery images, evaluation every five epochs; images are
noise, so only time and memory mean anything. The packed cache is written directly, not decoded from files.
Bar: 40 epochs in under 5 minutes on one H200-class GPU. With fewer, the time of 40 is worked out from the later ones.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import report

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.data.cache import Pack, Packs, Purpose
from mprd.data.datasets import ImageSet, ReidDataset
from mprd.engine.callbacks import Callbacks
from mprd.engine.trainer import Trainer, fit
from mprd.evaluate.epoch_metrics import epoch_row
from mprd.train.profiler import Profile

EPOCHS = 40
SIZES = (12_936, 3_368, 15_913)
NUM_CAMERAS = 6


class RandomPacks(Packs):
    """Hand out noise in the place of decoded images: Market's 128 x 64 for training, the network's size for tests."""

    def open(self, paths: Any, *, height: int, width: int, purpose: Purpose) -> Pack | None:
        frame = (128, 64) if purpose == "train" else (height, width)
        key = (len(paths), *frame)
        if key not in self.opened:
            noise = np.random.default_rng(0).integers(0, 256, (len(paths), *frame, 3), dtype=np.uint8)
            self.opened[key] = Pack(noise, {path: row for row, path in enumerate(paths)})
        return self.opened[key]


def random_dataset(sizes: tuple[int, int, int], packs: Packs) -> ReidDataset:
    """Name as many images as Market-1501 has; none of them is a file."""
    sets = []
    about = (("train", 751, 0), ("query", 750, 1000), ("test", 750, 1000))
    for (name, most, start), count in zip(about, sizes, strict=True):
        num_ids = min(most, count // NUM_CAMERAS)
        numbers = np.arange(count)
        paths = tuple(Path(f"{name}-{number}") for number in numbers)
        sets.append(ImageSet(paths, start + numbers % num_ids, numbers // num_ids % NUM_CAMERAS))
    return ReidDataset("random", Path(), sets[0], sets[1], sets[2], NUM_CAMERAS, None, packs)


def settings(args: argparse.Namespace) -> Config:
    """Return the paper's settings, in bf16."""
    sets = ["data.root=.", "data.camera_style=none", "backbone.weights=none", "eval.every=5", "eval.batch_size=256"]
    sets += [f"train.device={args.device}", f"train.epochs={args.epochs}", f"train.precision={args.precision}"]
    sets += args.set or []
    if args.quick:
        sets += ["data.height=64", "data.width=32", "backbone.name=resnet18", "gcn.batch_size=256"]
    return load_config("market1501", overrides=tuple(sets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1 image in 50, ResNet-18 at 64 x 32, two epochs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--epochs", type=int, default=None, help="5 by default; the whole run has 40")
    parser.add_argument("--precision", default=None)
    parser.add_argument("--profile", action="store_true", help="also print the table of parts; slower on a GPU")
    parser.add_argument("--set", action="append", metavar="SECTION.FIELD=VALUE")
    args = parser.parse_args()
    device = torch.device(args.device)
    args.epochs = args.epochs or (2 if args.quick else 5)
    args.precision = args.precision or ("bf16" if device.type == "cuda" else "float32")
    sizes: Any = tuple(size // 50 for size in SIZES) if args.quick else SIZES
    config = settings(args)
    with tempfile.TemporaryDirectory() as folder:
        packs = RandomPacks(Path(folder), mode=config.data.cache)
    rows: list[dict[str, Any]] = []
    ends: list[float] = []

    def after_epoch(trainer: Trainer) -> None:
        rows.append(epoch_row(trainer))
        ends.append(time.perf_counter())
        print(f"epoch {len(rows)}: {ends[-1] - started:.1f} s, loss {rows[-1]['cnn_loss']:.3f}", flush=True)

    trainer = Trainer(config, random_dataset(sizes, packs), device=device, callbacks=Callbacks(after_epoch=after_epoch))
    profile = Profile(device, Path(tempfile.gettempdir()) / "trace.json")
    if args.profile:
        profile.attach(trainer)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    trainer.fill_memory()
    filled = time.perf_counter()
    fit(trainer)
    if args.profile:
        print(profile.table())
    whole = ends[-1] - started
    # what one more epoch costs, taken behind the first, which also warms up
    an_epoch = (ends[-1] - ends[0]) / max(1, len(ends) - 1)
    forty = ends[0] - started + an_epoch * (EPOCHS - 1)
    report(
        benchmark="run",
        ratio=forty / 300,
        ratio_is=f"time of 40 epochs over the bar of 300 s, from {len(rows)} of them",
        bar=1.0,
        seconds=whole,
        seconds_of_40_epochs=forty,
        fill_seconds=filled - started,
        epochs=len(rows),
        cnn_seconds=rows[-1]["cnn_seconds"],
        gcn_seconds=rows[-1]["gcn_seconds"],
        images_per_second=rows[-1]["images_per_second"],
        peak_device_gb=torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else None,
        precision=args.precision,
        size=[config.data.height, config.data.width],
        num_images=list(sizes),
        quick=args.quick,
    )


if __name__ == "__main__":
    main()
