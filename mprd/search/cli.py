"""`python -m mprd.search RUN --gallery FOLDER --query IMAGE`: the gallery's images that are nearest to a query."""

from __future__ import annotations

import glob
import hashlib
import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mprd.cli import run_command

if TYPE_CHECKING:
    from mprd.extract.inputs import Pictures
    from mprd.model import Model
    from mprd.search.gallery import Gallery, IndexKind
    from mprd.search.results import Search

__all__ = ["Gallery", "app"]

logger = logging.getLogger("mprd")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
MOST_TABLES = 10


def __getattr__(name: str) -> Any:
    """Import torch only where somebody asks for a gallery."""
    if name == "Gallery":
        from mprd.search.gallery import Gallery

        return Gallery
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@app.command()
def search(
    run: Annotated[Path, typer.Argument(help="Run folder.")],
    gallery: Annotated[Path, typer.Option(help="Folder of images, or a feature file (mprd.extract).")],
    query: Annotated[list[str], typer.Option(help="An image, a folder, a list or a glob; several may follow.")],
    more: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="More queries.")] = None,
    top: Annotated[int, typer.Option(min=1, help="Images to find for each query.")] = 10,
    cameras: Annotated[
        str,
        typer.Option(
            help="all; others: none of the query's own camera; protocol: as mprd.evaluate ranks, none of the query's "
            "own identity and camera, and no junk."
        ),
    ] = "all",
    rerank: Annotated[bool, typer.Option("--rerank", help="k-reciprocal re-ranking, for small galleries.")] = False,
    standardise: Annotated[
        bool, typer.Option("--standardise", help="Compare features standardised within each camera.")
    ] = False,
    index: Annotated[str, typer.Option(help="exact, or pq: codes of four bits, for large galleries.")] = "exact",
    html: Annotated[Path | None, typer.Option(help="Write one page with everything in it.")] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
    features_dir: Annotated[
        Path | None, typer.Option(help="Where a folder's features are kept; features/ in the run folder by default.")
    ] = None,
    best: Annotated[bool, typer.Option("--best", help="The best checkpoint by the label-free score.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    name_pattern: Annotated[
        str | None, typer.Option(help="Regular expression for names, with groups pid and camid, both optional.")
    ] = None,
) -> None:
    """Find a person's other appearances: rank a gallery of images by their distance to queries."""
    choices = {"top": top, "cameras": cameras, "rerank": rerank, "standardise": standardise, "index": index}
    model = {"best": best, "device": device}
    run_command(
        lambda: report(
            run, gallery, [*query, *(more or [])], choices, model,
            features_dir=features_dir, name_pattern=name_pattern, html=html, as_json=json_,
        )
    )  # fmt: skip


