"""Run the trials of a study side by side on Ray Tune: Ray places them, the queue chooses them.

A trial is one process that trains as `mprd.train.local` does, and holds what it needs from its first moment: nothing
waits for resources that another process of the study holds.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
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
from ray.exceptions import RayTaskError
from ray.tune.search import Searcher
from rich.console import Console

from mprd.config.loading import absolute
from mprd.config.schema import Config
from mprd.errors import Interrupted, UserError
from mprd.parallel.cluster import cluster, find_address
from mprd.parallel.losses import Losses, explain_loss
from mprd.parallel.resources import Waiting, choose_bundle, choose_threads, name_bundle
from mprd.parallel.shared_folder import check_shared, mark_shared
from mprd.runs.folder import RunFolder
from mprd.runtime.machine import num_cores
from mprd.storage.copies import pull, sent
from mprd.storage.copy import LARGE
from mprd.storage.places import local_path, place_of
from mprd.text import new_console
from mprd.train.mailbox import Mailbox
from mprd.train.notice import Notice
from mprd.tune.outcome import TrialStopped, prepare_folder, stop_reason, trial_line, write_error
from mprd.tune.slots import Slots, check_options
from mprd.tune.trial import State, Trial, trial_config
from mprd.tune.trial_queue import TrialQueue

TUNE_SETTINGS = {
    # the run folders hold all that these would write
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
    # a trial that fails early reports nothing, and epochs without evaluation report no mAP
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",
    # else Tune itself starts a trial again whose machine was taken with notice
    "RAY_TRAIN_COUNT_PREEMPTION_AS_FAILURE": "1",
    # a line per trial replaces Tune's tables
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    # `Slots` limits them
    "TUNE_MAX_PENDING_TRIALS_PG": "1000",
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
    """Run all trials that are left, as many side by side as fit while the cluster grows and shrinks.

    Raises UserError where the resources are too small for one trial.
    """
    if queue.num_left == 0:
        return
    check_options(concurrency, gpus_per_trial)
    for name, value in TUNE_SETTINGS.items():
        os.environ.setdefault(name, value)
    # it lists lost trials
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)
    # a trial reserves the logical CPUs of its actors, which mostly wait
    num_cpus = 1 + config.num_actors
    place = find_address(address)
    # Ray installs its SIGTERM handler when it starts, so ours comes second
    num_slots = max(num_cores(), concurrency or 1)
    with cluster(place, num_cpus=num_cpus * num_slots) as own_files, sigterm_as_interrupt():
        bundle = choose_bundle(
            config.train.device,
            num_cpus=num_cpus,
            num_gpus=gpus_per_trial,
            what="a trial",
            remedy="change --gpus-per-trial or --set train.device=cpu",
        )
        slots = Slots(bundle, concurrency)
        console.print(
            f"Ray: trials with {name_bundle(bundle)} each, {slots.describe()}", highlight=False, soft_wrap=True
        )
        searcher = QueueSearcher(queue, absolute(config), console, slots)
        watch = Watch(searcher)
        make_tuner(searcher, watch, own_files).fit()
        if searcher.error is not None:
            raise searcher.error


def make_tuner(searcher: QueueSearcher, watch: Watch, own_files: Path) -> tune.Tuner:
    """Build the tuner; its own files go to a folder of this machine."""
    return tune.Tuner(
        tune.with_resources(run_trial, dict(searcher.slots.bundle)),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            metric=searcher.queue.objective,
            mode="max",
            # the searcher ends the study: a lost trial is suggested again
            num_samples=-1,
            # a process that is there need not import torch
            reuse_actors=True,
        ),
        run_config=tune.RunConfig(
            name=f"{time.time_ns()}",
            storage_path=str(own_files),
            callbacks=[TrialEvents(searcher)],
            stop=watch,
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


def run_trial(spec: dict[str, Any]) -> None:
    """Run one trial, from its checkpoint where there is one, and report every epoch to Tune.

    An error of the run is written to its folder and reported, unless this machine does not see the study folder.
    """
    # local, as only the trials' processes need torch, and the study's imports this file too
    from mprd.train.local import run_local

    check_shared(local_path(spec["study"]), spec["mark"])
    folder, config = RunFolder(spec["folder"]), Config.model_validate(json.loads(spec["config"]))
    bundle, mailbox = spec["bundle"], spec["mailbox"]
    notice = Notice()
    # Ray's own default is WARNING
    logging.getLogger("mprd").setLevel(logging.INFO)
    if "GPU" not in bundle:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def report(row: dict[str, Any]) -> None:
        # returns when the study has the row, and perhaps requested a stop
        tune.report({key: value for key, value in row.items() if value is not None})
        if row["epoch"] + 1 < config.train.epochs and mailbox.stops(spec["id"]):
            raise TrialStopped

    try:
        with sent([folder.path]):
            resume = prepare_folder(folder)
            threads = choose_threads(config, bundle, most=spec["most"])
            console = new_console(quiet=True)
            run_local(config, folder, resume=resume, console=console, on_row=report, threads=threads, stop=notice)
    except TrialStopped:
        return
    except Interrupted:
        raise notice.error() from None
    except Exception as error:
        tune.report({"error": write_error(folder, error)})


class Watch(tune.Stopper):
    """Say what trials wait for while none runs, and end the study where none ever does, or for an error."""

    def __init__(self, searcher: QueueSearcher) -> None:
        self.searcher, self.waiting = searcher, Waiting("trials", searcher.slots.bundle)

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing, as Tune saves its stopper."""
        return {}

    def __call__(self, trial_id: str, result: dict[str, Any]) -> bool:
        return False

    def stop_all(self) -> bool:
        """Look after the wait; Tune calls this again and again."""
        running = self.searcher.running.values()
        if not running or any(each.is_placed for each in running):
            self.waiting.restart()
        try:
            self.waiting.check()
        except UserError as error:
            self.searcher.fail(error)
        return self.searcher.error is not None


