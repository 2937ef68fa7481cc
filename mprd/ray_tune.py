"""Run a study's trials side by side on Ray Tune: Ray says where, the ledger says what."""

from __future__ import annotations

import logging
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import train, tune
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search import Searcher
from rich.console import Console

from mprd.config import Config
from mprd.errors import UserError
from mprd.launch import run_local
from mprd.run_folder import RunFolder
from mprd.study_folder import Ledger, State, Trial, trial_config
from mprd.study_loop import keep_error, make_ready, read_error, stop_reason, trial_line

CPUS_PER_TRIAL = 2
"""One for the trial's driver, one for its worker."""
MAX_FAILURES = 2
"""Times that a trial whose process or machine is lost goes on from its checkpoint."""


def run_on_ray(
    ledger: Ledger, config: Config, console: Console, *, concurrency: int | None, gpus_per_trial: float | None
) -> None:
    """Run all trials that are left, as many side by side as fit.

    Raises UserError where the resources hold not even one trial.
    """
    with cluster(concurrency):
        num_gpus = choose_gpus(gpus_per_trial)
        num_slots = count_slots(num_gpus, concurrency)
        searcher = LedgerSearcher(ledger, config, console, num_gpus=num_gpus)
        tuner = tune.Tuner(
            tune.with_resources(run_trial, {"CPU": 1}),
            tune_config=tune.TuneConfig(
                search_alg=searcher,
                metric=ledger.objective,
                mode="max",
                num_samples=ledger.num_left,
                max_concurrent_trials=num_slots,
            ),
            run_config=tune.RunConfig(
                storage_path=str((ledger.folder.path / "ray").resolve()),
                name=f"{int(time.time())}",
                stop=LedgerStopper(searcher),
                failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
                verbose=0,
            ),
        )
        tuner.fit()


@contextmanager
def cluster(concurrency: int | None) -> Iterator[None]:
    """Join the cluster that this job runs on, or start one in this machine for as long as the block runs.

    Ctrl-C and SIGTERM end the block at once: trials go on from their checkpoints another time.
    """
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # the run folders hold all that these would write
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    if "RAY_ADDRESS" in os.environ:
        ray.init(log_to_driver=False, logging_level=logging.WARNING)
    else:
        # a trial's driver hardly computes, so two slots fit on one core
        num_cpus = CPUS_PER_TRIAL * max(2, os.cpu_count() or 1, concurrency or 1)
        ray.init(
            address="local",
            num_cpus=num_cpus,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.WARNING,
        )
    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)
        ray.shutdown()


def interrupt(_number: int, _frame: FrameType | None) -> None:
    """Treat SIGTERM as Ctrl-C."""
    raise KeyboardInterrupt


def choose_gpus(asked: float | None) -> float:
    """Return a trial's share of a GPU: one where there is any, unless asked otherwise."""
    available = ray.cluster_resources().get("GPU", 0)
    if asked is None:
        return 1.0 if available else 0.0
    if asked < 0 or (asked > 1 and asked != int(asked)):
        raise UserError(f"--gpus-per-trial must be a share below 1 or a whole number, but got {asked}")
    return asked


