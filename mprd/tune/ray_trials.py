"""Run the trials of a study side by side on Ray Tune: Ray places them, the queue chooses them."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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
from mprd.parallel.cluster import Waiting, cluster, find_address, find_resources
from mprd.runs.folder import RunFolder
from mprd.runtime.device import CpuThreads, num_cores
from mprd.text import new_console
from mprd.train.local import finish
from mprd.train.mailbox import Mailbox
from mprd.train.ray_workers import choose_threads, make_trainer
from mprd.tune.outcome import prepare_folder, read_error, stop_reason, trial_line, write_error
from mprd.tune.trial import State, Trial, trial_config
from mprd.tune.trial_queue import TrialQueue

MAX_FAILURES = 2
"""Restarts of a trial whose driver or machine is lost."""
TUNE_SETTINGS = {
    # the run folders hold all that these would write
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # a trial that fails early reports nothing, and epochs without evaluation report no mAP
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # a line per trial replaces Tune's tables
    "RAY_AIR_NEW_OUTPUT": "0",
}


def run_trials_on_ray(
    queue: TrialQueue,
    config: Config,
    console: Console,
    *,
    concurrency: int | None = None,
    gpus_per_trial: float | None = None,
    address: str | None = None,
) -> None:
    """Run all trials that are left, as many side by side as fit.

    Raises UserError where the resources are too small for one trial.
    """
    if queue.num_left == 0:
        return
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    place = find_address(address)
    # a trial's driver hardly computes, so a core runs it beside a worker
    num_cpus = cpus_per_trial(config) * max(num_cores(), concurrency or 1)
    # Ray installs its SIGTERM handler when it starts, so ours comes second
    with cluster(place, num_cpus=num_cpus), sigterm_as_interrupt():
        num_gpus = choose_gpus(config.train.device, gpus_per_trial)
        num_slots = count_slots(config, num_gpus, concurrency)
        threads = choose_threads(config, num_slots if place.is_local else 1)
        if not place.is_local:
            # other jobs may share the machine that Ray chooses
            threads = threads._replace(max_threads=threads.threads)
        searcher = QueueSearcher(queue, absolute(config), console, num_gpus=num_gpus, threads=threads)
        starts = Starts(searcher, Waiting("trials", CPU=cpus_per_trial(config), GPU=num_gpus))
        make_tuner(searcher, num_slots, starts).fit()
        if starts.error is not None:
            raise starts.error


def make_tuner(searcher: QueueSearcher, num_slots: int, starts: Starts) -> tune.Tuner:
    """Build the tuner, whose own files go to `ray/` in the study folder."""
    queue = searcher.queue
    return tune.Tuner(
        tune.with_resources(run_trial, {"CPU": 1}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            metric=queue.objective,
            mode="max",
            num_samples=queue.num_left,
            max_concurrent_trials=num_slots,
        ),
        run_config=tune.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str((queue.folder.path / "ray").resolve()),
            failure_config=tune.FailureConfig(max_failures=MAX_FAILURES),
            stop=starts,
            verbose=0,
        ),
    )


@contextmanager
def sigterm_as_interrupt() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C: running trials resume from their checkpoints later."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        # only the main thread may set handlers
        yield
        return
    old = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def cpus_per_trial(config: Config) -> int:
    """Return a trial's logical CPUs: its driver, its worker, and the worker's actors."""
    return 2 + count_actors(config)


def choose_gpus(device: str, requested: float | None) -> float:
    """Return a trial's GPUs, a share below 1 or a whole number; by default one if Ray has any."""
    if requested is not None:
        if requested < 0 or (requested > 1 and requested != int(requested)):
            raise UserError(f"--gpus-per-trial must be a share below 1 or a whole number, but got {requested}")
        return requested
    return 1.0 if device != "cpu" and find_resources().get("GPU", 0) else 0.0


