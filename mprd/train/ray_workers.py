"""One model on the workers of a Ray cluster, through TorchTrainer; the result is that of one process.

This process reads the settings, starts Ray, shows the progress and writes the table. The workers run
`mprd.train.local.train`; the first of them writes the run folder. When a worker is lost, Ray restarts all of them, and
they resume from the last checkpoint.
"""

from __future__ import annotations

import errno
import logging
import os
import threading
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback
from ray.train.torch import TorchTrainer, get_device

from mprd.config.loading import absolute
from mprd.errors import Interrupted, UserError
from mprd.parallel.cluster import cluster, find_address
from mprd.parallel.losses import Losses, explain_loss
from mprd.parallel.resources import Bundle, Waiting, choose_bundle, choose_threads, describe_machines, name_bundle
from mprd.parallel.shared_folder import check_shared, mark_shared
from mprd.parallel.shipping import other_versions, own_versions
from mprd.runtime.machine import num_cores
from mprd.storage import copies
from mprd.storage.copy import LARGE
from mprd.storage.places import place_of, shown
from mprd.text import explain, quoted
from mprd.train.mailbox import FLUSH_SECONDS, Mailbox
from mprd.train.notice import Notice
from mprd.train.signals import STEP_SECONDS, Signals, watch_signals

# other imports are local: Ray's controller process imports this file too
if TYPE_CHECKING:
    from rich.console import Console

    from mprd.config.schema import Config
    from mprd.runs.folder import RunFolder
    from mprd.runtime.distributed import WorkerGroup
    from mprd.train.signals import StopRequest

logger = logging.getLogger("mprd")

FINAL_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS)
"""Errors of the file system that a restart would not cure."""
POLL_SECONDS = 0.1


def run_on_ray(
    config: Config,
    folder: RunFolder,
    *,
    resume: bool,
    console: Console,
    num_workers: int = 1,
    address: str | None = None,
) -> list[dict[str, Any]]:
    """Train on several workers and write the table and the curves; return the rows of all epochs.

    Args:
        address: of a running cluster; by default the one that this job was submitted to, or else a new one on
            this machine that ends with the run.

    Raises UserError for errors caused by user input and for missing resources, Interrupted after a signal.
    """
    # not of `mprd.train.local`, which costs this process seconds of imports
    from mprd.runs.console import finish
    from mprd.runs.lock import held

    started = time.monotonic()
    place = find_address(address)
    check_run(config, folder, is_local=place.is_local, num_workers=num_workers, resume=resume)
    # a worker reserves the logical CPUs of its actors, which mostly wait
    num_cpus = 1 + config.num_actors
    with cluster(place, num_cpus=max(num_cores(), num_workers * num_cpus)) as own_files:
        bundle = choose_bundle(
            config.train.device,
            num_cpus=num_cpus,
            count=num_workers,
            what=f"--num-workers {num_workers}",
            remedy="give fewer, or --set train.device=cpu",
        )
        console.print(
            f"Ray: {name_workers(num_workers)} with {name_bundle(bundle)}{' each' if num_workers > 1 else ''}, on "
            f"{describe_machines()}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
        with held(folder.path):
            if not (resume and folder.has_start()):
                folder.create(config)
            # the workers go on with what is there
            copies.finish([folder.path])
            waiting = Waiting(name_workers(num_workers), bundle, num_workers)
            losses = Losses(config.train.max_restarts, folder.last)
            screen = Screen(console, started, losses, waiting, folder.path, num_epochs=config.train.epochs)
            mailbox = Mailbox()
            trainer = make_trainer(absolute(config), folder, bundle, num_workers, mailbox, own_files)
            with watch_signals(console) as signals, screen.lines:
                follow(Fit(trainer), mailbox, signals, screen)
            copies.pull(folder.path, skipped=LARGE)
            rows = folder.read_rows()
            finish(folder, rows, console)
    return rows


def check_run(config: Config, folder: RunFolder, *, is_local: bool, num_workers: int, resume: bool) -> None:
    """Raise UserError for what can be checked before Ray starts; a synthetic data set is drawn here, once."""
    from mprd.runs.dataset import open_dataset
    from mprd.runtime.device import choose_device
    from mprd.train.trackers import check_tracker

    if num_workers < 1:
        raise UserError(f"--num-workers must be at least 1, but got {num_workers}")
    if is_local:
        choose_device(config.train.device)
    if not resume:
        folder.check_is_free(config)
    check_tracker(config.train.tracker)
    open_dataset(config)


def make_trainer(
    config: Config, folder: RunFolder, bundle: Bundle, num_workers: int, mailbox: Mailbox, own_files: Path
) -> TorchTrainer:
    """Build the trainer; its own files go to a folder of this machine."""
    path = folder.path.resolve()
    return TorchTrainer(
        work,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            # by URL, as each machine has a cache of its own
            "folder": place_of(path),
            "mark": mark_shared(path),
            "mailbox": mailbox,
            "versions": own_versions(),
            "bundle": bundle,
            "num_workers": num_workers,
        },
        scaling_config=ScalingConfig(
            num_workers=num_workers, use_gpu="GPU" in bundle, resources_per_worker=dict(bundle)
        ),
        run_config=RunConfig(
            # a new name: under an old one Ray would restore its own record of that run
            name=f"{time.time_ns()}",
            storage_path=str(own_files),
            # `Losses` counts them
            failure_config=FailureConfig(
                max_failures=-1,
                controller_failure_limit=config.train.max_restarts,  # type: ignore[call-arg]
            ),
            # Ray's annotations are those of older releases
            callbacks=[PostedErrors(mailbox)],  # type: ignore[list-item]
        ),
    )


