"""`python -m mprd.export RUN --format onnx`: the network of a run as one file for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mprd.cli import Command, run_command

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
def export(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    format_: Annotated[str, typer.Option("--format", help="onnx, torchscript or torch-export.")] = "onnx",
    out: Annotated[Path | None, typer.Option(help="File to write; by default backbone.onnx in the run folder.")] = None,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint by the label-free score.")] = False,
    whiten: Annotated[bool, typer.Option("--whiten", help="Whiten features as the training images were.")] = False,
    camera: Annotated[
        str | None, typer.Option(help="The camera of the images, as in file names; takes its statistics.")
    ] = None,
) -> None:
    """Write the network with its pre-processing, compared with the original."""
    run_command(lambda: export_and_print(run, kind=format_, out=out, best=best, whiten=whiten, camera=camera))


def export_and_print(
    run: Path, *, kind: str, out: Path | None, best: bool, whiten: bool = False, camera: str | None = None
) -> None:
    """Export, and print the files and the largest difference from the original."""
    from mprd.export.formats import SUFFIXES, check_packages, export_network
    from mprd.model import load_model
    from mprd.storage.copies import push

    check_packages(kind)
    model = load_model(run, best=best, device="cpu")
    exported = export_network(model, out or run / f"backbone{SUFFIXES[kind]}", kind=kind, whiten=whiten, camera=camera)
    for file in (exported.path, exported.description):
        push(file)
    print(f"{exported.path}: {model.num_features} features from {model.config.data.height} x "
          f"{model.config.data.width} images; {exported.description.name} says how to prepare them")  # fmt: skip
    print(f"max difference {exported.difference:.1e} over {exported.num_images} images ({exported.source})")
