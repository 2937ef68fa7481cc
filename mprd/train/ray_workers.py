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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from mprd.config.loading import absolute
from mprd.errors import Interrupted, UserError
from mprd.parallel.cluster import Waiting, cluster, find_address, find_resources
from mprd.text import explain

# other imports are local: Ray's controller process imports this file too, and needs no torch
if TYPE_CHECKING:
    from ray.train import UserCallback
    from rich.console import Console

    from mprd.config.schema import Config
    from mprd.runs.console import EpochLines
    from mprd.runs.folder import RunFolder
    from mprd.runtime.device import CpuThreads
    from mprd.runtime.distributed import WorkerGroup
    from mprd.train.mailbox import Mailbox
    from mprd.train.signals import Signals

logger = logging.getLogger("mprd")

MAX_FAILURES = 3
"""Restarts after lost workers."""
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
    from mprd.parallel.backends import count_actors
    from mprd.runs.lock import held
    from mprd.runtime.device import num_cores
    from mprd.train.local import finish

    started = time.monotonic()
    place = find_address(address)
    check_run(config, folder, is_local=place.is_local, resume=resume)
    num_actors = count_actors(config)
    # actors beside a worker are logical CPUs of their own: they mostly wait
    with cluster(place, num_cpus=num_cores() + num_workers * num_actors):
        scaling = choose_scaling(config.train.device, num_workers, find_resources(), num_actors=num_actors)
        num_gpus = num_workers if scaling.use_gpu else 0
        with held(folder.path):
            if not (resume and folder.has_start()):
                folder.create(config)
            trainer = make_trainer(absolute(config), folder, scaling, threads=choose_threads(config, num_workers))
            waiting = Waiting(name_workers(num_workers), CPU=num_workers * (1 + num_actors), GPU=num_gpus)
            run_trainer(trainer, folder, console, num_epochs=config.train.epochs, started=started, waiting=waiting)
            rows = folder.read_rows()
            finish(folder, rows, console)
    return rows


def check_run(config: Config, folder: RunFolder, *, is_local: bool, resume: bool) -> None:
    """Raise UserError for what can be checked before Ray starts; a synthetic data set is drawn here, once."""
    from mprd.runs.dataset import open_dataset
    from mprd.runtime.device import choose_device
    from mprd.train.trackers import check_tracker

    if is_local:
        choose_device(config.train.device)
    if not resume:
        folder.check_is_free(config)
    check_tracker(config.train.tracker)
    open_dataset(config)


def choose_scaling(device: str, num_workers: int, resources: dict[str, float], *, num_actors: int = 0) -> ScalingConfig:
    """Give each worker one CPU, and one GPU where there are any, unless `device` is `cpu`.

    Args:
        num_actors: further logical CPUs that each worker needs.

    Raises UserError with the largest number that fits where the cluster is too small: Ray would wait for ever.
    """
    if num_workers < 1:
        raise UserError(f"--num-workers must be at least 1, but got {num_workers}")
    if device.startswith("cuda:"):
        raise UserError(
            f"train.device: Ray chooses each worker's GPU, so give cuda and not {device} (CUDA_VISIBLE_DEVICES limits "
            "the choice)"
        )
    num_gpus, num_cpus = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
    use_gpu = device == "cuda" or (device == "auto" and num_gpus > 0)
    if use_gpu and num_workers > num_gpus:
        raise UserError(
            f"--num-workers {num_workers} needs {num_workers} GPUs, but Ray has {num_gpus}: ask for "
            f"--num-workers {max(1, num_gpus)}, or --set train.device=cpu"
        )
    needed = num_workers * (1 + num_actors)
    if needed > num_cpus:
        beside = f" with {num_actors} actors each" if num_actors else ""
        raise UserError(
            f"--num-workers {num_workers}{beside} needs {needed} logical CPUs, but Ray has {num_cpus}: ask for "
            f"--num-workers {max(1, num_cpus // (1 + num_actors))}, or start Ray with --num-cpus {needed} and give "
            "its --address"
        )
    return ScalingConfig(num_workers=num_workers, use_gpu=use_gpu)


