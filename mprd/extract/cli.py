"""`python -m mprd.extract RUN IMAGES --out features.parquet`: features of a folder, a list or a glob of images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mprd.cli import OTHER_CAMERAS, Command, run_command
from mprd.text import new_console

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
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
    whiten: Annotated[bool, typer.Option("--whiten", help="Features whitened as the training images were.")] = False,
    other_cameras: Annotated[bool, typer.Option("--other-cameras", help=OTHER_CAMERAS)] = False,
) -> None:
    """Extract the features that mprd.evaluate ranks by. The same command resumes after a stop."""
    options = {"best": best, "dtype": dtype, "batch_size": batch_size, "device": device, "decoders": decoders}
    options |= {"num_workers": num_workers, "name_pattern": name_pattern, "skip_bad": skip_bad, "whiten": whiten}
    options |= {"other_cameras": other_cameras}
    run_command(lambda: extract_and_print(run, images, out, options))


def extract_and_print(run: Path, images: str, out: Path, options: dict[str, Any]) -> None:
    """Extract with the keyword arguments `options` of `extract_run`, and print a summary."""
    from mprd.extract.run import extract_run

    summary = extract_run(run, images, out, console=new_console(), **options)
    new_console().print(f"{out}: {summary}", highlight=False, soft_wrap=True)
