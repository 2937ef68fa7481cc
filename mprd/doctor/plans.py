"""The command that trains on a data set: presets, the settings that the data need, and a trial of the first step."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mprd.backbone.network import has_imagenet_weights
from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.data.datasets import ReidDataset
from mprd.data.recognition import TREE_PATTERNS, Layout
from mprd.doctor.estimate import Cost, estimate_cost
from mprd.engine.trainer import Trainer
from mprd.runtime.device import choose_device

MAX_HOURS = 48
"""The longest estimate with which ResNet-50 is proposed; beyond it the small network is."""

NO_WEIGHTS = (
    "the weights are neither in torchvision's cache nor reachable: give a state dict by --set backbone.weights=FILE"
)
TITLES = {
    "demo": "small network from random weights",
    "recommended": "ResNet-50 from ImageNet weights, the recommended settings",
    "paper": "ResNet-50 from ImageNet weights, the paper's settings",
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
    """Why it is not the proposal, where there is a reason."""

    @property
    def command(self) -> str:
        """The shell command."""
        preset = [] if self.preset == "demo" else ["--preset", self.preset]
        sets = [word for setting in self.settings for word in ("--set", setting)]
        return shlex.join(["python", "-m", "mprd.train", *preset, "--data", str(self.root), *sets])

    def config(self) -> Config:
        """Return the settings of the command."""
        return load_config(self.preset, overrides=self.settings, values={"data": {"root": self.root}})


def base_plan(layout: Layout, kind: str) -> Plan:
    """Return the plan that reads a layout under one of the presets in TITLES."""
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
    """Return the proposed plan, tried up to its first step, and the alternatives.

    The recommended settings are proposed where ImageNet weights are available and the estimate is at most two days.

    Args:
        skips: whether there are unreadable images, to be left out.
    """
    small, recommended, paper = (adapt(base_plan(layout, kind), dataset, skips=skips) for kind in TITLES)
    if not has_imagenet_weights(recommended.config().backbone.name):
        recommended, paper = (replace(plan, remark=NO_WEIGHTS) for plan in (recommended, paper))
    else:
        recommended = try_out(recommended, dataset)
        if recommended.cost is not None and recommended.cost.likely_seconds <= 3600 * MAX_HOURS:
            return recommended, (paper,)
    return try_out(small, dataset), (recommended, paper)


def adapt(plan: Plan, dataset: ReidDataset, *, skips: bool) -> Plan:
    """Add the settings that the data set needs to a plan."""
    config = plan.config()
    settings = list(plan.settings)
    num_ids = 0 if dataset.train.pids is None else len(np.unique(dataset.train.pids))
    if num_ids < config.meta.num_ids:
        # a single identity has no negative pair
        settings.append(f"meta.num_ids={num_ids if num_ids > 1 else 0}")
    if dataset.train.camids is None and config.needs_cameras is not None:
        settings.append("neighbors.metric=cosine")
        if config.neighbors.standardise:
            settings.append("neighbors.standardise=false")
    if skips:
        settings.append("data.on_bad_image=skip")
    return replace(plan, settings=tuple(settings))


def try_out(plan: Plan, dataset: ReidDataset) -> Plan:
    """Build the trainer, with random weights, and add an estimate of the cost to the plan.

    Raises UserError where the training would.
    """
    config = plan.config()
    style = dataset.style_paths if config.data.camera_style == "camstyle" else None
    bare = config.model_copy(update={"backbone": config.backbone.model_copy(update={"weights": "none"})})
    device = choose_device(config.train.device)
    trainer = Trainer(bare, replace(dataset, style_paths=style), device=device)
    threads = torch.get_num_threads()
    torch.set_num_threads(config.train.threads or threads)
    try:
        return replace(plan, cost=estimate_cost(trainer))
    finally:
        torch.set_num_threads(threads)