def count_slots(num_gpus: float, concurrency: int | None) -> int:
    """Count the trials that fit side by side; raise UserError where none does, rather than wait for ever."""
    resources = ray.cluster_resources()
    num_cpus = int(resources.get("CPU", 0))
    fits = num_cpus // CPUS_PER_TRIAL
    if fits < 1:
        raise UserError(f"a trial needs {CPUS_PER_TRIAL} logical CPUs, but the cluster has {num_cpus}")
    if num_gpus > 0:
        gpus = resources.get("GPU", 0)
        fits = min(fits, int(gpus // num_gpus))
        if fits < 1:
            raise UserError(f"--gpus-per-trial {num_gpus:g}: the cluster has {gpus:g} GPUs")
    elif concurrency is None and "RAY_ADDRESS" not in os.environ:
        fits = min(fits, os.cpu_count() or 1)
    if concurrency is not None and concurrency > fits:
        raise UserError(f"--concurrency {concurrency}: only {fits} trials fit side by side")
    return concurrency or fits


def run_trial(spec: dict[str, Any]) -> None:
    """Drive one trial: a Ray Train run of one worker, whose reports go to Tune."""
    trainer = TorchTrainer(
        train_worker,
        train_loop_config=spec,
        scaling_config=ScalingConfig(
            num_workers=1,
            use_gpu=spec["num_gpus"] > 0,
            resources_per_worker={"CPU": 1, **({"GPU": spec["num_gpus"]} if spec["num_gpus"] else {})},
        ),
        run_config=RunConfig(
            name=Path(spec["folder"]).name,
            storage_path=spec["storage"],
            # Ray's annotation names the callbacks of its older releases
            callbacks=[TuneReportCallback()],  # type: ignore[list-item]
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
    trainer.fit()


def train_worker(spec: dict[str, Any]) -> None:
    """Train in a worker, from the run folder's checkpoint where it has one.

    An error of the run is written down and not raised: what would fail again must not be tried again. A process
    that is lost raises by itself, and is.
    """
    folder, config = RunFolder(Path(spec["folder"])), Config.model_validate_json(spec["config"])

    def report(row: dict[str, Any]) -> None:
        train.report({key: value for key, value in row.items() if value is not None})

    try:
        resume = make_ready(folder)
        with (folder.path / "log.txt").open("a") as log:
            run_local(config, folder, resume=resume, console=Console(file=log), on_row=report)
    except Exception as error:
        keep_error(folder, error)


class LedgerSearcher(Searcher):
    """Hand the ledger's trials to Tune, and its results to the ledger."""

    def __init__(self, ledger: Ledger, config: Config, console: Console, *, num_gpus: float) -> None:
        super().__init__(metric=ledger.objective, mode="max")
        self.ledger = ledger
        self.config = config
        self.console = console
        self.num_gpus = num_gpus
        self.running: dict[str, Trial] = {}
        self.started: dict[str, float] = {}
        self.stopped: set[str] = set()

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything behind: Tune keeps a copy of its searcher, the study's files are the truth."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Save nothing: the study's files are the truth."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing: the study's files are the truth."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        """Start the next trial."""
        trial = self.ledger.next()
        if trial is None:
            return Searcher.FINISHED
        self.running[trial_id], self.started[trial_id] = trial, time.monotonic()
        return {
            # as one text: Tune would name folders after each setting
            "config": trial_config(self.config, trial).model_dump_json(),
            "folder": str(self.ledger.folder.run_folder(trial).path),
            "storage": str((self.ledger.folder.path / "ray").resolve()),
            "num_gpus": self.num_gpus,
        }

    def report(self, trial_id: str, row: dict[str, Any]) -> bool:
        """Pass on an epoch; say whether to stop the trial."""
        is_last = row["epoch"] + 1 >= self.config.train.epochs
        if self.ledger.report(self.running[trial_id], row) and not is_last:
            self.stopped.add(trial_id)
        return trial_id in self.stopped

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Write down how a trial ended, by what its run folder holds."""
        trial = self.running.pop(trial_id)
        state, reason = self.how_it_ended(trial_id, trial)
        trial = self.ledger.finish(trial, state, reason)
        seconds = time.monotonic() - self.started.pop(trial_id)
        self.console.print(trial_line(self.ledger, trial, seconds), highlight=False, soft_wrap=True)

    def how_it_ended(self, trial_id: str, trial: Trial) -> tuple[State, str | None]:
        """Say how a trial ended, and why."""
        folder = self.ledger.folder.run_folder(trial)
        if trial_id in self.stopped:
            return "stopped", stop_reason(self.ledger)
        reason = read_error(folder)
        if reason is not None:
            return "failed", reason
        if len(folder.read_rows()) < self.config.train.epochs:
            return "failed", "its process was lost, and again after going on; see ray/ in the study folder"
        return "finished", None


class LedgerStopper(tune.Stopper):
    """Stop a trial when the ledger says so."""

    def __init__(self, searcher: LedgerSearcher) -> None:
        self.searcher = searcher

    def __getstate__(self) -> dict[str, Any]:
        """Leave everything behind, as the searcher does."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        """Judge an epoch's row; the last result of a trial is no row."""
        return "epoch" in result and trial_id in self.searcher.running and self.searcher.report(trial_id, result)

    def stop_all(self) -> bool:
        """Never end the whole study."""
        return False
