"""Where the figures of a running training can be watched: TensorBoard always, Weights & Biases or MLflow when asked.

Each tracker takes the row of an epoch; none of them is needed, and one that fails is told once and left out.
"""

from __future__ import annotations

import importlib.util
import logging
import uuid
from pathlib import Path
from typing import Any, Protocol

from mprd.config.schema import Config
from mprd.errors import UserError

logger = logging.getLogger("mprd")

PROJECT = "mprd"


class Tracker(Protocol):
    """Where rows go."""

    def log(self, row: dict[str, float], epoch: int) -> None:
        """Take the figures of an epoch."""

    def close(self) -> None:
        """Write what is left."""


class TensorBoard:
    """Events below the run folder: `tensorboard --logdir RUN/events`."""

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
    """A run of Weights & Biases, named after the run folder; a resumed training goes on with it."""

    def __init__(self, folder: Path, config: Config) -> None:
        import wandb

        self.run = wandb.init(
            project=PROJECT,
            name=folder.resolve().name,
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
    """A run of MLflow where MLFLOW_TRACKING_URI says; a resumed training goes on with it."""

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
        run = self.client.create_run(experiment.experiment_id, run_name=name, tags={"mprd_id": key})
        self.id = run.info.run_id
        for setting, value in flatten(config.model_dump(mode="json")).items():
            self.client.log_param(self.id, setting, value)

    def log(self, row: dict[str, float], epoch: int) -> None:
        for key, value in row.items():
            self.client.log_metric(self.id, key, value, step=epoch)

    def close(self) -> None:
        self.client.set_terminated(self.id)


class Trackers:
    """All trackers of a run."""

    def __init__(self, config: Config, folder: Path) -> None:
        self.all: list[Tracker] = [TensorBoard(folder)]
        name = config.train.tracker
        if name != "none":
            self.all.append(open_tracker(name, config, folder))

    def log(self, row: dict[str, Any]) -> None:
        """Hand the numbers of an epoch's row to all; one that fails is left out from then on."""
        numbers = {key: value for key, value in row.items() if isinstance(value, int | float)}
        for tracker in list(self.all):
            try:
                tracker.log(numbers, row["epoch"])
            except Exception as error:  # whatever a network client raises, the training goes on
                logger.warning("%s no longer takes figures: %s", type(tracker).__name__, first_line(error))
                self.all.remove(tracker)

    def close(self) -> None:
        """Close all."""
        for tracker in self.all:
            tracker.close()


def open_tracker(name: str, config: Config, folder: Path) -> Tracker:
    """Start the tracker that `train.tracker` names; raise UserError where it does not start."""
    check_tracker(name)
    try:
        return WandB(folder, config) if name == "wandb" else MLflow(folder, config)
    except Exception as error:  # login, network and version errors of many kinds
        hint = "`wandb login`, WANDB_MODE=offline" if name == "wandb" else "MLFLOW_TRACKING_URI"
        raise UserError(
            f"train.tracker: {name} does not start ({first_line(error)}); see {hint}, or set train.tracker=none"
        ) from None


def check_tracker(name: str) -> None:
    """Raise UserError where the package of a tracker is not installed."""
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"train.tracker: {name} is not installed; pip install 'mprd[{name}]', or train.tracker=none")


def tracker_id(folder: Path) -> str:
    """Return the run's name at a tracker, drawn once and kept in its folder, so that a resumed run is the same."""
    file = folder / "tracker_id.txt"
    if not file.is_file():
        file.write_text(uuid.uuid4().hex[:16] + "\n")
    return file.read_text().strip()


def flatten(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Write nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def first_line(error: Exception) -> str:
    """Say an error in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
