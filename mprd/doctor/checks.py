"""A data set looked at before training: its layout, its faults, and a command that was tried up to the first step."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from mprd.backbone.network import has_imagenet_weights
from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.data.datasets import ImageSet, ReidDataset, load_dataset
from mprd.data.recognition import TREE_PATTERNS, Layout, recognize
from mprd.doctor.estimate import Cost, estimate_cost
from mprd.doctor.files import (
    NUM_SHOWN,
    File,
    Finding,
    Level,
    describe_sizes,
    describe_splits,
    find_camera_styles,
    find_in_files,
    find_in_ids,
    find_misnamed,
    read_files,
    style_files,
)
from mprd.engine.trainer import Hooks, Trainer
from mprd.errors import UserError
from mprd.runtime.device import choose_device, num_cores

LONG_HOURS = 48
"""Beyond so many hours the small network is proposed."""
SQUARE = 1.3
"""Height over width below which crops are not those of standing people."""

Track = Callable[[Iterable[File], int], Iterable[File]]


@dataclass
class Checkup:
    """Everything that was found."""

    root: Path
    layout: Layout | None = None
    splits: dict[str, dict[str, int | None]] = field(default_factory=dict)
    sizes: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)
    plan: Plan | None = None
    """What to run; None where training would fail."""
    others: tuple[Plan, ...] = ()
    """What one may run instead."""

    @property
    def has_problem(self) -> bool:
        """Whether something keeps the training from running."""
        return any(finding.level == "problem" for finding in self.findings)

    @property
    def command(self) -> str | None:
        """The line to paste; None where training would fail."""
        return None if self.plan is None else self.plan.command

    def row(self) -> dict[str, Any]:
        """Return everything under names, for JSON."""
        layout = self.layout
        return {
            "root": str(self.root),
            "layout": None if layout is None else layout.name,
            "data": None if layout is None else str(layout.root),
            "splits": self.splits,
            "sizes": self.sizes,
            "machine": describe_machine(),
            "findings": [asdict(finding) for finding in self.findings],
            "command": self.command,
            "estimate": None if self.plan is None or self.plan.cost is None else self.plan.cost.row(),
        }


@dataclass(frozen=True)
class Plan:
    """One way to train on a data set."""

    title: str
    preset: str
    root: Path
    settings: tuple[str, ...]
    cost: Cost | None = None
    remark: str = ""
    """What speaks against it."""

    @property
    def command(self) -> str:
        """The line to paste."""
        preset = [] if self.preset == "demo" else ["--preset", self.preset]
        sets = [word for setting in self.settings for word in ("--set", setting)]
        return shlex.join(["python", "-m", "mprd.train", *preset, "--data", str(self.root), *sets])

    def config(self) -> Config:
        """Return the settings that the command would train with."""
        return load_config(self.preset, overrides=self.settings, values={"data": {"root": self.root}})


def examine(root: Path, *, track: Track = lambda files, _total: files) -> Checkup:
    """Look at a folder; what keeps the training from running is a finding, never an error.

    Raises UserError where there is no such folder.
    """
    checkup = Checkup(root)
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    with quiet():
        try:
            checkup.layout = recognize(root)
            look_at_layout(checkup, checkup.layout)
            if not checkup.has_problem:
                look_at_images(checkup, checkup.layout, track)
        except UserError as error:
            checkup.findings.append(Finding("problem", str(error)))
    if checkup.has_problem:
        checkup.plan, checkup.others = None, ()
    return checkup


@contextmanager
def quiet() -> Iterator[None]:
    """Keep back what loading logs: the checkup says it in its own words."""
    logger = logging.getLogger("mprd")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def look_at_layout(checkup: Checkup, layout: Layout) -> None:
    """Add what the layout's names tell."""
    if layout.remark:
        level: Level = "warning" if "nothing is evaluated" in layout.remark else "note"
        checkup.findings.append(Finding(level, layout.remark))
    if layout.problem:
        checkup.findings.append(Finding("problem", layout.problem))
    checkup.findings += find_misnamed(layout)


