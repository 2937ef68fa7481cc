"""One HTML page about runs and studies: gather what each section shows, or why it cannot, and write the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from mprd.data.datasets import ImageSet, ReidDataset
from mprd.data.decode import read_image
from mprd.errors import UserError
from mprd.report.checkpoint import Snapshot, open_snapshot
from mprd.report.features import (
    HardIdentities,
    QueryCases,
    choose_identities,
    find_cases,
    need_evaluation,
    place,
)
from mprd.report.pairs import count_camera_pairs, judge_candidates
from mprd.report.plots import PANELS, STUDY_PANELS, draw_candidates, draw_curves, draw_embedding
from mprd.report.runs import Run, StudyRuns, compare_settings, read_folders
from mprd.runs.console import FIGURES, chosen_rows
from mprd.runs.folder import describe_run, write_text
from mprd.runs.html import render_page
from mprd.tune.paper_results import DATASETS, paper_dataset, paper_method, paper_rows
from mprd.tune.report import study_tables

T = TypeVar("T")
Say = Callable[[str], None]
THUMBNAIL = (64, 128)
"""Most pixels of a picture, width and height."""


@dataclass(frozen=True)
class Missing:
    """Why something cannot be shown."""

    reason: str


@dataclass(frozen=True, eq=False)
class RunReport:
    """A run with what was computed from its checkpoint."""

    run: Run
    number: int
    snapshot: Snapshot | Missing
    candidates: Any
    cameras: Any

    @property
    def name(self) -> str:
        """Return the run's name."""
        return self.run.name


def write_report(paths: Sequence[Path], *, out: Path, best: bool, say: Say) -> None:
    """Write the page; `say` is told what comes next.

    Raises UserError for a folder that is neither a run nor a study, and where `out` cannot be written.
    """
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    runs, studies = read_folders(paths)
    reports = [report_run(run, number, best=best, say=say) for number, run in enumerate(runs)]
    values = page_values(reports, studies, best=best, say=say)
    say("writing the page")
    write_text(out, render_page("report.html", **values))


def attempt(function: Callable[..., T], *arguments: Any) -> T | Missing:
    """Call a function whose UserError only means that there is nothing to show."""
    try:
        return function(*arguments)
    except UserError as error:
        return Missing(str(error))


def report_run(run: Run, number: int, *, best: bool, say: Say) -> RunReport:
    """Compute what one run shows by itself."""
    say(f"{run.name}: checkpoint and data set")
    snapshot = attempt(lambda: open_snapshot(run, best=best))
    if isinstance(snapshot, Missing):
        return RunReport(run, number, snapshot, snapshot, snapshot)
    say(f"{run.name}: candidate pairs")
    return RunReport(run, number, snapshot, attempt(judge_candidates, snapshot), attempt(count_camera_pairs, snapshot))


def page_values(reports: list[RunReport], studies: list[StudyRuns], *, best: bool, say: Say) -> dict[str, Any]:
    """Gather everything that the template asks for."""
    runs = [report.run for report in reports]
    return {
        "title": ", ".join([*(run.name for run in runs), *(study.name for study in studies)]),
        "runs": reports,
        "checkpoint": "the checkpoint with the best label-free score" if best else "the last checkpoint",
        "figures": figure_table(runs),
        "settings": compare_settings([run.config for run in runs]) if runs else [],
        "curves": draw_curves([(run.name, run.rows) for run in runs]),
        "pairs": [(report, pair_plots(report)) for report in reports],
        "embeddings": list(embedding_groups(reports, say)),
        "cases": list(query_groups(reports, say)),
        "papers": paper_tables(reports),
        "lookalikes": lookalikes(reports),
        "studies": [study_values(study, say) for study in studies],
        "made": describe_run(),
        "is_missing": is_missing,
    }


def is_missing(value: Any) -> bool:
    """Say whether a section has nothing but a reason."""
    return isinstance(value, Missing)


# -- figures ----------------------------------------------------------------------------------------


def figure_table(runs: Sequence[Run]) -> dict[str, Any]:
    """Set the choices of an epoch side by side for one run; for several, their last epochs."""
    if len(runs) > 1:
        return {"columns": [], "rows": compare_figures(runs)}
    picks = {} if not runs or not runs[0].rows else dict(chosen_rows(runs[0].rows))
    columns = [{"name": name, "note": f"epoch {row['epoch'] + 1}"} for name, row in picks.items()]
    chosen = [*picks.values()]
    if runs and runs[0].untrained:
        columns, chosen = [*columns, {"name": "untrained", "note": ""}], [*chosen, runs[0].untrained]
    rows = [figure_row(name, [row.get(key) for row in chosen], compare=False) for key, name in FIGURES]
    return {"columns": columns, "rows": keep_known(rows)}