def report(
    run: Path,
    gallery: Path,
    queries: Sequence[str],
    choices: dict[str, Any],
    model: dict[str, Any],
    *,
    features_dir: Path | None,
    name_pattern: str | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Search, and show what was found; `choices` holds the options of the ranking, and `model` best and device."""
    import json

    from mprd.runs.folder import write_text

    found = find(
        run, gallery, queries, choices, model, features_dir=features_dir or run / "features", name_pattern=name_pattern
    )
    if html is not None:
        from mprd.search.page import render_search

        write_text(html, render_search(found))
        logger.info("page: %s (%.1f MB)", html, html.stat().st_size / 1e6)
    if as_json:
        print(json.dumps(found.to_dict()))
    else:
        print_tables(found)


def find(
    run: Path,
    gallery: Path,
    queries: Sequence[str],
    choices: dict[str, Any],
    model: dict[str, Any],
    *,
    features_dir: Path,
    name_pattern: str | None,
) -> Search:
    """Extract what has no features yet, and rank the gallery for each query."""
    from mprd.errors import UserError
    from mprd.extract.inputs import ids_of, list_pictures, name_patterns
    from mprd.model import load_model
    from mprd.runs.folder import RunFolder
    from mprd.runtime.device import set_threads
    from mprd.search.gallery import check_kind
    from mprd.search.results import Picture, Search, answer, check_cameras, standardise_gallery

    choice = check_cameras(choices["cameras"])
    kind = check_kind(choices["index"])
    for option in ("rerank", "standardise"):
        if choices[option] and kind != "exact":
            raise UserError(f"--{option} needs the whole gallery, an index looks at a part of it: give one of the two")
    config = RunFolder(run).read_config()
    patterns = name_patterns(config.data, name_pattern)
    asked = [list_pictures(source) for source in queries]
    set_threads(config.train.threads)
    network = load_model(run, **model)
    opened = open_gallery(network, gallery, run, model, patterns=patterns, features_dir=features_dir, index=kind)
    names = [(path, name) for pictures in asked for path, name in zip(*pictures, strict=True)]
    pictures = [Picture(path, *ids_of(name, patterns)) for path, name in names]
    features = network.extract([path for path, _ in names])
    if choices["standardise"]:
        opened, features = standardise_gallery(opened, pictures, features)
    answers = answer(opened, pictures, features, top=choices["top"], cameras=choice, rerank=choices["rerank"])
    distance = "k-reciprocal re-ranked, in [0, 1]" if choices["rerank"] else "1 - cosine, in [0, 2]"
    if choices["standardise"]:
        distance += ", of features standardised within each camera"
    return Search(network.name, str(gallery), len(opened), kind, choice, distance, answers)


def open_gallery(
    network: Model,
    gallery: Path,
    run: Path,
    settings: dict[str, Any],
    *,
    patterns: Sequence[re.Pattern[str]],
    features_dir: Path,
    index: IndexKind,
) -> Gallery:
    """Open a feature file, or that of a folder, which is extracted where its images or the network are new."""
    from mprd.errors import UserError
    from mprd.extract.inputs import list_pictures
    from mprd.search.gallery import Gallery

    if gallery.is_dir():
        pictures = list_pictures(str(gallery))
        file = features_file(network, gallery, pictures, patterns=patterns, features_dir=features_dir)
        if not file.is_file():
            extract_gallery(network, pictures, file, run, settings, patterns=patterns)
    else:
        file = gallery
    opened = Gallery.open(file, index=index)
    if opened.features.shape[1] != network.num_features:
        raise UserError(
            f"{file}: features of {opened.features.shape[1]} numbers, but the network of {run} makes "
            f"{network.num_features}; extract them with this run"
        )
    if opened.run != network.name:
        logger.warning("%s: features of run %s, but the queries' are of %s", file, opened.run, network.name)
    return opened


def features_file(
    network: Model,
    gallery: Path,
    pictures: Pictures,
    *,
    patterns: Sequence[re.Pattern[str]],
    features_dir: Path,
) -> Path:
    """Name the file of a folder's features after the folder, and after all that they depend on."""
    digest = hashlib.sha256(network.fingerprint().encode())
    digest.update("|".join(pattern.pattern for pattern in patterns).encode())
    for path in pictures.paths:
        status = Path(path).stat()
        digest.update(f"{path}|{status.st_size}|{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    place = hashlib.sha256(str(gallery.resolve()).encode(errors="surrogateescape")).hexdigest()[:6]
    return features_dir / f"{gallery.resolve().name}-{place}-{digest.hexdigest()[:10]}.parquet"


def extract_gallery(
    network: Model,
    pictures: Pictures,
    file: Path,
    run: Path,
    settings: dict[str, Any],
    *,
    patterns: Sequence[re.Pattern[str]],
) -> None:
    """Extract a folder's features once and keep them; what was kept of the folder as it was before goes."""
    from rich.console import Console

    from mprd.extract.stream import Job, extract_to_file, stream_parts
    from mprd.runs.console import ImageLine

    old = list(file.parent.glob(f"{glob.escape(file.stem.rpartition('-')[0])}-*.parquet*"))
    why = "the folder or the network has changed; " if old else ""
    logger.info("%sextracting %d images of the gallery into %s", why, len(pictures.paths), file)
    data, evaluation = network.config.data, network.config.eval
    job = Job(
        run.resolve(), settings["best"], str(network.device), evaluation.batch_size, skip_bad=True,
        decoders=data.num_workers,
    )  # fmt: skip
    with ImageLine(Console(stderr=True), len(pictures.paths)) as line:
        extract_to_file(
            network, job, pictures, file, dtype="float32", patterns=patterns, stream=stream_parts,
            on_images=line.advance,
        )  # fmt: skip
    for path in old:
        path.unlink(missing_ok=True)


def print_tables(found: Search) -> None:
    """Print a table for each of the first queries, and how many are right at the first."""
    from rich.console import Console
    from rich.table import Table

    from mprd.search.results import count_first_right, short_names

    console = Console()
    names = short_names([hit.path for answer in found.answers for hit in answer.hits])
    for answer in found.answers[:MOST_TABLES]:
        query = answer.query
        title = f"{Path(query.path).name}, identity {say(query.pid)}, camera {say(query.camid)}"
        table = Table(title=title, title_justify="left")
        for column in ("rank", "distance", "camera", "identity", "right"):
            table.add_column(column, justify="right")
        table.add_column("image", overflow="fold")
        for hit in answer.hits:
            right = {True: "✓", False: "✗", None: ""}[hit.is_right]
            figures = (str(hit.rank), f"{hit.distance:.3f}", say(hit.camid), say(hit.pid), right)
            table.add_row(*figures, names[hit.path])
        console.print(table)
    left = len(found.answers) - MOST_TABLES
    if left > 0:
        console.print(f"and {left} more queries: --html FILE shows all, --json prints all")
    num_right, num_judged = count_first_right(found.answers)
    if num_judged:
        console.print(f"the first image is right for {num_right} of {num_judged} queries with known identities")


def say(number: int | None) -> str:
    """Write an id, or that there is none."""
    return "-" if number is None else str(number)
