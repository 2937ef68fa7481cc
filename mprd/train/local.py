"""Train in this process: data, run folder, signals, progress, checkpoints.

`run_local` is a whole run; `train` is the part of each worker of a larger run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from typing import Any

import torch
from rich.console import Console

from mprd.config.schema import Config
from mprd.data.datasets import ReidDataset
from mprd.engine.callbacks import Callbacks, ignore
from mprd.engine.trainer import Trainer, fit
from mprd.errors import Interrupted, UserError
from mprd.parallel.backends import choose_builder
from mprd.runs.console import EpochLines, finish
from mprd.runs.dataset import open_dataset
from mprd.runs.folder import RunFolder, write_text
from mprd.runs.lock import held
from mprd.runtime import checkpoint
from mprd.runtime.device import choose_device, keep_freed_memory, set_threads
from mprd.runtime.distributed import WorkerGroup
from mprd.runtime.machine import CpuThreads
from mprd.text import quoted
from mprd.train.profiler import Profile
from mprd.train.recorder import Recorder
from mprd.train.signals import StopRequest, watch_signals
from mprd.train.trackers import check_tracker


def run_local(
    config: Config,
    folder: RunFolder,
    *,
    resume: bool,
    console: Console,
    on_row: Callable[[dict[str, Any]], None] = ignore,
    profiled: bool = False,
    threads: CpuThreads | None = None,
    stop: StopRequest | None = None,
) -> list[dict[str, Any]]:
    """Train to the last epoch and write the table and the curves; return the rows of all epochs.

    Args:
        on_row: called with each epoch's row once it is written; what it raises ends the run.
        profiled: also write and print the seconds of each part, and keep a trace of a few steps.
        threads: of this process, where others share the machine.
        stop: a request to stop, in place of signals.

    Raises UserError for errors caused by user input, Interrupted after a stop (the state is saved).
    """
    set_threads(*(threads or CpuThreads(config.train.threads)))
    keep_freed_memory()
    device = choose_device(config.train.device)
    check_tracker(config.train.tracker)
    if not resume:
        folder.check_is_free(config)
    dataset = open_dataset(config)
    profile = Profile(device, folder.path / "trace.json") if profiled else None
    with held(folder.path):
        resume = resume and folder.has_start()
        if not resume:
            folder.create(config)
        with (
            watch_signals(console, is_limited=True) if stop is None else nullcontext(stop) as requested,
            EpochLines(console, num_epochs=config.train.epochs) as lines,
            nullcontext() if profile is None else profile.listening(),
        ):
            recorder = Recorder(config, folder, stop=requested, lines=lines, on_row=on_row)
            callbacks = recorder.callbacks() if profile is None else profile.traced(recorder.callbacks())
            try:
                train(config, dataset, folder, callbacks, device=device, recorder=recorder, resume=resume)
            except KeyboardInterrupt:
                raise Interrupted(f"stopped at once; go on with --resume {quoted(folder.path)}") from None
        finish(folder, recorder.rows, console)
        if profile is not None:
            write_text(folder.path / "profile.txt", profile.table())
            console.print(profile.table(), highlight=False)
    return recorder.rows


def train(
    config: Config,
    dataset: ReidDataset,
    folder: RunFolder,
    callbacks: Callbacks,
    *,
    device: torch.device,
    recorder: Recorder,
    resume: bool,
    workers: WorkerGroup | None = None,
) -> None:
    """Train to the last epoch, from the last checkpoint when resuming.

    Raises UserError where an accelerator's memory is too small, naming the settings that help.
    """
    with explained_memory(config), closing(recorder):
        trainer = Trainer(
            config,
            dataset,
            device=device,
            callbacks=callbacks,
            build_subgraphs=choose_builder(config.subgraphs, num_workers=1 if workers is None else workers.size),
            workers=workers,
        )
        if resume:
            trainer.load_state_dict(checkpoint.load(folder.last), path=folder.last)
            recorder.forget_from(trainer.state.epoch)
        else:
            trainer.fill_memory()
            recorder.begin(trainer)
        fit(trainer)


@contextmanager
def explained_memory(config: Config) -> Iterator[None]:
    """Turn an accelerator's out-of-memory error into one line with the settings that help."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        c = config
        raise UserError(
            f"out of memory on the accelerator ({str(error).splitlines()[0].split('. ')[0]}); what helps: "
            f"train.batch_size (now {c.train.batch_size}), data.height and data.width ({c.data.height}, "
            f"{c.data.width}), backbone.name ({c.backbone.name}), backbone.last_stride=2, eval.batch_size "
            f"({c.eval.batch_size}), gcn.batch_size ({c.gcn.batch_size}), neighbors.k_max ({c.neighbors.k_max}), "
            "or more workers"
        ) from None
