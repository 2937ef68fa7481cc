"""One model on the workers of a Ray cluster, through TorchTrainer; the result is that of one process.

This process reads the settings, starts Ray, shows the progress and writes the table. The workers run the loop
as `mprd.train.local.train` does here; the first of them writes the run folder. A lost worker makes Ray start all of
them again, and they go on from the run folder's last checkpoint.
"""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer, get_device

from mprd.config.loading import absolute
from mprd.errors import Interrupted, UserError

# imported where they are used: Ray's controller process reads this file too, and has no need of torch
if TYPE_CHECKING:
    from ray.train import UserCallback
    from rich.console import Console

    from mprd.config.schema import Config
    from mprd.runs.console import EpochLines
    from mprd.runs.folder import RunFolder
    from mprd.runtime.device import CpuThreads
    from mprd.train.local import Signals
    from mprd.train.mailbox import Mailbox

logger = logging.getLogger("mprd")

MAX_FAILURES = 3
"""Times that lost workers are replaced."""
POLL_SECONDS = 0.1
QUIET = {
    # the workers' end, or death, is noticed within this time
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    # machines that an autoscaler brings take minutes to start and more to install
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "1800",
    # relative paths in the settings mean what they mean here
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def run_on_ray(
    config: Config,
    folder: RunFolder,
    *,
    resume: bool,
    console: Console,
    num_workers: int = 1,
    address: str | None = None,
) -> list[dict[str, Any]]:
    """Train on so many workers and write the table and the curves; return the rows of all epochs.

    Args:
        address: of a running cluster; by default the one that this job was submitted to, or else a new one on
            this machine alone, for as long as the run takes.

    Raises UserError for the person's mistakes and resources too few, Interrupted when a signal asked to stop.
    """
    from mprd.parallel.backends import count_actors
    from mprd.runs.console import EpochLines
    from mprd.runs.dataset import open_dataset
    from mprd.runs.lock import held
    from mprd.runtime.device import choose_device, num_cores
    from mprd.train.local import finish, watch_signals
    from mprd.train.mailbox import Mailbox
    from mprd.train.trackers import check_tracker

    started = time.monotonic()
    address = address or os.environ.get("RAY_ADDRESS", "local")
    if address == "local":
        choose_device(config.train.device)
    if not resume:
        folder.check_is_free()
    check_tracker(config.train.tracker)
    # mistakes in the data are told before anything starts, and a synthetic set is drawn once
    open_dataset(config, folder)
    board = Mailbox(folder.path.resolve())
    num_actors = count_actors(config)
    # actors that build or search beside a worker are logical CPUs of their own: they mostly wait
    with cluster(address, num_cpus=num_cores() + num_workers * num_actors):
        scaling = choose_scaling(config.train.device, num_workers, find_resources(), num_actors=num_actors)
        if scaling.use_gpu and ray.cluster_resources().get("GPU", 0) < num_workers:
            logger.info("waiting for the cluster to bring up GPUs for %d workers", num_workers)
        if not resume:
            folder.create(config)
        with held(folder.path):
            trainer = make_trainer(absolute(config), folder, scaling, threads=choose_threads(config, num_workers))
            board.open()
            try:
                with watch_signals(console) as signals, EpochLines(console, num_epochs=config.train.epochs) as lines:
                    watch(Fit(trainer), board, signals, lines, console, started)
            finally:
                board.close()
            rows = folder.read_rows()
            finish(folder, rows, console)
    return rows


@contextmanager
def cluster(address: str, *, num_cpus: int) -> Iterator[None]:
    """Be part of a cluster for as long as the block runs; one started here has so many logical CPUs."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for name in ("ray", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"include_dashboard": False, "num_cpus": num_cpus}
    check_address(address)
    try:
        ray.init(address=address, **options)
    except ConnectionError as error:
        reason = str(error).splitlines()[0]
        # the error does not tell that a cluster turned us away
        hint = "" if os.environ.get("RAY_AUTH_MODE") else "; one with a token wants RAY_AUTH_MODE=token here as well"
        raise UserError(f"--address {address}: no Ray cluster answers there ({reason}){hint}") from None
    try:
        yield
    finally:
        ray.shutdown()


def check_address(address: str) -> None:
    """Refuse an address at which nothing listens: Ray would try it for minutes, and end the process."""
    host, _, port = address.rpartition(":")
    if "://" in address or not port.isdigit():
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(f"--address {address}: nothing listens there ({error.strerror or error})") from None


def find_resources() -> dict[str, float]:
    """Count what the cluster has, or what its autoscaler may bring: from zero, GPUs come when they are asked for."""
    from ray._private.state import state

    # where Ray Train itself looks; None without an autoscaler that tells
    most = state.get_max_resources_from_cluster_config() or {}
    here = ray.cluster_resources()
    return {name: max(here.get(name, 0), most.get(name, 0)) for name in {*here, *most}}


def choose_scaling(device: str, num_workers: int, resources: dict[str, float], *, num_actors: int = 0) -> ScalingConfig:
    """Give each worker one CPU, and one GPU where there are any and the settings do not say `cpu`.

    Args:
        num_actors: logical CPUs that each worker must find free beside its own.

    Raises UserError with the number to ask for where the cluster has too few: Ray would wait for them for ever.
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
    """Divide the threads that torch would take here among the workers; Ray would give each of them one."""
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
    """Build the trainer; what it keeps itself goes below `ray/` in the run folder.

    Args:
        callbacks: given, the workers report each epoch's row to them.
    """
    path = folder.path.resolve()
    task = {
        "config": config.model_dump_json(),
        "folder": str(path),
        "threads": threads,
        "report_rows": bool(callbacks),
    }
    return TorchTrainer(
        work,
        train_loop_config=task,
        scaling_config=scaling,
        run_config=RunConfig(
            # a name of its own: under an old one Ray would go on with what it remembers of that run
            name=f"{time.time_ns()}",
            storage_path=str(path / "ray"),
            failure_config=FailureConfig(max_failures=MAX_FAILURES),
            # Ray's annotation names the callbacks of its older releases
            callbacks=list(callbacks) or None,  # type: ignore[arg-type]
        ),
    )


class Fit(threading.Thread):
    """Run a trainer beside the main thread, which keeps the screen and the signals."""

    def __init__(self, trainer: TorchTrainer) -> None:
        super().__init__(daemon=True, name="ray-train")
        self.trainer = trainer
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.trainer.fit()
        except BaseException as error:  # handed to the main thread
            self.error = error


def watch(fit: Fit, board: Mailbox, signals: Signals, lines: EpochLines, console: Console, started: float) -> None:
    """Show what the first worker posts until the run ends; pass on a wish to stop.

    Raises UserError and Interrupted for what the workers met, and Ray's error where they were lost too often.
    """
    fit.start()
    screen = Screen(lines, console, started)
    is_over = False
    while not is_over:
        is_over = not fit.is_alive()
        if signals.stop and not board.stop:
            board.ask_to_stop()
        for notice in board.read():
            screen.show(notice)
        if board.error is not None:
            raise UserError(board.error)
        time.sleep(POLL_SECONDS)
    if fit.error is not None:
        raise fit.error
    if screen.stopped is not None:
        raise Interrupted(screen.stopped)


class Screen:
    """Show notices as a run in this process would show itself."""

    def __init__(self, lines: EpochLines, console: Console, started: float) -> None:
        self.lines = lines
        self.console = console
        self.started = started
        self.num_starts = 0
        self.stopped: str | None = None

    def show(self, notice: dict[str, Any]) -> None:
        """Show one."""
        kind = notice.pop("kind")
        if kind == "started":
            self.show_start(**notice)
        elif kind == "step":
            self.lines.step(**notice)
        elif kind == "epoch":
            self.lines.epoch(notice["row"])
        elif kind == "log":
            logger.log(notice["level"], notice["text"])
        elif kind == "stopped":
            self.stopped = notice["text"]

    def show_start(self, *, device: str, size: int, pid: int) -> None:
        """Say how long the start took, or that there was another."""
        self.num_starts += 1
        if self.num_starts > 1:
            logger.warning(
                "a worker was lost; going on from the last checkpoint (%d of %d times)",
                self.num_starts - 1,
                MAX_FAILURES,
            )
            return
        seconds = time.monotonic() - self.started
        who = f"{size} workers" if size > 1 else "one worker"
        self.console.print(
            f"Ray: {who} on {device}, started in {seconds:.1f} s (first: process {pid})", highlight=False
        )


def work(task: dict[str, Any]) -> None:
    """Train as one of the workers, from the last checkpoint where there is one.

    A mistake of the person's ends the run for good: it is written on the board, and a worker that Ray starts
    again finds it there.
    """
    from mprd.config.schema import Config
    from mprd.engine.trainer import ignore
    from mprd.runs.folder import RunFolder
    from mprd.runtime.device import keep_freed_memory, set_threads
    from mprd.runtime.distributed import joined_workers
    from mprd.train.mailbox import Mailbox

    folder = RunFolder(Path(task["folder"]))
    board = Mailbox(folder.path)
    if board.error is not None:
        return
    set_threads(*task["threads"])
    keep_freed_memory()
    workers = joined_workers(get_device())
    try:
        config = Config.model_validate_json(task["config"])
        train_share(config, folder, board, workers, on_row=report_row if task["report_rows"] else ignore)
    except Interrupted as stop:
        if workers.is_first:
            board.post("stopped", text=str(stop))
    except UserError as error:
        board.fail(str(error))
        # the other workers wait for this one: only its end frees them
        raise


def report_row(row: dict[str, Any]) -> None:
    """Report an epoch's row to Ray; all workers must, though the first one's counts."""
    ray.train.report({key: value for key, value in row.items() if value is not None})


def train_share(
    config: Config, folder: RunFolder, board: Mailbox, workers: Any, *, on_row: Callable[[dict[str, Any]], None]
) -> None:
    """Train this worker's share of every batch; the first worker records."""
    from mprd.runs.dataset import open_dataset
    from mprd.train.local import Follower, Recorder, train
    from mprd.train.mailbox import PostedLines, PostedLog

    dataset = open_dataset(config, folder)
    resume = workers.any(folder.last.is_file())
    recorder: Recorder | Follower = Follower(config, workers, on_row=on_row)
    if workers.is_first:
        logger.addHandler(PostedLog(board))
        board.post("started", device=workers.device.type, size=workers.size, pid=os.getpid())
        recorder = Recorder(config, folder, signals=board, lines=PostedLines(board), workers=workers, on_row=on_row)
    train(config, dataset, folder, device=workers.device, recorder=recorder, resume=resume, workers=workers)
