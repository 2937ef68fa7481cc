"""The examination of a data set before training: its layout, its faults, and the command that trains on it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mprd.cli import quiet
from mprd.data.datasets import ReidDataset, load_dataset
from mprd.data.recognition import Layout, find_layout
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
    find_left_out,
    list_style_files,
    read_files,
    split_files,
)
from mprd.doctor.plans import Plan, base_plan, choose_plans
from mprd.errors import UserError
from mprd.runtime.machine import num_cores
from mprd.train.recipe import compose

MIN_ASPECT = 1.3
"""Median height over width below which crops are probably not of standing people."""

Track = Callable[[Iterable[File], int], Iterable[File]]
"""Wraps an iterable of a known length, to show the progress."""


@dataclass
class DatasetReport:
    """The result of an examination."""

    root: Path
    layout: Layout | None = None
    splits: dict[str, dict[str, int | None]] = field(default_factory=dict)
    sizes: dict[str, Any] | None = None
    findings: list[Finding] = field(default_factory=list)
    plan: Plan | None = None
    """The proposed plan; None where training would fail."""
    others: tuple[Plan, ...] = ()
    """Alternatives to the proposed plan."""

    @property
    def has_problem(self) -> bool:
        """Whether training would fail."""
        return any(finding.level == "problem" for finding in self.findings)

    @property
    def command(self) -> str | None:
        """The proposed command; None where training would fail."""
        return None if self.plan is None else self.plan.command

    def row(self) -> dict[str, Any]:
        """Return the report for JSON."""
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
            "estimate": None if self.plan is None or self.plan.cost is None else asdict(self.plan.cost),
        }


def examine(
    root: Path,
    *,
    settings: Sequence[str] = (),
    backbone: str | None = None,
    track: Track = lambda files, _total: files,
) -> DatasetReport:
    """Examine a folder or a list; errors that would stop the training become findings.

    Args:
        settings: settings of the data, as for `--set`.

    Raises UserError where there is no such folder, and for wrong settings.
    """
    report = DatasetReport(root)
    if not os.path.exists(root):
        raise UserError(f"{root}: no such folder")
    config, _ = compose({"preset": "paper", "data": root, "set_": settings})
    with quiet():
        try:
            report.layout = replace(find_layout(config.data), settings=tuple(settings))
            check_layout(report, report.layout)
            if not report.has_problem:
                check_images(report, report.layout, track, backbone)
        except UserError as error:
            report.findings.append(Finding("problem", str(error)))
    return report


def check_layout(report: DatasetReport, layout: Layout) -> None:
    """Add the findings about folders."""
    if layout.remark:
        level: Level = "warning" if "nothing is evaluated" in layout.remark else "note"
        report.findings.append(Finding(level, layout.remark))
    if layout.problem:
        report.findings.append(Finding("problem", layout.problem))


def check_images(report: DatasetReport, layout: Layout, track: Track, backbone: str | None) -> None:
    """Decode every image, add the findings, and choose the command, for a backbone if one is given."""
    dataset = load_dataset(base_plan(layout, "paper").compose()[0].data)
    paths = [path for images in (dataset.train, dataset.query, dataset.gallery) for path in images.paths]
    styles = list_style_files(dataset)
    files = read_files(paths + styles, track=lambda found: track(found, len(paths) + len(styles)))
    files, bad_styles = files[: len(paths)], [file.path for file in files[len(paths) :] if file.size is None]
    report.splits, report.sizes = describe_splits(dataset), describe_sizes(files)
    report.findings += find_left_out(dataset, layout)
    report.findings += find_in_files(dataset, files) + find_in_ids(dataset, layout) + [find_camera_styles(dataset)]
    if bad_styles:
        text = f"{len(bad_styles):,} CamStyle images are unreadable; the command leaves them out"
        report.findings.append(Finding("warning", text, tuple(map(str, bad_styles[:NUM_SHOWN]))))
    if dataset.train.pids is None:
        text = "names hold no identities: a file of a few labeled images helps, meta.labels (docs/own-data.md)"
        report.findings.append(Finding("note", text))
    median = report.sizes["median"] if report.sizes else None
    if median and median["height"] < MIN_ASPECT * median["width"]:
        text = "crops are not twice as high as wide, and are stretched to data.height and data.width"
        report.findings.append(Finding("note", text))
    if not report.has_problem:
        skips = bool(bad_styles) or any(file.size is None for file in files)
        readable = leave_out(dataset, files)
        report.plan, report.others = choose_plans(layout, readable, skips=skips, backbone=backbone)
        report.findings += [Finding("note", note) for note in report.plan.fit(readable)[1]]
        warn_about_memory(report)


def leave_out(dataset: ReidDataset, files: list[File]) -> ReidDataset:
    """Return the data set without the unreadable images, as in training."""
    train, query, gallery = (
        images.select(np.flatnonzero([file.size is not None for file in part]))
        for _, images, part in split_files(dataset, files)
    )
    return replace(dataset, train=train, query=query, gallery=gallery)


def warn_about_memory(report: DatasetReport) -> None:
    """Add a warning where the estimated memory exceeds what is available."""
    cost = None if report.plan is None else report.plan.cost
    if cost is not None and cost.memory_bytes > cost.available_bytes:
        text = (
            f"needs about {gigabytes(cost.memory_bytes)} of memory, {gigabytes(cost.available_bytes)} available; "
            "train.batch_size, data.height and data.width, backbone.last_stride=2 help"
        )
        report.findings.append(Finding("warning", text))


def describe_machine() -> dict[str, Any]:
    """Return the number of CPU cores and the name of the GPU."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else None
    return {"cpus": num_cores(), "gpu": gpu}


def gigabytes(num_bytes: float) -> str:
    """Format a number of bytes."""
    return f"{num_bytes / 1e9:.1f} GB"
