"""Images an epoch's input gives a second: files decoded each time, the packed cache, and a batch at once.

Drawn pedestrians of 64 x 128 pixels, the paper's augmentation without style transfer. On a CPU all in one thread and in
CPU time, so that other work on the machine does not count. On a GPU the batch is held against the forward-backward of
ResNet-50 in bf16. Bars: the cache at least 1.5 times the files on a CPU; 5 times the network on a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import report

from mprd.backbone.network import build_backbone, set_training_format
from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.data.cache import Packs
from mprd.data.datasets import ReidDataset, load_dataset
from mprd.data.images import PlainImages, TrainImages
from mprd.data.synthetic.dataset import Drawing, write_dataset
from mprd.runtime.device import cudnn_benchmark

MOST_SINGLY = 256
"""Images timed one at a time, on any machine."""


def settings(root: Path, *, height: int, width: int) -> Config:
    """Return the paper's settings on drawn pedestrians."""
    sets = ("backbone.weights=none", "data.camera_style=none", f"data.height={height}", f"data.width={width}")
    return load_config("market1501", overrides=sets, values={"data": {"root": root}})


def rate(function: Callable[[], int], *, device: torch.device) -> float:
    """Return images a second, of CPU time on a CPU; the first call goes untimed, the best of three counts."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    function()
    rates = []
    for _ in range(3):
        started = clock()
        count = function()
        if device.type == "cuda":
            torch.cuda.synchronize()
        rates.append(count / (clock() - started))
    return max(rates)


def measure(dataset: ReidDataset, folder: Path, *, size: tuple[int, int], device: torch.device, count: int) -> dict:
    """Measure each way at one size."""
    config = settings(dataset.root, height=size[0], width=size[1])
    ids = np.arange(count) % len(dataset.train)
    packs = Packs(folder, mode="auto")

    def train_images(held: Packs | None) -> TrainImages:
        return TrainImages(dataset.train, config.data, style=None, seed=0, packs=held)

    files, packed, plain = train_images(None), train_images(packs), PlainImages(dataset.train.paths, config.data)
    plain_packed = PlainImages(dataset.train.paths, config.data, packs=packs)
    at_once = 512 if device.type == "cuda" else 32

    def singly(images: TrainImages | PlainImages) -> int:
        few = ids[:MOST_SINGLY].tolist()
        for index in few:
            images[index]
        return len(few)

    def in_batches(images: TrainImages | PlainImages) -> int:
        for start in range(0, len(ids), at_once):
            images.batch(ids[start : start + at_once], device)
        return len(ids)

    found = {"files": rate(lambda: singly(files), device=torch.device("cpu"))}
    found["cache"] = rate(lambda: singly(packed), device=torch.device("cpu"))
    found["batch"] = rate(lambda: in_batches(packed), device=device)
    found["plain files"] = rate(lambda: singly(plain), device=torch.device("cpu"))
    found["plain cache"] = rate(lambda: singly(plain_packed), device=torch.device("cpu"))
    found["plain batch"] = rate(lambda: in_batches(plain_packed), device=device)
    return {name: round(value) for name, value in found.items()}


def network_rate(*, size: tuple[int, int], device: torch.device, batch: int = 32) -> float:
    """Return the images that ResNet-50 learns from in a second, forward and backward, in bf16 on a GPU."""
    precision = "bf16" if device.type == "cuda" else "float32"
    sets = ("data.root=.", "backbone.weights=none")
    config = load_config("market1501", overrides=sets)
    backbone = build_backbone(config.backbone, size=config.data.size).to(device)
    network = set_training_format(backbone, precision=precision).train()
    images = torch.randn(batch, 3, *size, device=device)

    def steps() -> int:
        for _ in range(20):
            network.zero_grad(set_to_none=True)
            network(images).sum().backward()
        return 20 * batch

    # as in an epoch
    with cudnn_benchmark():
        return rate(steps, device=device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(args.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "drawn", Drawing(num_train_ids=16, num_test_ids=2))
        config = settings(folder / "drawn", height=64, width=32)
        dataset = load_dataset(config.data)
        count = (64 if args.quick else 256) if device.type == "cpu" else 4096
        rates = {
            f"{h}x{w}": measure(dataset, folder, size=(h, w), device=device, count=count)
            for h, w in ((64, 32), (256, 128))
        }
    fields: dict[str, object] = {"images_per_second": rates, "num_timed": count, "quick": args.quick}
    large = rates["256x128"]
    if device.type == "cuda":
        learns = network_rate(size=(256, 128), device=device)
        fields |= {"ratio": large["batch"] / learns, "bar": 5, "network_images_per_second": round(learns)}
        fields["ratio_is"] = "images augmented on the device over images ResNet-50 learns from in bf16, at 256 x 128"
    else:
        fields |= {"ratio": rates["64x32"]["cache"] / rates["64x32"]["files"], "bar": 1.5}
        fields["ratio_is"] = "images from the cache over images from files, augmented one at a time, at 64 x 32"
    report(benchmark="input", **fields)


if __name__ == "__main__":
    main()
