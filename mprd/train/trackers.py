"""Experiment trackers: TensorBoard always, Weights & Biases or MLflow by `train.tracker`.

Each logs the row of every epoch. A tracker that fails, be it at its start, is dropped with one warning, and never ends
the run.
"""

from __future__ import annotations

import importlib.util
import logging
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from mprd.config.nested import flatten
from mprd.config.schema import Config
from mprd.errors import UserError

logger = logging.getLogger("mprd")

PROJECT = "mprd"


class Tracker(Protocol):
    """A sink for the rows of metrics."""

    def log(self, row: dict[str, float], epoch: int) -> None:
        """Log the figures of an epoch."""

    def close(self) -> None:
        """Flush and close."""


class TensorBoard:
    """Event files in the run folder, for `tensorboard --logdir RUN/events`."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(folder / "events"))

    def log(self, row: dict[str, float], epoch: int) -> None:
        for key, value in row.items():
            self.events.add_scalar(key, value, epoch)
        self.events.flush()

    def close(self) -> None:
        self.events.close()


class WandB:
    """A Weights & Biases run named after the run folder, in the group `train.tracker_group`; resumed with it."""

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        self.run = wandb.init(
            project=PROJECT,
            name=folder.resolve().name,
            group=config.train.tracker_group,
            id=tracker_id(folder),
            resume="allow",
            dir=folder,
            config=config.model_dump(mode="json"),
        )

    def log(self, row: dict[str, float], epoch: int) -> None:
        self.run.log(row, step=epoch)

    def close(self) -> None:
        self.run.finish()


class MLflow:
    """An MLflow run at MLFLOW_TRACKING_URI; resumed with the run folder."""

    def __init__(self, folder: Path, config: Config) -> None:
        import mlflow

        self.client = mlflow.MlflowClient()
        experiment = mlflow.set_experiment(PROJECT)
        name, key = folder.resolve().name, tracker_id(folder)
        found = self.client.search_runs([experiment.experiment_id], f"tags.mprd_id = '{key}'")
        if found:
            self.id = found[0].info.run_id
            self.client.update_run(self.id, status="RUNNING")
            return
        group = config.train.tracker_group
        tags = {"mprd_id": key, **({"group": group} if group else {})}
        run = self.client.create_run(experiment.experiment_id, run_name=name, tags=tags)
        self.id = run.info.run_id
        for setting, value in flatten(config.model_dump(mode="json")).items():
            self.client.log_param(self.id, setting, value)

    def log(self, row: dict[str, float], epoch: int) -> None:
        for key, value in row.items():
            self.client.log_metric(self.id, key, value, step=epoch)

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackers:
    """The trackers of a run."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.all: list[Tracker] = []
        # of TensorBoard a path that is not UTF-8
        self.open(lambda: TensorBoard(folder), "TensorBoard does not start")
        if config.train.tracker == "wandb":
            self.open(lambda: WandB(folder, config), "wandb does not start; see `wandb login`, WANDB_MODE=offline")
        if config.train.tracker == "mlflow":
            self.open(lambda: MLflow(folder, config), "mlflow does not start; see MLFLOW_TRACKING_URI")

    def open(self, make: Callable[[], Tracker], failure: str) -> None:
        """Start a tracker, or log why it does not start."""
        try:
            self.all.append(make())
        except Exception as error:  # of login, network, version and file system
            logger.warning("%s: %s", failure, first_line(error))

    def log(self, row: dict[str, Any]) -> None:
        """Log the numbers of a row."""
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        self.call_each(lambda tracker: tracker.log(numbers, row["epoch"]))

    def close(self) -> None:
        self.call_each(lambda tracker: tracker.close())

    def call_each(self, call: Callable[[Tracker], None]) -> None:
        """Call every tracker, and drop one that fails."""
        for tracker in list(self.all):
            try:
                call(tracker)
            except Exception as error:  # network clients raise errors of many kinds
                logger.warning("%s failed and is dropped: %s", type(tracker).__name__, first_line(error))
                self.all.remove(tracker)


def check_tracker(name: str) -> None:
    """Raise UserError if the package of a tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"train.tracker: {name} is not installed; pip install 'mprd[{name}]', or train.tracker=none")


def tracker_id(folder: Path) -> str:
    """Return the run's id at a tracker: random, and kept in the run folder for resuming."""
    file = folder / "tracker_id.txt"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:16] + "\n")
    return file.read_text().strip()


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