class PostedErrors(UserCallback):
    """Post why workers ended, from Ray's controller, which runs on the machine of the starting process."""

    def __init__(self, mailbox: Mailbox) -> None:
        self.mailbox = mailbox

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Post why, and wait until the starting process lets Ray start the workers again.

        Where it ends the run instead, this process ends with it here. Otherwise it would meanwhile reserve what new
        workers need, and Ray gives nothing back that is reserved after the end of a job.
        """
        self.post(list(worker_exceptions.values()))
        self.mailbox.wait_for_restart()

    def post(self, errors: list[Exception]) -> None:
        """Post errors of the user, which a restart would not cure, or else the loss of workers."""
        for error in errors:
            if isinstance(error, UserError) or (isinstance(error, OSError) and error.errno in FINAL_ERRORS):
                self.mailbox.post("failed", text=explain(error))
                return
        # what other workers raise follows from the loss
        lost = [e for e in errors if isinstance(e, RayError) or hasattr(e, "health_check_failure")]
        first = [*lost, *errors][0]
        trace = "".join(getattr(first, "__notes__", []))
        self.mailbox.post("lost", reason=explain_loss(first), trace=trace)


class Fit(threading.Thread):
    """Run a trainer beside the main thread, which has the screen and the signals."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True, name="ray-train")
        self.trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:  # raised again by the main thread
            self.error = error


def follow(fit: Fit, mailbox: Mailbox, signals: Signals, screen: Screen) -> None:
    """Show messages until the run ends; pass on a stop request, and end workers that do not follow it in time.

    Raises UserError and Interrupted of the workers, UserError where workers are not placed or were lost too often.
    """
    fit.start()
    is_over = is_stopping = False
    while not is_over:
        # only a call that follows the end brings all messages
        is_over = not fit.is_alive() and mailbox.taking is None
        if signals.stop and not is_stopping:
            is_stopping = True
            mailbox.request_stop()
        for message in mailbox.read(seconds=FLUSH_SECONDS if is_over else POLL_SECONDS):
            screen.show(**message)
            if message["kind"] == "lost":
                mailbox.allow_restart()
        # all is saved and sent: Ray needs seconds to end its workers in order
        if screen.stopped is not None:
            raise Interrupted(screen.stopped)
        if signals.stop and not (screen.is_running and time.monotonic() - signals.stopped_at < STEP_SECONDS):
            raise Interrupted(f"stopped; go on from the last checkpoint with --resume {quoted(screen.run)}")
        if not screen.is_running:
            screen.waiting.check()
        time.sleep(POLL_SECONDS)
    if fit.error is not None:
        raise explain_end(fit.error, screen)


def name_workers(count: int) -> str:
    return f"{count} workers" if count > 1 else "one worker"


def explain_end(error: BaseException, screen: Screen) -> BaseException:
    """Return one line for workers that could not start; an error of the code stays as it is."""
    if screen.is_running:
        return error
    return UserError(
        f"Ray could not start the workers ({explain_loss(error)}); go on with --resume {quoted(screen.run)}"
    )