def look_at_images(checkup: Checkup, layout: Layout, track: Track) -> None:
    """Open every image, add what is found, and choose the command."""
    dataset = load_dataset(base_plan(layout, "paper").config().data, cache_dir=Path())
    sets = (dataset.train, dataset.query, dataset.gallery)
    paths = [path for images in sets for path in images.paths]
    styles = style_files(dataset)
    files = read_files(paths + styles, track=lambda found: track(found, len(paths) + len(styles)))
    files, bad_styles = files[: len(paths)], [file.path for file in files[len(paths) :] if file.size is None]
    checkup.splits, checkup.sizes = describe_splits(dataset), describe_sizes(files)
    checkup.findings += find_in_files(dataset, files) + find_in_ids(dataset, layout) + [find_camera_styles(dataset)]
    if bad_styles:
        text = f"{len(bad_styles):,} CamStyle pictures are unreadable; the command leaves them out"
        checkup.findings.append(Finding("warning", text, tuple(map(str, bad_styles[:NUM_SHOWN]))))
    if dataset.train.pids is None:
        text = "names tell no identities: a file of a few labeled images helps, meta.labels (docs/own-data.md)"
        checkup.findings.append(Finding("note", text))
    size = checkup.sizes
    if size and size["median"]["height"] < SQUARE * size["median"]["width"]:
        text = "crops are not twice as high as wide; data.height and data.width stretch them to what they say"
        checkup.findings.append(Finding("note", text))
    if not checkup.has_problem:
        readable = leave_out(dataset, files)
        checkup.plan, checkup.others = choose_plans(layout, readable, skips=bool(bad_styles) or None in [
            file.size for file in files])  # fmt: skip
        warn_of_memory(checkup)


def leave_out(dataset: ReidDataset, files: list[File]) -> ReidDataset:
    """Leave out the unreadable images, as the training would."""
    sets: list[ImageSet] = []
    start = 0
    for images in (dataset.train, dataset.query, dataset.gallery):
        part = files[start : start + len(images)]
        start += len(images)
        sets.append(images.select(np.flatnonzero([file.size is not None for file in part])))
    return replace(dataset, train=sets[0], query=sets[1], gallery=sets[2])


# -- the command ----------------------------------------------------------------------------------


NO_WEIGHTS = (
    "the weights are neither in torchvision's cache nor reachable: give a state dict by --set backbone.weights=FILE"
)
TITLES = {
    "demo": "small network from random weights",
    "recommended": "ResNet-50 from ImageNet weights, the recommended settings",
    "paper": "ResNet-50 from ImageNet weights, the paper's settings",
}


def base_plan(layout: Layout, kind: str) -> Plan:
    """Return the settings that read a layout, under the demo's preset, the recommended or the paper's."""
    preset = layout.preset if kind == "paper" else kind
    settings = []
    if layout.is_tree:
        settings.append("data.dataset=folder")
        if layout.pattern != TREE_PATTERNS[0]:
            settings.append(f"data.name_pattern={layout.pattern}")
    elif load_config(preset, values={"data": {"root": layout.root}}).data.dataset != layout.preset:
        settings.append(f"data.dataset={layout.preset}")
    return Plan(TITLES[kind], preset, layout.root, tuple(settings))


def choose_plans(layout: Layout, dataset: ReidDataset, *, skips: bool) -> tuple[Plan, tuple[Plan, ...]]:
    """Return the plan to propose, tried up to its first step, and those that one may run instead.

    The recommended is proposed where its ImageNet weights can be had and it would take no more than two days.
    """
    small, recommended, paper = (adapt(base_plan(layout, kind), dataset, skips=skips) for kind in TITLES)
    if not has_imagenet_weights(recommended.config().backbone.name):
        recommended, paper = (replace(plan, remark=NO_WEIGHTS) for plan in (recommended, paper))
    else:
        recommended = try_out(recommended, dataset)
        if recommended.cost is not None and recommended.cost.likely_seconds <= 3600 * LONG_HOURS:
            return recommended, (paper,)
    return try_out(small, dataset), (recommended, paper)


def adapt(plan: Plan, dataset: ReidDataset, *, skips: bool) -> Plan:
    """Add the settings that this data set needs under a plan."""
    config = plan.config()
    settings = list(plan.settings)
    num_ids = 0 if dataset.train.pids is None else len(np.unique(dataset.train.pids))
    if num_ids < config.meta.num_ids:
        # one identity alone has no negative pair
        settings.append(f"meta.num_ids={num_ids if num_ids > 1 else 0}")
    if dataset.train.camids is None and config.needs_cameras is not None:
        settings.append("neighbors.metric=cosine")
        if config.neighbors.standardise:
            settings.append("neighbors.standardise=false")
    if skips:
        settings.append("data.on_bad_image=skip")
    return replace(plan, settings=tuple(settings))