class TrialEvents(tune.Callback):
    """Hand on what the searcher does not hear: the start of trials, and why they were lost."""

    def __init__(self, searcher: QueueSearcher) -> None:
        self.searcher = searcher

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Note that a trial has its resources."""
        self.searcher.running[trial.trial_id].is_placed = True

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        """Queue a lost trial again, or end the study where its machine cannot run any."""
        with Path(trial.pickled_error_file).open("rb") as file:
            error = pickle.load(file)
        if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
            self.searcher.fail(error.cause)
        self.searcher.lose(trial.trial_id, error)


@dataclass
class RunningTrial:
    """A trial that Tune runs."""

    trial: Trial
    folder: RunFolder
    num_epochs: int = 0
    started: float = field(default_factory=time.monotonic)
    is_placed: bool = False
    is_stopped: bool = False
    """Whether the pruner stops it."""
    error: str | None = None


class QueueSearcher(Searcher):
    """Suggest the trials of the queue to Tune, and record Tune's results in the queue."""

    def __init__(self, queue: TrialQueue, config: Config, console: Console, slots: Slots) -> None:
        super().__init__(metric=queue.objective, mode="max")
        self.queue = queue
        self.config = config
        self.console = console
        self.slots = slots
        self.mark, self.mailbox = mark_shared(queue.folder.path), Mailbox()
        self.running: dict[str, RunningTrial] = {}
        self.losses: dict[int, Losses] = {}
        """By number of the trial."""
        self.is_exhausted = False
        self.error: UserError | None = None
        """Ends the study."""

    def __getstate__(self) -> dict[str, Any]:
        """Pickle nothing: Tune saves its searcher, but the study folder holds the state."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Save nothing, as the study folder holds the state."""

    def restore(self, checkpoint_path: str) -> None:
        """Restore nothing, as the study folder holds the state."""

    def suggest(self, trial_id: str) -> dict[str, Any] | str | None:  # type: ignore[override]
        """Start the next trial whose settings are valid; return None while no more fit, or one may be lost again."""
        if len(self.running) >= self.slots.count():
            return None
        while (trial := self.next()) is not None:
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
                # by URL, as each machine has a cache of its own
                "folder": place_of(running.folder.path.resolve()),
                "study": place_of(self.queue.folder.path.resolve()),
                "mark": self.mark,
                "mailbox": self.mailbox,
                # another one after a loss
                "id": trial_id,
                "bundle": self.slots.bundle,
                "most": self.slots.count(),
            }
        return None if self.running else Searcher.FINISHED

    def next(self) -> Trial | None:
        """Return the next trial; None is final until a trial is lost, as a sampler must not be asked again."""
        if self.is_exhausted and not self.queue.to_retry:
            return None
        trial = self.queue.next()
        # that trials failed alike is not final while others run
        self.is_exhausted = trial is None and self.queue.repeated_failure is None
        return trial

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Report an epoch, and stop the trial where the pruner does."""
        running = self.running[trial_id]
        running.error = result.get("error")
        if "epoch" not in result or running.is_stopped:
            return
        is_last = result["epoch"] + 1 >= running.num_epochs
        if self.queue.report(running.trial, result) and not is_last:
            running.is_stopped = True
            self.mailbox.request_stop_of(trial_id)

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Record how a trial ended, from its run folder; a lost one is left to `lose`."""
        if not error:
            running = self.running.pop(trial_id)
            self.finish(running, *self.outcome(running))

    def lose(self, trial_id: str, error: BaseException) -> None:
        """Queue a trial again whose process was lost, unless it was lost too often."""
        running = self.running.pop(trial_id)
        trial = running.trial
        losses = self.losses.setdefault(trial.number, Losses(self.config.train.max_restarts, running.folder.last))
        try:
            line = losses.add(explain_loss(error), go_on="--resume runs it again")
        except UserError as reason:
            self.finish(running, "failed", str(reason))
            return
        self.console.print(f"{trial.point}, seed {trial.seed}: {line}", highlight=False, soft_wrap=True)
        self.queue.to_retry.insert(0, trial)

    def fail(self, error: UserError) -> None:
        """End the study, for the first error."""
        self.error = self.error or error

    def outcome(self, running: RunningTrial) -> tuple[State, str | None]:
        """Return how a trial ended, and why."""
        try:
            pull(running.folder.path, skipped=LARGE)
            num_rows = len(running.folder.read_rows())
        except UserError as error:
            return "failed", str(error)
        if running.error is not None:
            return "failed", running.error
        if running.is_stopped:
            return "stopped", stop_reason(self.queue)
        if num_rows < running.num_epochs:
            return "failed", "it ended early"
        return "finished", None

    def finish(self, running: RunningTrial, state: State, reason: str | None) -> None:
        """Record the end of a trial, and print its line."""
        try:
            trial = self.queue.finish(running.trial, state, reason)
        except UserError as error:
            # Tune would take it for one of the trial
            self.fail(error)
            return
        seconds = time.monotonic() - running.started
        self.console.print(trial_line(self.queue, trial, seconds), highlight=False, soft_wrap=True)
