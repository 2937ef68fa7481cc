"""A CNN epoch of MPRD over the bare forward-backward of the same backbone on the same batches.

The MPRD step is the trainer's own: memory, neighbors of the batch and of its neighbors, pair graphs, GCN labels,
N_i*, loss, backward, optimizer. The bare step is forward and backward alone. Images are already decoded. On a GPU many
steps are timed at once, as in an epoch: what the host does meanwhile costs nothing.
Bar: at most 1.05 on a CPU, 1.2 on a GPU (ResNet-50, 256 x 128, batch 32, a memory of Market-1501's size).
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import interleaved_medians, report
from PIL import Image

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.data.datasets import ImageSet, ReidDataset
from mprd.engine.trainer import Trainer
from mprd.memory import FeatureMemory
from mprd.runtime.device import cudnn_benchmark

NUM_IDS, NUM_CAMERAS = 751, 6
STEPS_AT_ONCE = {"cpu": 1, "cuda": 20}


def repeated_dataset(file: Path, num_images: int) -> ReidDataset:
    """Stand one picture in for a data set of Market-1501's size; the benchmark never reads it."""
    Image.new("RGB", (64, 128)).save(file)
    ids = np.arange(num_images)
    train = ImageSet((file,) * num_images, ids % NUM_IDS, ids // NUM_IDS % NUM_CAMERAS)
    return ReidDataset("random", file.parent, train, train.select(ids[:0]), train.select(ids[:0]), NUM_CAMERAS, None)


def clustered_memory(num_images: int, num_features: int) -> torch.Tensor:
    """Draw features in clusters of one identity each, about as tight as a half-trained network's."""
    draw = torch.Generator().manual_seed(0)
    centers = torch.randn(NUM_IDS, num_features, generator=draw)
    noise = torch.randn(num_images, num_features, generator=draw)
    return F.normalize(centers[torch.arange(num_images) % NUM_IDS] + 0.9 * noise, dim=1)


def settings(quick: bool, device: str) -> Config:
    """Return the paper's settings; the quick size is smaller in images, not in method."""
    sets = ["data.dataset=folder", "data.root=.", "data.camera_style=none", "backbone.weights=none"]
    sets += [f"train.device={device}"]
    if quick:
        sets += ["data.height=128", "data.width=64", "train.batch_size=16"]
    return load_config("market1501", overrides=tuple(sets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="smaller images and batch, a few steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--runs", type=int, default=None)
    parser.add_argument("--num-images", type=int, default=12_936)
    args = parser.parse_args()
    config, device = settings(args.quick, args.device), torch.device(args.device)
    size = (config.train.batch_size, 3, config.data.height, config.data.width)
    with tempfile.TemporaryDirectory() as folder:
        dataset = repeated_dataset(Path(folder) / "crop.png", args.num_images)
        trainer = Trainer(config, dataset, device=device)
    trainer.state.memory = FeatureMemory(clustered_memory(args.num_images, 2048).to(device))
    backbone = trainer.state.backbone.train()
    labeller = trainer.build_labeller()
    images = torch.randn(size, generator=torch.Generator().manual_seed(1)).to(device)
    order = torch.randperm(args.num_images, generator=torch.Generator().manual_seed(2)).to(device)
    batches = iter(order.split(config.train.batch_size))
    pull = torch.randn(config.train.batch_size, 2048, device=device)

    steps = STEPS_AT_ONCE[device.type]

    def bare_steps() -> None:
        for _ in range(steps):
            backbone.zero_grad(set_to_none=True)
            (backbone(images) * pull).sum().backward()

    def mprd_steps() -> None:
        for _ in range(steps):
            trainer.cnn_step(images, next(batches), labeller)

    # as in an epoch
    with cudnn_benchmark():
        full, bare = interleaved_medians(mprd_steps, bare_steps, runs=args.runs or (3 if args.quick else 5))
    stats = trainer.stats
    report(
        benchmark="epoch",
        ratio=full / bare,
        bar=1.2 if device.type == "cuda" else 1.05,
        ratio_is="MPRD step over bare forward-backward",
        mprd_ms=1000 * full / steps,
        bare_ms=1000 * bare / steps,
        num_images=args.num_images,
        batch=list(size),
        neighbors_per_image=stats.mean("k", "labelled"),
        quick=args.quick,
    )


if __name__ == "__main__":
    main()
