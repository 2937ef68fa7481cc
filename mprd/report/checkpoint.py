"""A run's checkpoint with the images it was trained on: what the pictures of a report are computed from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mprd.config.schema import Config
from mprd.data.datasets import ImageSet, ReidDataset
from mprd.errors import UserError
from mprd.model import Model, load_model
from mprd.pairs.rules import PositiveTable
from mprd.report.runs import Run
from mprd.runs.dataset import open_dataset
from mprd.runtime import checkpoint
from mprd.runtime.device import set_threads

# optimizers would fill the memory where many runs are shown
PARTS = ("memory", "positives", "gcn", "epoch", "phase", "step")


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One state of a run."""

    run: Run
    model: Model
    state: dict[str, Any]
    """The parts of the checkpoint named in `PARTS`, on the CPU."""
    dataset: ReidDataset | None
    """None where it cannot be read any more."""
    trouble: str | None
    """Why it cannot, or why it is not the one of the training."""

    @property
    def config(self) -> Config:
        """Return the settings of the run."""
        return self.run.config

    @property
    def memory(self) -> Tensor:
        """Return M, unit features `[N, D]`."""
        return self.state["memory"].to(self.model.device)

    @property
    def num_epochs(self) -> int:
        """Count the epochs whose training this state has behind it."""
        return self.state["epoch"] + (self.state["phase"] == "evaluate")

    @property
    def position(self) -> str:
        """Say where in the training this state stands."""
        if self.state["phase"] == "evaluate" or self.state["step"] == 0:
            return f"after epoch {self.num_epochs} of {self.config.train.epochs}"
        return f"within epoch {self.num_epochs + 1} of {self.config.train.epochs}"

    def extract(self, images: ImageSet) -> Tensor:
        """Return unit features `[n, D]` of images as they are tested."""
        features = self.model.extract(images.paths, num_workers=self.config.data.num_workers)
        return torch.as_tensor(features, device=self.model.device)

    def positives(self) -> PositiveTable:
        """Return P."""
        table = PositiveTable(0)
        table.ids = self.state["positives"].to(self.model.device)
        return table

    def need_dataset(self) -> ReidDataset:
        """Return the data set; raise UserError where it is gone."""
        if self.dataset is None:
            raise UserError(self.trouble or "the data set is gone")
        return self.dataset

    def need_train(self) -> ImageSet:
        """Return the images that the rows of the memory belong to; raise UserError where they are gone."""
        if self.trouble is not None:
            raise UserError(self.trouble)
        return self.need_dataset().train

    def need_pids(self) -> Tensor:
        """Return the identities `[N]` of the training images; raise UserError where none are known."""
        pids = self.need_train().pids
        if pids is None:
            raise UserError("the file names carry no identities")
        return torch.as_tensor(pids, device=self.model.device)

    def camids(self) -> Tensor | None:
        """Return the cameras `[N]` of the training images, where known."""
        camids = self.need_train().camids
        return None if camids is None else torch.as_tensor(camids, device=self.model.device)


def open_snapshot(run: Run, *, best: bool) -> Snapshot:
    """Load a run's last or best checkpoint and its data set.

    Raises UserError where there is no readable checkpoint; a data set that is gone is noted in the snapshot.
    """
    set_threads(run.config.train.threads)
    path = run.folder.best if best else run.folder.last
    saved = checkpoint.load(path)
    state = {name: saved[name] for name in PARTS}
    del saved
    model = load_model(run.folder.path, best=best)
    dataset, trouble = None, None
    try:
        dataset = open_dataset(run.config, run.folder)
    except (UserError, OSError) as error:
        trouble = f"the data set cannot be read: {error}"
    else:
        if len(dataset.train) != len(state["memory"]):
            trouble = (
                f"trained on {len(state['memory'])} images, but {dataset.root} now has {len(dataset.train)}: "
                "it is not the data set of the training any more"
            )
    return Snapshot(run, model, state, dataset, trouble)