def compare_figures(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return a row a figure, each run's with its difference to the first."""
    last = [run.rows[-1] if run.rows else {} for run in runs]
    rows = [figure_row(name, [row.get(key) for row in last]) for key, name in FIGURES]
    picks = {
        "by label-free score": "mAP of the epoch by label-free score",
        "best on test": "mAP of the epoch that is best on test",
    }
    for pick, name in picks.items():
        picked = [chosen_rows(run.rows).get(pick, {}) if run.rows else {} for run in runs]
        notes = [f"epoch {row['epoch'] + 1}" if row.get("mAP") is not None else "" for row in picked]
        rows.append(figure_row(name, [row.get("mAP") for row in picked], notes=notes))
    return keep_known([*rows, figure_row("mAP untrained", [run.untrained.get("mAP") for run in runs])])


def keep_known(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Leave out rows without any value."""
    return [row for row in rows if any(cell["value"] is not None for cell in row["cells"])]


def figure_row(
    name: str, values: list[float | None], *, notes: Sequence[str] = (), compare: bool = True
) -> dict[str, Any]:
    """Make a row of cells: value, and where they are compared the difference to the first and the highest."""
    seen = [value for value in values if value is not None]
    cells = []
    for number, value in enumerate(values):
        is_compared = compare and value is not None and len(seen) > 1
        first = values[0] if is_compared and number else None
        cells.append(
            {
                "value": value,
                "change": value - first if value is not None and first is not None else None,
                "is_best": is_compared and value == max(seen) > min(seen),
                "note": notes[number] if notes else "",
            }
        )
    return {"name": name, "cells": cells}


def paper_tables(reports: list[RunReport]) -> list[dict[str, Any]]:
    """Return the paper's rows for each of its data sets that a run was trained on, with those runs among them."""
    tables: dict[str, dict[str, Any]] = {}
    for report in reports:
        num_train = None if isinstance(report.snapshot, Missing) else len(report.snapshot.state["memory"])
        dataset = paper_dataset(report.run.config, num_train=num_train)
        if dataset is not None:
            table = tables.setdefault(dataset, {"dataset": dataset, "rows": paper_rows(dataset), "ours": []})
            last = report.run.rows[-1] if report.run.rows else {}
            table["ours"].append((report, paper_method(report.run.config), last))
    return list(tables.values())


def lookalikes(reports: list[RunReport]) -> list[tuple[str, str]]:
    """Name the runs on images that only share the layout of one of the paper's data sets, each with that data set."""
    named = [(report, report.run.config.data.dataset) for report in reports]
    ours = {id(report) for table in paper_tables(reports) for report, _, _ in table["ours"]}
    return [(report.name, DATASETS[name]) for report, name in named if name in DATASETS and id(report) not in ours]


# -- pictures ---------------------------------------------------------------------------------------


def pair_plots(report: RunReport) -> list[dict[str, Any]]:
    """Return the distributions of a run's candidates, each with its AUC."""
    if is_missing(report.candidates):
        return []
    plots = draw_candidates(report.candidates, report.name)
    return [{"title": name, "svg": svg, "auc": report.candidates.auc(name)} for name, svg in plots.items()]


def embedding_groups(reports: list[RunReport], say: Say) -> Iterator[dict[str, Any]]:
    """Yield runs on the same training images with their t-SNE pictures, or with the reason for none."""
    groups = group_by(reports, Snapshot.need_train, need=Snapshot.need_pids)
    for group, chosen in look_into(groups, choose_identities, lambda names: say(f"t-SNE of {names}")):
        if not is_missing(chosen):
            pictures = [(report, picture(report, chosen)) for report in group["reports"]]
            group = {**group, "chosen": chosen, "pictures": pictures}
        yield group


def picture(report: RunReport, chosen: HardIdentities) -> str | Missing:
    """Draw a run's t-SNE."""
    points = attempt(place, report.snapshot, chosen.rows)
    if isinstance(points, Missing):
        return points
    return draw_embedding(points, chosen, f"t-SNE of the training features of {report.name}")


def query_groups(reports: list[RunReport], say: Say) -> Iterator[dict[str, Any]]:
    """Yield runs on the same query and gallery with the cases worth a look, or with the reason for none."""
    groups = group_by(reports, evaluated_images, need=need_evaluation)
    for group, cases in look_into(groups, find_cases, lambda names: say(f"worst queries of {names}")):
        if not is_missing(cases):
            dataset = group["reports"][0].snapshot.need_dataset()
            group = {**group, "cases": cases, "dataset": dataset, "images": thumbnails(cases, dataset)}
        yield group


def look_into(
    groups: list[dict[str, Any]], find: Callable[[list[Snapshot]], Any], say: Say
) -> Iterator[tuple[dict[str, Any], Any]]:
    """Yield each group with what is found in its runs together, or with the reason for nothing, kept in the group."""
    for group in groups:
        found = group["reason"]
        if not is_missing(found):
            say(", ".join(report.name for report in group["reports"]))
            found = attempt(find, [report.snapshot for report in group["reports"]])
        yield ({**group, "reason": found} if is_missing(found) else group), found


def evaluated_images(snapshot: Snapshot) -> ImageSet:
    """Return query and gallery as one."""
    dataset = snapshot.need_dataset()
    return ImageSet((*dataset.query.paths, *dataset.gallery.paths), None, None)


def group_by(
    reports: list[RunReport], images: Callable[[Snapshot], ImageSet], *, need: Callable[[Snapshot], Any]
) -> list[dict[str, Any]]:
    """Group runs by the images they share; those that have none stand alone with the reason."""
    groups: dict[Any, dict[str, Any]] = {}
    for report in reports:
        reason: Any = None
        key: Any = report.number
        if isinstance(report.snapshot, Missing):
            reason = report.snapshot
        else:
            found = attempt(need, report.snapshot)
            if isinstance(found, Missing):
                reason = found
            else:
                key = fingerprint(images(report.snapshot))
        group = groups.setdefault(key, {"reports": [], "reason": reason})
        group["reports"].append(report)
    return list(groups.values())


def fingerprint(images: ImageSet) -> tuple[tuple[str, int], ...]:
    """Return what tells sets of images apart wherever they lie: names and sizes of their files."""
    return tuple((path.name, path.stat().st_size if path.is_file() else 0) for path in images.paths)


def thumbnails(cases: QueryCases, dataset: ReidDataset) -> dict[tuple[str, int], str]:
    """Return every picture of the cases by (split, index), as the data of an image."""
    wanted: dict[tuple[str, int], Path] = {}
    for case in (*cases.worst, *cases.changed):
        wanted["query", case.row] = dataset.query.paths[case.row]
        for ranking in case.rankings:
            for hit in ranking.hits:
                wanted["gallery", hit.row] = dataset.gallery.paths[hit.row]
    return {key: thumbnail(path) for key, path in wanted.items()}


def thumbnail(path: Path) -> str:
    """Return a small JPEG of an image as a data address; nothing where it cannot be read."""
    try:
        image = read_image(path)
    except UserError:
        return ""
    image.thumbnail(THUMBNAIL)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=72, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


# -- studies ----------------------------------------------------------------------------------------


def study_values(study: StudyRuns, say: Say) -> dict[str, Any]:
    """Return a study's tables, and curves that are the mean over the seeds of each point."""
    say(f"{study.name}: {len(study.trials)} trials")
    objective = study.folder.read_options()["objective"]
    lines: dict[str, list[list[dict[str, Any]]]] = {}
    for trial in study.trials:
        rows = study.folder.run_folder(trial).read_rows()
        if rows:
            lines.setdefault(trial.point, []).append(rows)
    panels = [panel for panel in PANELS if panel.title in STUDY_PANELS]
    means = [(point, mean_rows(runs)) for point, runs in lines.items()]
    return {
        **study_tables(study.folder, study.study, objective=objective),
        "path": study.folder.path,
        "points_drawn": [point for point, _ in means],
        "curves": draw_curves(means, panels) if means else [],
    }


def mean_rows(runs: Sequence[list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Average the rows of several seeds, epoch by epoch; a figure that one lacks is left out."""
    means = []
    for rows in zip(*runs, strict=False):
        keys = [key for key, value in rows[0].items() if isinstance(value, int | float)]
        full = [key for key in keys if all(isinstance(row.get(key), int | float) for row in rows)]
        means.append({key: sum(row[key] for row in rows) / len(rows) for key in full} | {"epoch": rows[0]["epoch"]})
    return means
