"""Run the points of a study without Ray or Optuna, and write a Markdown table and a plot.

A second call continues the first, so that a table of hours can be run minutes at a time:

    python benchmarks/tables.py table1 --preset bench --out runs/table1 --minutes 8
    python benchmarks/tables.py table1 --preset bench --out runs/table1 --rows MPRD MPLP --seeds 0 --set train.epochs=5

Runs are written to OUT/<point>_seed<seed>. Figures are those of the last epoch; two columns show mAP of the epoch with
the best label-free score, and of the best epoch on query and gallery.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from mprd.config.loading import load_config
from mprd.runs.console import chosen_rows
from mprd.runs.curves import PAIR_SCORES, PANELS, draw_panel, mean_rows
from mprd.runs.folder import RunFolder
from mprd.tune.study import Point, load_study

ROOT = Path(__file__).parents[1]
GRACE_SECONDS = 60
"""Time for a stopped run to save its state."""
COLUMNS = {
    "rank1": "Rank-1",
    "mAP": "mAP",
    "pair_precision": "precision of P",
    "pair_recall": "recall",
    "pair_precision_cross": "cross-camera precision",
    "pair_recall_cross": "recall",
    "label_free_score": "label-free score",
    "silhouette": "silhouette of P",
}
PICKS = {"by label-free score": "mAP of its best epoch", "best on test": "best mAP on test"}
LAST_THIRD = 3


@dataclass(frozen=True)
class Job:
    """One run of a table."""

    point: Point
    seed: int
    folder: Path

    @property
    def is_done(self) -> bool:
        """Whether the last epoch is complete: a run writes its table after it."""
        return (self.folder / "table.txt").exists()

    def command(self, args: argparse.Namespace) -> list[str]:
        """Return the command that starts or resumes the run."""
        command = [sys.executable, "-m", "mprd.train", "--launcher", "local"]
        if RunFolder(self.folder).last.exists():
            return [*command, "--resume", str(self.folder)]
        settings = overrides(self.point, args)
        command += ["--preset", args.preset, *(["--data", str(args.data)] if args.data else [])]
        command += [word for setting in settings for word in ("--set", setting)]
        return [*command, "--seed", str(self.seed), "--out", str(self.folder)]

    def run(self, args: argparse.Namespace, *, until: float) -> None:
        """Train to the last epoch, or stop at the time `until` of the monotonic clock."""
        left = until - time.monotonic()
        if self.is_done or left <= 0:
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
        started = time.monotonic()
        path = self.folder.parent / f"{self.folder.name}.log"
        with path.open("a") as log:
            process = subprocess.Popen(self.command(args), stdout=log, stderr=log, env=environment)
            try:
                process.wait(timeout=left)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGINT)
                process.wait(timeout=GRACE_SECONDS)
        state = "done" if self.is_done else f"exit {process.returncode}: {path.read_text().strip().splitlines()[-1]}"
        print(f"{self.folder.name}: {state}, {time.monotonic() - started:.0f} s", flush=True)


def overrides(point: Point, args: argparse.Namespace) -> list[str]:
    """Return the `--set` arguments of a point, after those shared by all runs."""
    return [*args.set, *(f"{name}={json.dumps(value)}" for name, value in point.set.items())]


def list_jobs(points: list[Point], seeds: list[int], args: argparse.Namespace) -> list[Job]:
    """Return the runs of a table, seed by seed; points with equal settings under the preset share their runs."""
    names: dict[str, str] = {}
    folders: dict[str, str] = {}
    for point in points:
        values = {"data": {"root": args.data}} if args.data else {}
        config = load_config(args.preset, overrides=tuple(overrides(point, args)), values=values)
        own_name = point.name.replace(" ", "_").replace("/", "")
        names[point.name] = folders.setdefault(config.model_dump_json(), own_name)
    return [
        Job(point, seed, (args.out / f"{names[point.name]}_seed{seed}").absolute())
        for seed in seeds
        for point in points
    ]


def finished_runs(jobs: list[Job]) -> dict[str, list[list[dict]]]:
    """Return the rows of all finished runs by the name of their point."""
    runs: dict[str, list[list[dict]]] = {job.point.name: [] for job in jobs}
    for job in jobs:
        if job.is_done:
            runs[job.point.name].append(RunFolder(job.folder).read_rows())
    return {name: done for name, done in runs.items() if done}


def mean_auc(rows: list[dict], name: str) -> float | None:
    """Average the column of an AUC over the last third of the epochs; None where it is empty."""
    values = [row[name] for row in rows[-(len(rows) // LAST_THIRD) :] if row.get(name) is not None]
    return statistics.fmean(values) if values else None


def cell(values: list[float | None], *, factor: float = 100, places: int = 1) -> str:
    """Format mean and sample deviation over seeds, in percent by default; empty if a seed has no value."""
    known = [factor * value for value in values if value is not None]
    if len(known) < len(values):
        return ""
    spread = f" ± {statistics.stdev(known):.{places}f}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.{places}f}{spread}"


def write_table(jobs: list[Job]) -> str:
    """Return a Markdown row per point with finished runs: the last epoch, and AUC over the last third of the epochs."""
    of_scores = [f"AUC of {name}" for name in PAIR_SCORES.values()]
    names = [*COLUMNS.values(), *PICKS.values(), *of_scores, "minutes of training"]
    lines = ["| | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for point, done in finished_runs(jobs).items():
        cells = [cell([rows[-1].get(name) for rows in done]) for name in COLUMNS]
        cells += [cell([chosen_rows(rows)[pick].get("mAP") for rows in done]) for pick in PICKS]
        cells += [cell([mean_auc(rows, name) for rows in done], factor=1, places=3) for name in PAIR_SCORES]
        seconds = [sum(row["gcn_seconds"] + row["cnn_seconds"] for row in rows) for rows in done]
        cells.append(cell(seconds, factor=1 / 60))
        lines.append(f"| {point} | {len(done)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(jobs: list[Job], file: Path) -> None:
    """Plot mAP by epoch, and the path of P between precision and recall, as the mean over the seeds of each point."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    finished, per_line = finished_runs(jobs), 3
    height = 3.8 + 0.2 * math.ceil(len(finished) / per_line)
    figure = Figure(figsize=(10, height), layout="constrained")
    curve, path = figure.subplots(1, 2)
    colors = colormaps["tab10" if len(finished) <= 10 else "tab20"].colors
    runs = [
        (f"{point}, {len(seeds)} run{'s' * (len(seeds) > 1)}", mean_rows(seeds)) for point, seeds in finished.items()
    ]
    panel = next(panel for panel in PANELS if panel.title == "mAP").narrowed(max(4, len(runs)))
    draw_panel(curve, panel, runs, colors=colors)
    for (_, rows), color in zip(runs, itertools.cycle(colors), strict=False):
        labeled = [(100 * row["pair_recall"], 100 * row["pair_precision"]) for row in rows if "pair_precision" in row]
        if len({recall for recall, _ in labeled}) > 1:
            path.plot(*zip(*labeled, strict=True), color=color, alpha=0.8)
            path.plot(*labeled[-1], "o", color=color)
    curve.set(title="Retrieval", ylabel="mAP, percent")
    path.set(xlabel="recall of P, percent", ylabel="precision, percent", title="Labels by epoch; the dot is the last")
    figure.legend(*curve.get_legend_handles_labels(), loc="outside lower center", ncols=per_line, fontsize="small")
    for axes in (curve, path):
        axes.grid(alpha=0.3)
    figure.savefig(file, dpi=110)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", help="a file of tune_configs with named points, such as table1")
    parser.add_argument("--preset", default="bench")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs")
    parser.add_argument("--rows", nargs="*", help="names of some points; all by default")
    parser.add_argument("--seeds", nargs="*", type=int, help="those of the study by default")
    parser.add_argument("--set", nargs="*", default=[], help="settings shared by all runs")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop then; call again to continue")
    args = parser.parse_args()
    points = load_study(args.study).grid()
    if unknown := set(args.rows or ()) - {point.name for point in points}:
        parser.error(f"--rows: {args.study} has no {', '.join(sorted(unknown))}")
    return args


def main() -> None:
    args = read_arguments()
    study = load_study(args.study)
    points = [point for point in study.grid() if not args.rows or point.name in args.rows]
    jobs = list_jobs(points, args.seeds or study.seeds, args)
    until = time.monotonic() + 60 * args.minutes - GRACE_SECONDS
    with ThreadPoolExecutor(args.jobs) as pool:
        for future in [pool.submit(job.run, args, until=until) for job in {job.folder: job for job in jobs}.values()]:
            future.result()
    table = write_table(jobs)
    (args.out / f"{args.study}.md").write_text(table)
    draw(jobs, args.out / f"{args.study}.png")
    print(table)
    left = sorted({job.folder.name for job in jobs if not job.is_done})
    if left:
        print(f"{len(left)} runs are not done: {', '.join(left)}")
    raise SystemExit(bool(left))


if __name__ == "__main__":
    main()
