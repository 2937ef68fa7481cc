"""`python -m mprd.search RUN --gallery FOLDER --query IMAGE`: the gallery's images that are nearest to a query."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mprd.cli import OTHER_CAMERAS, Command, run_command

logger = logging.getLogger("mprd")
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command(cls=Command)
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
    whiten: Annotated[
        bool, typer.Option("--whiten", help="Compare features whitened as the training images were.")
    ] = False,
    other_cameras: Annotated[bool, typer.Option("--other-cameras", help=OTHER_CAMERAS)] = False,
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
    options = {"top": top, "cameras": cameras, "rerank": rerank, "index": index}
    options |= {"whiten": whiten, "other_cameras": other_cameras}
    options |= {"features_dir": features_dir, "best": best, "device": device, "name_pattern": name_pattern}
    run_command(lambda: search_and_show(run, gallery, [*query, *(more or [])], options, html=html, as_json=json_))


def search_and_show(
    run: Path, gallery: Path, queries: Sequence[str], options: dict[str, Any], *, html: Path | None, as_json: bool
) -> None:
    """Search with `options`, the fields of `SearchOptions`; print tables or JSON, and write the page."""
    import json

    from mprd.search.run import SearchOptions, search_run
    from mprd.search.tables import print_tables

    result = search_run(run, gallery, queries, SearchOptions(**options))
    if html is not None:
        from mprd.runs.folder import write_text
        from mprd.search.page import render_search

        write_text(html, render_search(result))
        logger.info("page: %s", html)
    if as_json:
        print(json.dumps(result.to_dict()))
    else:
        print_tables(result)
