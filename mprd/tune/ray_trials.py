"""Run a study's trials side by side on Ray Tune: Ray says where, the ledger says what."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from ray import tune
from ray.train import ScalingConfig
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.search import Searcher
from rich.console import Console

from mprd.config.loading import absolute
from mprd.config.schema import Config
from mprd.errors import UserError
from mprd.parallel.backends import count_actors
from mprd.runs.folder import RunFolder
from mprd.runtime.device import CpuThreads, num_cores
from mprd.train.local import finish
from mprd.train.mailbox import Mailbox
from mprd.train.ray_workers import choose_threads, cluster, find_resources, make_trainer
from mprd.tune.folder import Ledger, State, Trial, trial_config
from mprd.tune.local import keep_error, make_ready, read_error, stop_reason, trial_line

MAX_FAILURES = 2
"""Times that a trial whose driver or machine is lost goes on from its checkpoint."""


def run_on_ray(
    ledger: Ledger,
    config: Config,
    console: Console,
    *,
    concurrency: int | None = None,
    gpus_per_trial: float | None = None,
    address: str | None = None,
) -> None:
    """Run all trials that are left, as many side by side as fit.

    Raises UserError where the resources hold not even one trial.
    """
    if ledger.num_left == 0:
        return
    # the run folders hold all that these would write
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")
    # a trial that fails early has no row, and one that evaluates seldom has rows without mAP
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    # its tables give way to a line a trial
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    address = address or os.environ.get("RAY_ADDRESS", "local")
    cores = num_cores()
    # a trial's driver hardly computes, so a core takes it beside a worker
    num_cpus = cpus_per_trial(config) * max(cores, concurrency or 1)
    # Ray takes SIGTERM for itself when it starts, so ours comes second
    with cluster(address, num_cpus=num_cpus), stopped_by_sigterm():
        num_gpus = choose_gpus(config.train.device, gpus_per_trial)
        num_slots = count_slots(config, num_gpus, concurrency)
        threads = choose_threads(config, num_slots if address == "local" else 1)
        if address != "local":
            # who else is on the machine that Ray will choose is not known
            threads = threads._replace(max_threads=threads.threads)
        searcher = LedgerSearcher(ledger, absolute(config), console, num_gpus=num_gpus, threads=threads)
        make_tuner(searcher, num_slots).fit()


def make_tuner(searcher: LedgerSearcher, num_slots: int) -> tune.Tuner:
    """Build the tuner; what it keeps itself goes below `ray/` in the study folder."""
    ledger = searcher.ledger
    return tune.Tuner(
        tune.with_resources(run_trial, {"CPU": 1}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            metric=ledger.objective,
            mode="max",
            num_samples=ledger.num_left,
            max_concurrent_trials=num_slots,
        ),
        run_config=tune.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str((ledger.folder.path / "ray").resolve()),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            verbose=0,
        ),
    )


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C: the trials under way go on from their checkpoints another time."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def cpus_per_trial(config: Config) -> int:
    """Count a trial's logical CPUs: its driver, its worker, and what the worker needs beside its own."""
    return 2 + count_actors(config)


def choose_gpus(device: str, asked: float | None) -> float:
    """Return a trial's share of a GPU: one where there is any, unless asked otherwise."""
    if asked is not None:
        if asked < 0 or (asked > 1 and asked != int(asked)):
            raise UserError(f"--gpus-per-trial must be a share below 1 or a whole number, but got {asked}")
        return asked
    return 1.0 if device != "cpu" and find_resources().get("GPU", 0) else 0.0


def count_slots(config: Config, num_gpus: float, concurrency: int | None) -> int:
    """Count the trials that fit side by side; raise UserError where none does, rather than wait for ever."""
    resources, need = find_resources(), cpus_per_trial(config)
    num_cpus = int(resources.get("CPU", 0))
    fits = num_cpus // need
    if fits < 1:
        raise UserError(f"a trial needs {need} logical CPUs, but Ray has {num_cpus}: start Ray with --num-cpus {need}")
    if num_gpus > 0:
        fits = min(fits, int(resources.get("GPU", 0) / num_gpus))
        if fits < 1:
            raise UserError(f"--gpus-per-trial {num_gpus:g}: Ray has {resources.get('GPU', 0):g} GPUs")
    if concurrency is not None and concurrency > fits:
        raise UserError(f"--concurrency {concurrency}: only {fits} trials fit side by side")
    return concurrency or fits


def run_trial(spec: dict[str, Any]) -> None:
    """Drive one trial: `mprd.train.ray_workers` on one worker, whose reports go to Tune.

    An error of the run is written down and not raised: what would fail again must not be tried again. This
    process or its machine being lost is another matter, and Tune starts the trial anew.
    """
    folder, config = RunFolder(Path(spec["folder"])), Config.model_validate_json(spec["config"])
    num_gpus = spec["num_gpus"]
    scaling = ScalingConfig(
        num_workers=1,
        use_gpu=num_gpus > 0,
        resources_per_worker={"CPU": 1, **({"GPU": num_gpus} if num_gpus else {})},
    )
    try:
        if not make_ready(folder):
            folder.create(config)
        board = Mailbox(folder.path)
        board.open()
        make_trainer(config, folder, scaling, threads=spec["threads"], callbacks=[TuneReportCallback()]).fit()
        if board.error is not None:
            raise UserError(board.error)
        board.close()
        finish(folder, folder.read_rows(), Console(quiet=True))
    except Exception as error:
        keep_error(folder, error)


class LedgerSearcher(Searcher):
    """Hand the ledger's trials to Tune, and its results to the ledger."""

    def __init__(
        self, ledger: Ledger, config: Config, console: Console, *, num_gpus: float, threads: CpuThreads
    ) -> None:
        super().__init__(metric=ledger.objective, mode="max")
        self.ledger = ledger
        self.config = config
        self.console = console
        self.num_gpus = num_gpus
        self.threads = threads
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
            "num_gpus": self.num_gpus,
            "threads": self.threads,
        }

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Pass on an epoch's row, and ask the trial to end itself where the stop rule says so.

        Were Tune to kill it, the resources of its workers would stay taken where Ray runs without a dashboard.
        """
        if "epoch" not in result or trial_id in self.stopped:
            return
        trial = self.running[trial_id]
        is_last = result["epoch"] + 1 >= self.config.train.epochs
        if self.ledger.report(trial, result) and not is_last:
            self.stopped.add(trial_id)
            Mailbox(self.ledger.folder.run_folder(trial).path).ask_to_stop()

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
        reason = read_error(folder)
        if reason is not None:
            return "failed", reason
        if trial_id in self.stopped:
            return "stopped", stop_reason(self.ledger)
        if len(folder.read_rows()) < self.config.train.epochs:
            return "failed", "its process was lost, and again after going on; see ray/ in the study folder"
        return "finished", None