def try_out(plan: Plan, dataset: ReidDataset) -> Plan:
    """Build all that the training builds, but for the weights' values, and measure a few steps.

    Raises UserError where the training would.
    """
    config = plan.config()
    style = dataset.style_paths if config.data.camera_style == "camstyle" else None
    bare = config.model_copy(update={"backbone": config.backbone.model_copy(update={"weights": "none"})})
    device = choose_device(config.train.device)
    trainer = Trainer(bare, replace(dataset, style_paths=style), device=device, hooks=Hooks())
    threads = torch.get_num_threads()
    torch.set_num_threads(config.train.threads or threads)
    try:
        return replace(plan, cost=estimate_cost(trainer))
    finally:
        torch.set_num_threads(threads)


def warn_of_memory(checkup: Checkup) -> None:
    """Warn where the estimate is more than there is."""
    cost = None if checkup.plan is None else checkup.plan.cost
    if cost is not None and cost.memory_bytes > cost.available_bytes:
        text = f"about {gigabytes(cost.memory_bytes)} of memory wanted, {gigabytes(cost.available_bytes)} there; " \
               "train.batch_size, data.height and data.width, backbone.last_stride=2 help"  # fmt: skip
        checkup.findings.append(Finding("warning", text))


# -- printing -------------------------------------------------------------------------------------


def describe_machine() -> dict[str, Any]:
    """Return processors and accelerator."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpus": num_cores(), "gpu": gpu}


def print_checkup(checkup: Checkup, console: Console) -> None:
    """Print what was found, worst last but for the command."""
    layout = checkup.layout
    if layout is not None:
        place = f" ({layout.place})" if layout.place else ""
        console.print(f"{layout.name} in {layout.root}{place}", highlight=False, soft_wrap=True)
    if checkup.splits:
        console.print(split_table(checkup.splits))
    if checkup.sizes:
        low, mid, high = (checkup.sizes[part] for part in ("min", "median", "max"))
        console.print(f"pixels: {mid['width']} x {mid['height']} (width x height, median), width {low['width']} to "
                      f"{high['width']}, height {low['height']} to {high['height']}", highlight=False)  # fmt: skip
    for level in ("note", "warning", "problem"):
        for finding in checkup.findings:
            if finding.level == level:
                print_finding(finding, console)
    if checkup.plan is None:
        console.print("training would fail: see the problem above", style="bold")
        return
    print_plan(checkup.plan, console)
    for plan in checkup.others:
        print_other(plan, console)


def split_table(splits: dict[str, dict[str, int | None]]) -> Table:
    """Set the counts of the splits one below the other."""
    table = Table(box=None)
    table.add_column("")
    for name in ("images", "identities", "cameras"):
        table.add_column(name, justify="right")
    for name, counts in splits.items():
        table.add_row(name, *("?" if number is None else f"{number:,}" for number in counts.values()))
    return table


def print_finding(finding: Finding, console: Console) -> None:
    """Print a finding and the first of its files."""
    console.print(f"{finding.level}: {finding.text}", highlight=False, markup=False, soft_wrap=True,
                  style={"problem": "red", "warning": "yellow", "note": ""}[finding.level])  # fmt: skip
    for file in finding.files:
        console.print(f"    {file}", highlight=False, markup=False, soft_wrap=True)


def print_plan(plan: Plan, console: Console) -> None:
    """Print the command and what it would take."""
    machine = describe_machine()
    console.print(f"\ntrain with ({plan.title}):\n", highlight=False)
    console.print(f"    {plan.command}\n", highlight=False, markup=False, soft_wrap=True)
    if plan.cost is not None:
        console.print(f"{tell_cost(plan.cost)}, on {machine['gpu'] or str(machine['cpus']) + ' CPUs'}", highlight=False)


def print_other(plan: Plan, console: Console) -> None:
    """Print what one may run instead, and what speaks against it where something does."""
    remark = plan.remark or ("" if plan.cost is None else tell_cost(plan.cost))
    console.print(f"\nor with {plan.title}{remark and f' ({remark})'}:\n", highlight=False, soft_wrap=True)
    console.print(f"    {plan.command}\n", highlight=False, markup=False, soft_wrap=True)


def tell_cost(cost: Cost) -> str:
    """Say what a run takes, and that it is an estimate."""
    return (
        f"estimate: {duration(cost.least_seconds)} to {duration(cost.likely_seconds)} (measured here: "
        f"{1 / cost.train_seconds:.3g} images a second trained, {1 / cost.extract_seconds:.3g} extracted), "
        f"{gigabytes(cost.memory_bytes)} of memory"
    )


def duration(seconds: float) -> str:
    """Say a time in minutes, hours or days."""
    for size, name in ((86400, "days"), (3600, "hours")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{max(1, round(seconds / 60))} min"


def gigabytes(num_bytes: float) -> str:
    """Say a size in gigabytes."""
    return f"{num_bytes / 1e9:.1f} GB"
