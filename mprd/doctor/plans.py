"""The command that trains on a data set: a preset, and a trial of the first step."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from mprd.backbone.from_torchvision import has_imagenet_weights
from mprd.config.schema import Config
from mprd.data.datasets import ReidDataset
from mprd.data.recognition import Layout
from mprd.doctor.estimate import Cost, estimate_cost
from mprd.engine.trainer import Trainer
from mprd.runtime.device import choose_device
from mprd.train.recipe import compose, fit_to_data

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
        preset = [] if self.preset == "recommended" else ["--preset", self.preset]
        sets = [word for setting in self.settings for word in ("--set", setting)]
        return shlex.join(["python", "-m", "mprd.train", *preset, "--data", str(self.root), *sets])

    def compose(self) -> tuple[Config, set[str]]:
        """Return the settings of the command, and the names of those that it sets."""
        return compose({"preset": self.preset, "data": self.root, "set_": self.settings})

    def fit(self, dataset: ReidDataset) -> tuple[Config, list[str]]:
        """Return the settings that the command would train with, and what it would leave out of the recipe."""
        config, asked = self.compose()
        return fit_to_data(config, dataset, asked=asked)


def base_plan(layout: Layout, preset: str, *, skips: bool = False) -> Plan:
    """Return the plan of a preset, which recognizes the layout itself."""
    skip = ("data.on_bad_image=skip",) if skips else ()
    return Plan(TITLES[preset], preset, layout.root, (*layout.settings, *skip))


def choose_plans(
    layout: Layout, dataset: ReidDataset, *, skips: bool, backbone: str | None = None
) -> tuple[Plan, tuple[Plan, ...]]:
    """Return the proposed plan, tried up to its first step, and the alternatives.

    The recommended settings are proposed where ImageNet weights are available and the estimate is at most two days.

    Args:
        skips: whether there are unreadable images, to be left out.
        backbone: propose the recommended settings with this network, whatever it costs.
    """
    small, recommended, paper = (base_plan(layout, preset, skips=skips) for preset in TITLES)
    if backbone is not None:
        settings = (*recommended.settings, f"backbone.name={backbone}")
        title = f"{backbone}, the recommended settings"
        return try_out(replace(recommended, settings=settings, title=title), dataset), ()
    if not has_imagenet_weights(recommended.compose()[0].backbone.name):
        recommended, paper = (replace(plan, remark=NO_WEIGHTS) for plan in (recommended, paper))
    else:
        recommended = try_out(recommended, dataset)
        if recommended.cost is not None and recommended.cost.likely_seconds <= 3600 * MAX_HOURS:
            return recommended, (paper,)
    return try_out(small, dataset), (recommended, paper)


def try_out(plan: Plan, dataset: ReidDataset) -> Plan:
    """Build the trainer, with random weights, and add an estimate of the cost to the plan.

    Raises UserError where the training would.
    """
    config, _ = plan.fit(dataset)
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
