"""A run's checkpoint with its data set: what the report computes from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mprd.config.schema import Config
from mprd.data.datasets import ImageSet, ReidDataset
from mprd.data.same_images import ImageRecord, find_changes, record_images
from mprd.errors import UserError
from mprd.model import Model, load_model
from mprd.report.runs import Run
from mprd.runs.dataset import open_dataset
from mprd.runtime import checkpoint
from mprd.runtime.device import set_threads

logger = logging.getLogger("mprd")

# without optimizers, which would fill the memory where many runs are shown
PARTS = ("memory", "positives", "list_features", "gcn", "epoch", "phase", "step")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One state of a run."""

    run: Run
    path: Path
    """The checkpoint's."""
    model: Model
    state: dict[str, Any]
    """The parts `PARTS` of the checkpoint, on the CPU."""
    dataset: ReidDataset | None
    """None where it cannot be read."""
    problem: str | None
    """Why it cannot be read, or that its training images have changed."""

    @property
    def config(self) -> Config:
        return self.run.config

    @property
    def memory(self) -> Tensor:
        """Return M, unit features `[N, D]`."""
        return self.state["memory"].to(self.model.device)

    @property
    def num_epochs(self) -> int:
        """Count the epochs whose training is complete in this state."""
        return self.state["epoch"] + (self.state["phase"] == "evaluate")

    @property
    def position(self) -> str:
        """Describe the position of this state in the training."""
        if self.state["phase"] == "evaluate" or self.state["step"] == 0:
            return f"after epoch {self.num_epochs} of {self.config.train.epochs}"
        return f"within epoch {self.num_epochs + 1} of {self.config.train.epochs}"

    def extract(self, images: ImageSet) -> Tensor:
        """Extract unit features `[n, D]` without augmentation."""
        numbers = [*map(self.model.camera_number, self.need_dataset().camera_names)]
        cameras = None if images.camids is None else [numbers[camid] for camid in images.camids]
        features = self.model.extract(images.paths, cameras=cameras, num_workers=self.config.data.num_workers)
        return torch.as_tensor(features, device=self.model.device)

    def need_dataset(self) -> ReidDataset:
        """Return the data set; raise UserError where it cannot be read."""
        if self.dataset is None:
            raise UserError(self.problem or "the data set cannot be read")
        return self.dataset

    def need_train(self) -> ImageSet:
        """Return the images of the memory's rows; raise UserError where they are missing or have changed."""
        if self.problem is not None:
            raise UserError(self.problem)
        return self.need_dataset().train

    def need_pids(self) -> Tensor:
        """Return the pids `[N]` of the training images; raise UserError without identities."""
        pids = self.need_train().pids
        if pids is None:
            raise UserError("the file names carry no identities")
        return torch.as_tensor(pids, device=self.model.device)

    def camids(self) -> Tensor | None:
        """Return the camids `[N]` of the training images; None without cameras."""
        camids = self.need_train().camids
        return None if camids is None else torch.as_tensor(camids, device=self.model.device)


def open_snapshot(run: Run, *, best: bool) -> Snapshot:
    """Load a run's last or best checkpoint and its data set.

    Raises UserError where no checkpoint can be read; a data set that cannot be read is noted in the snapshot.
    """
    set_threads(run.config.train.threads)
    path = run.folder.best if best else run.folder.last
    saved = checkpoint.load(path)
    state = {name: saved[name] for name in PARTS}
    images = saved.get("images")
    del saved
    model = load_model(run.folder.path, best=best)
    dataset, problem = None, None
    try:
        dataset = open_dataset(run.config)
    except (UserError, OSError) as error:
        problem = f"the data set cannot be read: {error}"
    else:
        problem = find_problem(dataset, run.config, images, num_images=len(state["memory"]))
    return Snapshot(run, path, model, state, dataset, problem)


def find_problem(dataset: ReidDataset, config: Config, images: dict[str, Any] | None, *, num_images: int) -> str | None:
    """Return in what the training images differ from those of the checkpoint; times alone are logged.

    Args:
        images: what the checkpoint records of its images; None in one of an earlier version.
        num_images: of the checkpoint.
    """
    changes = None
    if images is not None:
        earlier = ImageRecord.from_state_dict(images)
        changes = find_changes(earlier, record_images(dataset, config.data))
        if changes.rewritten:
            logger.warning("%s: compared with the training, %s", dataset.root, changes)
    if len(dataset.train) == num_images and not (changes is not None and changes.are_others):
        return None
    numbers = f"trained on {num_images} images, but {dataset.root} now has {len(dataset.train)}"
    return f"{numbers}: {changes or 'it is not the data set of this training'}"