def count_slots(config: Config, num_gpus: float, concurrency: int | None) -> int:
    """Return the number of concurrent trials; raise UserError where none fits, because Ray would wait for ever."""
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
    """Drive one trial: `mprd.train.ray_workers` on one worker, which reports every epoch to Tune.

    An error of the run is written to its folder and not raised, because a retry would fail again. If this process or
    its machine is lost, Tune starts the trial again.
    """
    folder, config = RunFolder(Path(spec["folder"])), Config.model_validate(json.loads(spec["config"]))
    num_gpus = spec["num_gpus"]
    scaling = ScalingConfig(
        num_workers=1,
        use_gpu=num_gpus > 0,
        resources_per_worker={"CPU": 1, **({"GPU": num_gpus} if num_gpus else {})},
    )
    try:
        if not prepare_folder(folder):
            folder.create(config)
        mailbox = Mailbox(folder.path)
        mailbox.open()
        make_trainer(config, folder, scaling, threads=spec["threads"], callbacks=[TuneReportCallback()]).fit()
        if mailbox.error is not None:
            raise UserError(mailbox.error)
        mailbox.close()
        finish(folder, folder.read_rows(), new_console(quiet=True))
    except Exception as error:
        write_error(folder, error)


class Starts(tune.Stopper):
    """Say what trials wait for while none runs, and end the study where none ever does."""

    def __init__(self, searcher: QueueSearcher, waiting: Waiting) -> None:
        self.searcher, self.waiting = searcher, waiting
        self.error: UserError | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing, as Tune saves its stopper."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Look after the wait; Tune calls this again and again."""
        running = self.searcher.running.values()
        if not running or any(Mailbox(each.folder.path).messages.is_file() for each in running):
            self.waiting.restart()
        try:
            self.waiting.check()
        except UserError as error:
            self.error = error
        return self.error is not None


@dataclass
class RunningTrial:
    """A trial that Tune runs."""

    trial: Trial
    folder: RunFolder
    num_epochs: int = 0
    started: float = field(default_factory=time.monotonic)
    is_stopped: bool = False
    """Whether the pruner asked it to stop."""


class QueueSearcher(Searcher):
    """Suggest the trials of the queue to Tune, and record Tune's results in the queue."""

    def __init__(
        self, queue: TrialQueue, config: Config, console: Console, *, num_gpus: float, threads: CpuThreads
    ) -> None:
        super().__init__(metric=queue.objective, mode="max")
        self.queue = queue
        self.config = config
        self.console = console
        self.num_gpus = num_gpus
        self.threads = threads
        self.running: dict[str, RunningTrial] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing: Tune saves its searcher, but the study folder holds the state."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Save nothing, as the study folder holds the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing, as the study folder holds the state."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str:  # type: ignore[override]
        """Start the next trial whose settings are valid."""
        while (trial := self.queue.next()) is not None:
            running = RunningTrial(trial, self.queue.folder.run_folder(trial))
            try:
                config = trial_config(self.config, trial)
            except UserError as error:
                self.finish(running, "failed", str(error))
                continue
            running.num_epochs = config.train.epochs
            self.running[trial_id] = running
            return {
                # as one string, because Tune would name folders after every setting
                "config": json.dumps(config.model_dump(mode="json")),
                "folder": str(running.folder.path),
                "num_gpus": self.num_gpus,
                "threads": self.threads,
            }
        return Searcher.FINISHED

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report an epoch, and ask the trial to stop itself where the pruner stops it.

        If Tune killed it, its workers would keep their resources where Ray runs without a dashboard.
        """
        running = self.running[trial_id]
        if "epoch" not in result or running.is_stopped:
            return
        is_last = result["epoch"] + 1 >= running.num_epochs
        if self.queue.report(running.trial, result) and not is_last:
            running.is_stopped = True
            Mailbox(running.folder.path).request_stop()

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record how a trial ended, from its run folder."""
        running = self.running.pop(trial_id)
        self.finish(running, *self.outcome(running))

    def outcome(self, running: RunningTrial) -> tuple[State, str | None]:
        """Return how a trial ended, and why."""
        reason = read_error(running.folder)
        if reason is not None:
            return "failed", reason
        if running.is_stopped:
            return "stopped", stop_reason(self.queue)
        if len(running.folder.read_rows()) < running.num_epochs:
            return "failed", "its process was lost, and again after going on; see ray/ in the study folder"
        return "finished", None

    def finish(self, running: RunningTrial, state: State, reason: str | None) -> None:
        """Record the end of a trial, and print its line."""
        trial = self.queue.finish(running.trial, state, reason)
        seconds = time.monotonic() - running.started
        self.console.print(trial_line(self.queue, trial, seconds), highlight=False, soft_wrap=True)
