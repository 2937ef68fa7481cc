"""Training on two CPU workers over training on one: seconds of an epoch, GCN and CNN together.

The demo as it is, but without warm-up; a worker has one thread. The first epoch of each training, which packs the
images, does not count, and one worker and two take turns, so that a machine that gets slower slows both. Needs two
quiet cores.
Bar: at most 1.0.
"""

from __future__ import annotations

import argparse
import socket
import statistics
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from common import report

from mprd.config.loading import load_config
from mprd.config.schema import Config
from mprd.engine.callbacks import Callbacks
from mprd.engine.trainer import Trainer, fit
from mprd.runs.dataset import open_dataset
from mprd.runtime.distributed import joined_workers

SETTINGS = ("train.warmup_epochs=0", "data.num_workers=0")


def train(rank: int, num_workers: int, port: int, config: Config, folder: Path) -> None:
    """Train as worker `rank`; the first leaves the seconds of each epoch in a file."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=num_workers)
    seconds: list[float] = []

    def after_epoch(trainer: Trainer) -> None:
        sums = trainer.stats.sums
        seconds.append(sums["gcn_seconds"] + sums["cnn_seconds"])

    dataset = open_dataset(config)
    device = torch.device("cpu")
    trainer = Trainer(
        config, dataset, device=device, callbacks=Callbacks(after_epoch=after_epoch), workers=joined_workers(device)
    )
    trainer.fill_memory()
    fit(trainer)
    if rank == 0:
        torch.save(seconds, folder / f"{num_workers}.pt")
    dist.destroy_process_group()


def epoch_seconds(num_workers: int, config: Config, folder: Path) -> list[float]:
    """Train on so many workers; return the seconds of each epoch but the first."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    processes.spawn(train, args=(num_workers, port, config, folder), nprocs=num_workers)
    return torch.load(folder / f"{num_workers}.pt")[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one round of two epochs")
    parser.add_argument("--set", nargs="*", default=[], help="settings on top of the demo's")
    args = parser.parse_args()
    rounds, epochs = (1, 2) if args.quick else (3, 4)
    config = load_config("demo", overrides=(*SETTINGS, f"train.epochs={epochs}", *args.set))
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        open_dataset(config)
        for _ in range(rounds):
            for num_workers, found in seconds.items():
                found += epoch_seconds(num_workers, config, Path(folder))
    one, two = (statistics.median(found) for found in seconds.values())
    report(
        benchmark="workers",
        ratio=two / one,
        bar=1.0,
        ratio_is="seconds of an epoch on two CPU workers over one",
        one_s=one,
        two_s=two,
        epochs_timed=len(seconds[1]),
        settings=args.set,
        quick=args.quick,
    )


if __name__ == "__main__":
    main()
