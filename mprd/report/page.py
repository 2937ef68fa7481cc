"""One HTML page about runs and studies: compute each section, or the reason for its absence, and write the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from mprd.data.datasets import ImageSet, ReidDataset
from mprd.data.decode import read_image
from mprd.errors import UserError
from mprd.report.checkpoint import Snapshot, open_snapshot
from mprd.report.features import (
    HardIdentities,
    QueryCases,
    all_ids,
    choose_identities,
    embed,
    find_cases,
    need_evaluation,
)
from mprd.report.pairs import CameraPairs, CandidateScores, count_camera_pairs, score_candidates
from mprd.report.plots import STUDY_PANELS, draw_candidates, draw_curves, draw_embedding
from mprd.report.runs import Run, StudyRuns, compare_settings, read_folders
from mprd.report.tables import paper_tables, result_table
from mprd.runs.curves import PANELS, Rows, mean_rows
from mprd.runs.folder import describe_run, write_text
from mprd.runs.html import render_page
from mprd.tune.report import read_results

T = TypeVar("T")
Progress = Callable[[str], None]
"""Called with the name of each stage before it starts."""
THUMBNAIL = (64, 128)
"""Most pixels of a picture, width and height."""


@dataclass(frozen=True)
class Missing:
    """The reason for the absence of a section."""

    reason: str


@dataclass(frozen=True, eq=False)
class RunReport:
    """A run with what was computed from its checkpoint."""

    run: Run
    number: int
    snapshot: Snapshot | Missing
    candidates: CandidateScores | Missing
    cameras: CameraPairs | Missing

    @property
    def name(self) -> str:
        return self.run.name

    @property
    def num_train(self) -> int | None:
        """Count the training images; None without a checkpoint."""
        return None if isinstance(self.snapshot, Missing) else len(self.snapshot.state["memory"])


def write_page(paths: Sequence[Path], *, out: Path, best: bool, progress: Progress) -> None:
    """Write the page about the run and study folders `paths`.

    Args:
        best: compute from the best checkpoint by the label-free score instead of the last.

    Raises UserError for a folder that is neither a run nor a study, and where `out` cannot be written.
    """
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}")
    if out.is_dir():
        raise UserError(f"--out {out}: is a folder; name a file in it")
    runs, studies = read_folders(paths)
    reports = [report_run(run, number, best=best, progress=progress) for number, run in enumerate(runs)]
    values = page_values(reports, studies, best=best, progress=progress)
    progress("writing the page")
    write_text(out, render_page("report.html", **values))


def attempt(function: Callable[..., T], *arguments: Any) -> T | Missing:
    """Call a function, and turn its UserError into the reason for an absence."""
    try:
        return function(*arguments)
    except UserError as error:
        return Missing(str(error))


def report_run(run: Run, number: int, *, best: bool, progress: Progress) -> RunReport:
    """Compute the sections of one run."""
    progress(f"{run.name}: checkpoint and data set")
    snapshot = attempt(lambda: open_snapshot(run, best=best))
    if isinstance(snapshot, Missing):
        return RunReport(run, number, snapshot, snapshot, snapshot)
    progress(f"{run.name}: candidate pairs")
    return RunReport(run, number, snapshot, attempt(score_candidates, snapshot), attempt(count_camera_pairs, snapshot))


def page_values(
    reports: list[RunReport], studies: list[StudyRuns], *, best: bool, progress: Progress
) -> dict[str, Any]:
    """Return the variables of the template."""
    runs = [report.run for report in reports]
    papers, lookalikes = paper_tables([(report, report.run, report.num_train) for report in reports])
    return {
        "title": ", ".join([*(run.name for run in runs), *(study.name for study in studies)]),
        "runs": reports,
        "checkpoint": "the checkpoint with the best label-free score" if best else "the last checkpoint",
        "figures": result_table(runs),
        "settings": compare_settings([run.config for run in runs]) if runs else [],
        "curves": draw_curves([(run.name, run.rows) for run in runs]),
        "pairs": [(report, pair_plots(report)) for report in reports],
        "embeddings": list(embedding_groups(reports, progress)),
        "cases": list(query_groups(reports, progress)),
        "papers": papers,
        "lookalikes": lookalikes,
        "studies": [study_values(study, progress) for study in studies],
        "made": describe_run(),
        "is_missing": lambda value: isinstance(value, Missing),
    }


def pair_plots(report: RunReport) -> list[dict[str, Any]]:
    """Draw the distributions of a run's candidates, each with its AUC."""
    candidates = report.candidates
    if isinstance(candidates, Missing):
        return []
    plots = draw_candidates(candidates, report.name)
    return [{"title": name, "svg": svg, "auc": candidates.auc(name)} for name, svg in plots.items()]


# -- runs on the same images ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class RunGroup:
    """Runs on the same images, or one run with the reason why its images cannot be used."""

    reports: list[RunReport]
    reason: Missing | None

    @property
    def names(self) -> str:
        return ", ".join(report.name for report in self.reports)

    def compute(self, function: Callable[[list[Any]], T], *, stage: str, progress: Progress) -> T | Missing:
        """Compute from the snapshots of all runs together."""
        if self.reason is not None:
            return self.reason
        progress(f"{stage} of {self.names}")
        return attempt(function, [report.snapshot for report in self.reports])