class Screen:
    """Show the messages of the first worker as a run in this process would."""

    def __init__(
        self, console: Console, started: float, losses: Losses, waiting: Waiting, run: Path, *, num_epochs: int
    ) -> None:
        """Measure the start from `started`, in monotonic seconds."""
        from mprd.runs.console import EpochLines

        self.lines = EpochLines(console, num_epochs=num_epochs)
        self.console = console
        self.started = started
        self.losses = losses
        self.waiting = waiting
        self.run = run
        self.is_running = False
        self.stopped: str | None = None

    def show(self, kind: str, **fields: Any) -> None:
        """Show one message; raise UserError where it ends the run."""
        if kind == "started":
            self.show_start(**fields)
        elif kind == "step":
            self.lines.step(**fields)
        elif kind == "epoch":
            self.lines.epoch(fields["row"])
        elif kind == "log":
            logger.log(fields["level"], fields["text"])
        elif kind == "stopped":
            self.stopped = fields["text"]
        elif kind == "lost":
            self.show_loss(**fields)
        elif kind == "failed":
            raise UserError(fields["text"])

    def show_start(self, *, device: str, size: int, pid: int) -> None:
        """Print the seconds of the start."""
        self.is_running = True
        seconds = time.monotonic() - self.started
        self.console.print(
            f"Ray: {name_workers(size)} on {device}, started in {seconds:.1f} s (first: process {pid})", highlight=False
        )

    def show_loss(self, *, reason: str, trace: str) -> None:
        """Warn of lost workers, and measure the wait for others.

        Raises UserError where too many were lost, or RuntimeError with the traceback where they raised it.
        """
        self.is_running, self.started = False, time.monotonic()
        self.waiting.restart()
        try:
            line = self.losses.add(reason, go_on=f"go on with --resume {quoted(self.run)}")
        except UserError:
            if trace:
                raise RuntimeError(trace) from None
            raise
        logger.warning("a worker was %s", line)


def work(task: dict[str, Any]) -> None:
    """Train as one of the workers, from the last checkpoint where there is one."""
    from mprd.config.schema import Config
    from mprd.runs.folder import RunFolder
    from mprd.runtime.device import keep_freed_memory, set_threads
    from mprd.runtime.distributed import joined_workers

    folder = RunFolder(task["folder"])
    check_shared(folder.path, task["mark"])
    config = Config.model_validate(task["config"])
    set_threads(*choose_threads(config, task["bundle"], most=task["num_workers"]))
    keep_freed_memory()
    mailbox, workers = task["mailbox"], joined_workers(get_device())
    notice = Notice(mailbox)
    if differing := other_versions(task["versions"]):
        mailbox.post("log", level=logging.WARNING, text=differing)
    try:
        with copies.sent([folder.path] if workers.is_first else []):
            train_shard(config, folder, mailbox, workers, notice)
    except Interrupted as stop:
        # behind the first worker, which has saved and sent
        is_taken = workers.any(notice.is_given)
        if notice.is_given:
            raise notice.error() from None
        if workers.is_first and not is_taken:
            mailbox.post("stopped", text=str(stop))
    except UserError as error:
        # of this machine are the paths of working copies
        raise UserError(shown(str(error))) from None
    except Exception as error:
        # Ray sends the error without its traceback
        error.add_note(traceback.format_exc())
        raise
    finally:
        mailbox.flush()


def train_shard(config: Config, folder: RunFolder, mailbox: Mailbox, workers: WorkerGroup, stop: StopRequest) -> None:
    """Train this worker's shard of every batch; the first worker writes the run folder."""
    from mprd.runs.dataset import open_dataset
    from mprd.train.local import train
    from mprd.train.mailbox import PostedLines, PostedLog
    from mprd.train.recorder import Recorder

    if workers.is_first:
        # Ray's own default is WARNING
        logger.setLevel(logging.INFO)
        logger.addHandler(PostedLog(mailbox))
        # a second that a stop after the first epoch, which is drawn, would wait for
        import matplotlib.figure  # noqa: F401

        copies.take_over(folder.path)
    # the others fetch what the first has sent
    workers.any(workers.is_first)
    if not workers.is_first:
        copies.pull(folder.path, keeps_unsent=False)
    dataset = open_dataset(config)
    resume = workers.any(folder.last.is_file())
    if workers.is_first:
        mailbox.post("started", device=workers.device.type, size=workers.size, pid=os.getpid())
        mailbox.listen()
    recorder = Recorder(config, folder, stop=stop, lines=PostedLines(mailbox), workers=workers)
    callbacks = recorder.callbacks()
    device = workers.device
    train(config, dataset, folder, callbacks, device=device, recorder=recorder, resume=resume, workers=workers)
