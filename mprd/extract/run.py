"""Extract the features of images with the network of a run, in this process or on Ray actors."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from rich.console import Console

from mprd.errors import UserError
from mprd.extract.inputs import find_images, name_patterns
from mprd.extract.stream import ExtractOptions, StreamFn, extract_to_file, stream_parts
from mprd.feature_file import Dtype
from mprd.runs.console import ImageLine
from mprd.runs.folder import RunFolder
from mprd.runtime.device import choose_device, set_threads
from mprd.runtime.machine import num_cores
from mprd.text import new_console

MAX_DECODERS = 16
"""Most decoding processes that are started for one accelerator without `--decoders`."""


@dataclass(frozen=True)
class ExtractSummary:
    """Size and speed of an extraction."""

    num_rows: int
    num_bad: int
    """Images that could not be read."""
    num_features: int
    images_per_second: float

    def __str__(self) -> str:
        bad = f" ({self.num_bad} left out, they cannot be read)" if self.num_bad else ""
        return f"{self.num_rows} images{bad}, {self.num_features} numbers each, {self.images_per_second:.0f} images/s"


def extract_run(
    run: Path,
    images: str,
    out: Path,
    *,
    best: bool = False,
    dtype: str = "float32",
    batch_size: int | None = None,
    device: str = "auto",
    decoders: int | None = None,
    num_workers: int = 0,
    name_pattern: str | None = None,
    skip_bad: bool = False,
    whiten: bool = False,
    other_cameras: bool = False,
    console: Console | None = None,
) -> ExtractSummary:
    """Write the features of `images` into the feature file `out`; arguments are the options of `mprd extract`.

    Raises UserError for missing images, unreadable images without `skip_bad`, and an `out` that exists.
    """
    file_dtype = check_dtype(dtype)
    if out.exists():
        raise UserError(f"{out}: exists already; remove it or give another --out")
    config = RunFolder(run).read_config()
    patterns = name_patterns(config.data, name_pattern)
    found = find_images(images)
    set_threads(config.train.threads)
    stream, device = choose_stream(device, num_workers=num_workers)
    if decoders is None:
        decoders = default_decoders(config.data.num_workers, on_gpu=device != "cpu", num_workers=num_workers)
    batch_size = batch_size or config.eval.batch_size
    options = ExtractOptions(run.resolve(), best, device, batch_size, skip_bad, decoders, whiten, other_cameras)
    # actors load their own
    model = replace(options, device="cpu").load_model() if num_workers else options.load_model()
    with ImageLine(console or new_console(quiet=True), len(found.paths)) as line:
        num_rows = extract_to_file(
            model, options, found, out, dtype=file_dtype, patterns=patterns, stream=stream, on_images=line.advance
        )
    return ExtractSummary(num_rows, len(found.paths) - num_rows, model.num_features, line.speed())


def check_dtype(dtype: str) -> Dtype:
    """Narrow the type; raise UserError for an unknown dtype."""
    if dtype == "float32" or dtype == "float16":
        return dtype  # type: ignore[return-value]
    raise UserError(f"--dtype must be float32 or float16, but got {dtype!r}")


def choose_stream(device: str, *, num_workers: int) -> tuple[StreamFn, str]:
    """Choose this process (0 workers) or that many Ray actors, and the device: `cpu`, `cuda` or `cuda:N`."""
    if not num_workers:
        return stream_parts, str(choose_device(device, setting="--device"))
    from mprd.parallel.backends import check_ray

    check_ray("--num-workers")
    from mprd.extract.ray_actors import stream_on_actors
    from mprd.parallel.ray_actors import count_gpus

    on_actors = partial(stream_on_actors, num_workers=num_workers)
    return on_actors, device.replace("auto", "cuda" if count_gpus(num_workers) else "cpu")


def default_decoders(configured: int, *, on_gpu: bool, num_workers: int) -> int:
    """Return the number of decoding processes without `--decoders`.

    One process cannot keep an accelerator busy; actors on CPUs already run in parallel and decode themselves.
    """
    if on_gpu:
        return max(configured, min(MAX_DECODERS, num_cores() // max(1, num_workers) - 1))
    return 0 if num_workers else configured