def choose_threads(config: Config, num_workers: int) -> CpuThreads:
    """Divide the threads that torch would use here among the workers; Ray's default is one each."""
    from mprd.runtime.device import CpuThreads, default_threads, num_cores

    threads = config.train.threads or max(1, default_threads() // num_workers)
    return CpuThreads(threads, max(threads, num_cores() // num_workers))


def make_trainer(
    config: Config,
    folder: RunFolder,
    scaling: ScalingConfig,
    *,
    threads: CpuThreads,
    callbacks: Sequence[UserCallback] = (),
) -> TorchTrainer:
    """Build the trainer; its own files go below `ray/` in the run folder.

    Args:
        callbacks: the workers report each epoch's row to them.
    """
    path = folder.path.resolve()
    task = {
        "config": config.model_dump(mode="json"),
        "folder": str(path),
        "threads": threads,
        "report_rows": bool(callbacks),
    }
    return TorchTrainer(
        work,
        train_loop_config=task,
        scaling_config=scaling,
        run_config=RunConfig(
            # a new name: under an old one Ray would restore its own record of that run
            name=f"{time.time_ns()}",
            storage_path=str(path / "ray"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            # Ray's annotation is of the callbacks of older releases
            callbacks=list(callbacks) or None,  # type: ignore[arg-type]
        ),
    )


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


def run_trainer(
    trainer: TorchTrainer,
    folder: RunFolder,
    console: Console,
    *,
    num_epochs: int,
    started: float,
    waiting: Waiting,
) -> None:
    """Run a trainer to its end, show its messages, and pass on a stop request.

    Raises UserError and Interrupted of the workers, UserError where workers are not placed or were lost too often.
    """
    from mprd.runs.console import EpochLines
    from mprd.train.mailbox import Mailbox
    from mprd.train.signals import watch_signals

    mailbox = Mailbox(folder.path.resolve())
    mailbox.open()
    try:
        with watch_signals(console) as signals, EpochLines(console, num_epochs=num_epochs) as lines:
            follow(Fit(trainer), mailbox, signals, Screen(lines, console, started), waiting)
    finally:
        mailbox.close()


def follow(fit: Fit, mailbox: Mailbox, signals: Signals, screen: Screen, waiting: Waiting) -> None:
    """Show messages until the run ends; pass on a stop request, or stop at once while no worker has started."""
    fit.start()
    is_over = False
    while not is_over:
        is_over = not fit.is_alive()
        if signals.stop and not mailbox.stop:
            mailbox.request_stop()
        for message in mailbox.read():
            screen.show(message)
        if mailbox.error is not None:
            raise UserError(mailbox.error)
        if not screen.num_starts:
            if signals.stop:
                raise Interrupted("stopped before a worker had started; the same command, or --resume, starts again")
            waiting.check()
        time.sleep(POLL_SECONDS)
    if fit.error is not None:
        raise explain_end(fit.error, screen)
    if screen.stopped is not None:
        raise Interrupted(screen.stopped)


def name_workers(count: int) -> str:
    return f"{count} workers" if count > 1 else "one worker"


def explain_end(error: BaseException, screen: Screen) -> BaseException:
    """Return one line for workers that could not start or were lost; an error of the code stays as it is."""
    failures = getattr(error, "worker_failures", {}).values()
    lines = [line.strip() for line in str([*failures, error][0]).splitlines() if line.strip()]
    if not screen.num_starts:
        return UserError(f"Ray could not start the workers ({lines[-1][:300]})")
    if failures and all(isinstance(failure, RayError) for failure in failures):
        return UserError(f"workers were lost more than {MAX_FAILURES} times ({lines[0][:300]}); go on with --resume")
    return error


class Screen:
    """Show the messages of the first worker as a run in this process would."""

    def __init__(self, lines: EpochLines, console: Console, started: float) -> None:
        """Measure the start from `started`, in monotonic seconds."""
        self.lines = lines
        self.console = console
        self.started = started
        self.num_starts = 0
        self.stopped: str | None = None

    def show(self, message: dict[str, Any]) -> None:
        """Show one message."""
        kind = message.pop("kind")
        if kind == "started":
            self.show_start(**message)
        elif kind == "step":
            self.lines.step(**message)
        elif kind == "epoch":
            self.lines.epoch(message["row"])
        elif kind == "log":
            logger.log(message["level"], message["text"])
        elif kind == "stopped":
            self.stopped = message["text"]

    def show_start(self, *, device: str, size: int, pid: int) -> None:
        """Print the seconds of the start, or warn of a restart."""
        self.num_starts += 1
        if self.num_starts > 1:
            logger.warning(
                "a worker was lost; going on from the last checkpoint (%d of %d times)",
                self.num_starts - 1,
                MAX_FAILURES,
            )
            return
        seconds = time.monotonic() - self.started
        self.console.print(
            f"Ray: {name_workers(size)} on {device}, started in {seconds:.1f} s (first: process {pid})", highlight=False
        )


def work(task: dict[str, Any]) -> None:
    """Train as one of the workers, from the last checkpoint where there is one.

    An error caused by user input ends the run for good: a restarted worker finds it in the mailbox.
    """
    from mprd.config.schema import Config
    from mprd.engine.callbacks import ignore
    from mprd.runs.folder import RunFolder
    from mprd.runtime.device import keep_freed_memory, set_threads
    from mprd.runtime.distributed import joined_workers
    from mprd.train.mailbox import Mailbox

    folder = RunFolder(Path(task["folder"]))
    mailbox = Mailbox(folder.path)
    if mailbox.error is not None:
        return
    set_threads(*task["threads"])
    keep_freed_memory()
    workers = joined_workers(get_device())
    try:
        config = Config.model_validate(task["config"])
        train_shard(config, folder, mailbox, workers, on_row=report_row if task["report_rows"] else ignore)
    except Interrupted as stop:
        if workers.is_first:
            mailbox.post("stopped", text=str(stop))
    except (UserError, OSError) as error:
        if isinstance(error, UserError) or error.errno in FINAL_ERRORS:
            mailbox.fail(explain(error))
        # the other workers wait for this one until it ends
        raise


def report_row(row: dict[str, Any]) -> None:
    """Report an epoch's row to Ray; all workers must, and the first one's counts."""
    ray.train.report({key: value for key, value in row.items() if value is not None})


def train_shard(
    config: Config,
    folder: RunFolder,
    mailbox: Mailbox,
    workers: WorkerGroup,
    *,
    on_row: Callable[[dict[str, Any]], None],
) -> None:
    """Train this worker's shard of every batch; the first worker writes the run folder."""
    from mprd.runs.dataset import open_dataset
    from mprd.train.local import train
    from mprd.train.mailbox import PostedLines, PostedLog
    from mprd.train.recorder import Recorder
    from mprd.train.signals import NoStop

    dataset = open_dataset(config)
    resume = workers.any(folder.last.is_file())
    if workers.is_first:
        # Ray's own default is WARNING
        logger.setLevel(logging.INFO)
        logger.addHandler(PostedLog(mailbox))
        mailbox.post("started", device=workers.device.type, size=workers.size, pid=os.getpid())
    stop = mailbox if workers.is_first else NoStop()
    recorder = Recorder(config, folder, stop=stop, lines=PostedLines(mailbox), workers=workers, on_row=on_row)
    callbacks = recorder.callbacks()
    device = workers.device
    train(config, dataset, folder, callbacks, device=device, recorder=recorder, resume=resume, workers=workers)
