"""Print the result of a search as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from mprd.search.results import Answer, SearchResult, count_first_right, relative_names
from mprd.text import new_console

MAX_TABLES = 10
MARKS = {True: "✓", False: "✗", None: ""}


def print_tables(result: SearchResult) -> None:
    """Print a table for each of the first queries, and the number of queries whose first image is right."""
    screen = new_console()
    names = relative_names([hit.path for answer in result.answers for hit in answer.hits])
    for answer in result.answers[:MAX_TABLES]:
        screen.print(answer_table(answer, names, result.camera_name))
    num_more = len(result.answers) - MAX_TABLES
    if num_more > 0:
        screen.print(f"and {num_more} more queries: --html FILE shows all, --json prints all")
    num_right, num_judged = count_first_right(result.answers)
    if num_judged:
        screen.print(f"the first image is right for {num_right} of {num_judged} queries with known identities")


def answer_table(answer: Answer, names: Mapping[str, str], camera_name: Callable[[int | None], str]) -> Table:
    """Return the hits of a query; `names` are the paths as shown."""
    query = answer.query
    title = f"{Path(query.path).name}, identity {format_id(query.pid)}, camera {camera_name(query.camid)}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("rank", "distance", "camera", "identity", "right"):
        table.add_column(column, justify="right")
    table.add_column("image", overflow="fold")
    if not answer.hits:
        table.caption = "no images left"
    for hit in answer.hits:
        ids = (camera_name(hit.camid), format_id(hit.pid))
        table.add_row(str(hit.rank), f"{hit.distance:.3f}", *ids, MARKS[hit.is_right], names[hit.path])
    return table


def format_id(number: int | None) -> str:
    return "-" if number is None else str(number)
