"""`python -m mprd.extract RUN IMAGES --out features.parquet`: features of a folder, a list or a glob of images."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mprd.cli import run_command

if TYPE_CHECKING:
    from mprd.config.schema import Config
    from mprd.extract.stream import Job, Stream
    from mprd.feature_file import Dtype

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def extract(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    images: Annotated[str, typer.Argument(help="A folder, a text file with a path a line, or a glob in quotes.")],
    out: Annotated[Path, typer.Option(help="Feature file to write (Parquet).")],
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint by the label-free score.")] = False,
    dtype: Annotated[str, typer.Option(help="float32 or float16.")] = "float32",
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images a forward pass; the run's by default.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    decoders: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode; the run's data.num_workers by default.")
    ] = None,
    num_workers: Annotated[int, typer.Option(min=0, help="Ray actors that extract; 0 is this process.")] = 0,
    name_pattern: Annotated[
        str | None, typer.Option(help="Regular expression for names, with groups pid and camid, both optional.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out images that cannot be read.")] = False,
) -> None:
    """Extract the features that mprd.evaluate ranks by. The same command goes on where it was stopped."""
    settings = {"best": best, "device": device, "batch_size": batch_size, "decoders": decoders, "skip_bad": skip_bad}
    run_command(
        lambda: report(
            run, images, out=out, dtype=dtype, num_workers=num_workers, name_pattern=name_pattern, settings=settings
        )
    )


def report(
    run: Path,
    images: str,
    *,
    out: Path,
    dtype: str,
    num_workers: int,
    name_pattern: str | None,
    settings: dict[str, Any],
) -> None:
    """Extract and say what came of it; `settings` holds best, device, batch_size, decoders and skip_bad."""
    from rich.console import Console

    from mprd.errors import UserError
    from mprd.extract.inputs import list_pictures, name_patterns
    from mprd.extract.stream import extract_to_file
    from mprd.model import load_model
    from mprd.runs.console import ImageLine
    from mprd.runs.folder import RunFolder
    from mprd.runtime.device import set_threads

    if dtype not in ("float32", "float16"):
        raise UserError(f"--dtype must be float32 or float16, but got {dtype!r}")
    if out.exists():
        raise UserError(f"{out}: there already; remove it or give another --out")
    kind: Dtype = "float16" if dtype == "float16" else "float32"
    config = RunFolder(run).read_config()
    patterns = name_patterns(config.data, name_pattern)
    pictures = list_pictures(images)
    set_threads(config.train.threads)
    job, stream = choose_stream(run, config, settings, num_workers=num_workers)
    model = load_model(run, best=job.best, device="cpu" if num_workers else job.device)
    console = Console()
    with ImageLine(console, len(pictures.paths)) as line:
        num_rows = extract_to_file(
            model, job, pictures, out, dtype=kind, patterns=patterns, stream=stream, on_images=line.advance
        )
    num_bad = len(pictures.paths) - num_rows
    left_out = f" ({num_bad} left out, they cannot be read)" if num_bad else ""
    told = f"{out}: {num_rows} images{left_out}, {model.num_features} numbers each, {line.speed():.0f} images/s"
    console.print(told, highlight=False, soft_wrap=True)


def choose_stream(run: Path, config: Config, settings: dict[str, Any], *, num_workers: int) -> tuple[Job, Stream]:
    """Decide where the network runs and who decodes: this process, or so many actors."""
    from functools import partial

    from mprd.extract.stream import Job, stream_parts
    from mprd.runtime.device import choose_device

    stream = stream_parts
    if num_workers:
        from mprd.parallel.backends import check_ray

        check_ray("--num-workers")
        from mprd.extract.ray_actors import stream_on_actors
        from mprd.parallel.ray_actors import count_gpus

        stream = partial(stream_on_actors, num_workers=num_workers)
        device = settings["device"].replace("auto", "cuda" if count_gpus(num_workers) else "cpu")
    else:
        device = str(choose_device(settings["device"], setting="--device"))
    decoders = settings["decoders"]
    if decoders is None:
        decoders = default_decoders(config.data.num_workers, on_gpu=device != "cpu", num_workers=num_workers)
    batch_size = settings["batch_size"] or config.eval.batch_size
    return Job(run.resolve(), settings["best"], device, batch_size, settings["skip_bad"], decoders), stream


def default_decoders(configured: int, *, on_gpu: bool, num_workers: int) -> int:
    """Choose how many processes decode: an accelerator outruns one, and an actor on CPUs is one of many."""
    from mprd.runtime.device import num_cores

    if on_gpu:
        return max(configured, min(16, num_cores() // max(1, num_workers) - 1))
    return 0 if num_workers else configured