def embedding_groups(reports: list[RunReport], progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield runs on the same training images with their hardest identities and t-SNE pictures."""
    for group in group_runs(reports, Snapshot.need_train, need=Snapshot.need_pids):
        chosen = group.compute(choose_identities, stage="t-SNE", progress=progress)
        pictures = [] if isinstance(chosen, Missing) else [(r, draw_identities(r, chosen)) for r in group.reports]
        yield {"reports": group.reports, "chosen": chosen, "pictures": pictures}


def draw_identities(report: RunReport, chosen: HardIdentities) -> str | Missing:
    """Draw the t-SNE of a run."""
    points = attempt(embed, report.snapshot, chosen.rows)
    if isinstance(points, Missing):
        return points
    return draw_embedding(points, chosen, f"t-SNE of the training features of {report.name}")


def query_groups(reports: list[RunReport], progress: Progress) -> Iterator[dict[str, Any]]:
    """Yield runs on the same query and gallery with their query cases and the pictures of these."""
    for group in group_runs(reports, evaluated_images, need=need_evaluation):
        cases = group.compute(find_cases, stage="worst queries", progress=progress)
        shown: dict[str, Any] = {"reports": group.reports, "cases": cases}
        snapshot = group.reports[0].snapshot
        if not isinstance(cases, Missing) and not isinstance(snapshot, Missing):
            dataset = snapshot.need_dataset()
            shown |= {"dataset": dataset, "images": thumbnails(cases, dataset)}
        yield shown


def evaluated_images(snapshot: Snapshot) -> ImageSet:
    """Return query and gallery as one set."""
    dataset = need_evaluation(snapshot)
    q_pids, g_pids, q_camids, g_camids = all_ids(dataset)
    paths = (*dataset.query.paths, *dataset.gallery.paths)
    return ImageSet(paths, np.concatenate([q_pids, g_pids]), np.concatenate([q_camids, g_camids]))


def group_runs(
    reports: list[RunReport], images: Callable[[Snapshot], ImageSet], *, need: Callable[[Snapshot], Any]
) -> list[RunGroup]:
    """Group runs by their `images`; a run whose snapshot fails `need` is a group of its own."""
    groups: dict[Any, RunGroup] = {}
    for report in reports:
        found = report.snapshot
        if not isinstance(found, Missing):
            reason = attempt(need, found)
            found = reason if isinstance(reason, Missing) else found
        if isinstance(found, Missing):
            groups[report.number] = RunGroup([report], found)
        else:
            groups.setdefault(fingerprint(images(found)), RunGroup([], None)).reports.append(report)
    return list(groups.values())


def fingerprint(images: ImageSet) -> tuple[Any, ...]:
    """Identify a set of images by names and sizes of files, wherever they are stored, identities and cameras."""
    files = tuple((path.name, path.stat().st_size if path.is_file() else 0) for path in images.paths)
    return files, *(None if ids is None else ids.tobytes() for ids in (images.pids, images.camids))


def thumbnails(cases: QueryCases, dataset: ReidDataset) -> dict[tuple[str, int], str]:
    """Return the pictures of the cases by (split, index), as data URIs."""
    wanted: dict[tuple[str, int], Path] = {}
    for case in (*cases.worst, *cases.changed):
        wanted["query", case.row] = dataset.query.paths[case.row]
        for ranking in case.rankings:
            for hit in ranking.hits:
                wanted["gallery", hit.row] = dataset.gallery.paths[hit.row]
    return {key: thumbnail(path) for key, path in wanted.items()}


def thumbnail(path: Path) -> str:
    """Return a small JPEG of an image as a data URI; empty where it cannot be read."""
    try:
        image = read_image(path)
    except UserError:
        return ""
    image.thumbnail(THUMBNAIL)
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=72, optimize=True)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"


# -- studies ----------------------------------------------------------------------------------------


def study_values(study: StudyRuns, progress: Progress) -> dict[str, Any]:
    """Return a study's tables, and the mean curves of each point over its seeds."""
    progress(f"{study.name}: {len(study.trials)} trials")
    objective = study.folder.read_options().objective
    runs: dict[str, tuple[str, list[Rows]]] = {}
    for trial in study.trials:
        rows = study.folder.run_folder(trial).read_rows()
        if rows:
            runs.setdefault(study.study.key(trial.point, trial.settings), (trial.point, []))[1].append(rows)
    panels = [panel for panel in PANELS if panel.title in STUDY_PANELS]
    means = [(point, mean_rows(seeds)) for point, seeds in runs.values()]
    return {
        **read_results(study.folder, study.study, objective).table_values(),
        "path": study.folder.path,
        "points_drawn": [point for point, _ in means],
        "curves": draw_curves(means, panels) if means else [],
    }
