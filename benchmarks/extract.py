"""`mprd.extract` from files to a finished feature file, over the bare backbone on batches that lie in memory.

Both in turn, images a second. The files are JPEGs of Market-1501's size (64 x 128 pixels); decoding, resizing, the
network, and writing Parquet are in the time, building the network is not.
Bar: at least 0.9 (ResNet-50, 256 x 128, the run's own batch size, one process that decodes).
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import interleaved_medians, report
from PIL import Image

from mprd.backbone.network import build_backbone
from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.extract.inputs import find_images, name_patterns
from mprd.extract.stream import ExtractOptions, extract_to_file, stream_parts
from mprd.model import Model


def write_crops(folder: Path, num_images: int) -> None:
    """Write noisy pictures as JPEGs: they take longer to decode than photographs of their size."""
    draw = np.random.default_rng(0)
    for number in range(num_images):
        coarse = Image.fromarray(draw.integers(0, 255, (16, 8, 3), dtype=np.uint8)).resize((64, 128))
        pixels = np.asarray(coarse, dtype=np.float64) + draw.normal(0, 10, (128, 64, 3))
        picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        picture.save(folder / f"{number % 97:04d}_c{number % 6 + 1}s1_{number:06d}_00.jpg", quality=90)


def settings(quick: bool, decoders: int) -> Config:
    """Return the paper's settings; the quick size is smaller in images, not in method."""
    sets = ["data.dataset=folder", "data.root=.", "backbone.weights=none", f"data.num_workers={decoders}"]
    if quick:
        sets += ["eval.batch_size=16"]
    return load_config("market1501", overrides=tuple(sets))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer images, smaller batches")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--decoders", type=int, default=1, help="processes that decode")
    parser.add_argument("--num-images", type=int, default=None)
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    config, device = settings(args.quick, args.decoders), torch.device(args.device)
    num_images = args.num_images or (64 if args.quick else 256) * (16 if device.type == "cuda" else 1)
    batch_size = config.eval.batch_size
    backbone = build_backbone(config.backbone, size=config.data.size).to(device).eval()
    model = Model("bench", config, backbone, device)
    draw = torch.Generator().manual_seed(0)
    batches = [torch.randn(batch_size, 3, config.data.height, config.data.width, generator=draw).to(device)] * (
        num_images // batch_size
    )

    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(place) / "crops", Path(place) / "out" / "features.parquet"
        folder.mkdir()
        write_crops(folder, len(batches) * batch_size)
        options = ExtractOptions(folder, False, args.device, batch_size, False, args.decoders)

        def extract() -> None:
            shutil.rmtree(out.parent, ignore_errors=True)
            images, patterns = find_images(str(folder)), name_patterns(config.data)
            extract_to_file(
                model,
                options,
                images,
                out,
                dtype="float32",
                patterns=patterns,
                stream=stream_parts,
                on_images=lambda num_images, is_earlier: None,
            )

        @torch.inference_mode()
        def bare() -> None:
            for batch in batches:
                model.backbone(batch)

        ours, theirs = interleaved_medians(extract, bare, runs=args.runs)
    report(
        benchmark="extract",
        ratio=theirs / ours,
        bar=0.9,
        ratio_is="images a second of extract over those of the bare backbone",
        extract_images_per_second=len(batches) * batch_size / ours,
        bare_images_per_second=len(batches) * batch_size / theirs,
        num_images=len(batches) * batch_size,
        batch_size=batch_size,
        decoders=args.decoders,
        quick=args.quick,
    )


if __name__ == "__main__":
    main()
