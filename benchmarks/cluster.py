"""What Ray costs on this machine: an epoch, the start, a study, memory, stops, and a worker that is killed.

A part runs training commands in processes of their own, on drawn pedestrians, and prints each figure with its bar and
whether it holds; a miss ends nothing. A figure is the median of its repeats. Needs two quiet cores: `cores` and `load`
are in the result.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import ray
import yaml
from commands import Command, peak_gb
from common import report
from ray.cluster_utils import Cluster

from mprd.config.schema import Config

TINY = ("data.synthetic.num_train_ids=24", "data.synthetic.num_test_ids=12", "data.synthetic.num_cameras=3")
TINY += ("data.synthetic.images_per_camera=2", "data.height=32", "data.width=16", "backbone.num_stripes=1")
ONE_PROCESS = ("train.warmup_epochs=0", "data.num_workers=0", "train.threads=1")
SMALL = (*TINY, *ONE_PROCESS, "neighbors.k=4")
LONG = (*SMALL, "train.epochs=1000")
EACH_STEP = (*LONG, "train.checkpoint_seconds=0.001")
EMPTY_TRAINER = """
import sys, tempfile
from pathlib import Path
import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
def work(config):
    Path(config["mark"]).touch()
ray.init(address=sys.argv[1], log_to_driver=False)
run = RunConfig(storage_path=tempfile.mkdtemp(dir=Path(sys.argv[2]).parent))
TorchTrainer(work, train_loop_config={"mark": sys.argv[2]}, scaling_config=ScalingConfig(), run_config=run).fit()
"""
LONG_STEP = (*ONE_PROCESS, "backbone.name=resnet18", "data.height=256", "data.width=128", "train.batch_size=64")


def measure_epoch(folder: Path, args: argparse.Namespace) -> Iterator[tuple]:
    """Compare epochs of the demo but the first, which packs the images; the launchers take turns."""
    seconds: dict[str, list[float]] = {"local": [], "ray": []}
    sets = (*ONE_PROCESS, f"train.epochs={2 if args.quick else 4}")
    for _ in range(args.repeats):
        for launcher, found in seconds.items():
            command = Command(folder, "train", "--launcher", launcher, sets=sets)
            command.end()
            rows = [json.loads(line) for line in (command.out / "metrics.jsonl").read_text().splitlines()]
            found += [row["gcn_seconds"] + row["cnn_seconds"] for row in rows[1:]]
    local, on_ray = (statistics.median(found) for found in seconds.values())
    yield "epoch by Ray over local", on_ray / local, 1.03, {"local_s": local, "ray_s": on_ray}


def measure_start(folder: Path, args: argparse.Namespace) -> Iterator[tuple]:
    """Measure from the command to the first step, on a running cluster and without Ray; beside a trainer of no work."""
    with running_cluster() as address:
        seconds: dict[str, list[float]] = {"local": [], "ray": [], "empty": []}
        for _ in range(args.repeats):
            for launcher in ("local", "ray"):
                where = ("--address", address) if launcher == "ray" else ()
                command = Command(folder, "train", "--launcher", launcher, *where, sets=EACH_STEP)
                seconds[launcher].append(command.wait_for(Command.has_stepped))
                command.stop()
            seconds["empty"].append(start_empty_trainer(folder, address))
    local, on_ray, empty = (statistics.median(found) for found in seconds.values())
    figures = {"local_s": local, "empty_trainer_s": empty}
    yield "seconds from command to first step on a cluster", on_ray, 10, figures


def start_empty_trainer(folder: Path, address: str) -> float:
    """Return the seconds from the start of a program to the first line of the only worker of its TorchTrainer."""
    mark = folder / "mark"
    started = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", EMPTY_TRAINER, address, str(mark)], stderr=subprocess.PIPE) as process:
        while not mark.exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        seconds = time.monotonic() - started
        process.communicate()
    mark.unlink()
    return seconds


def measure_study(folder: Path, args: argparse.Namespace) -> Iterator[tuple]:
    """Compare a study of one-epoch trials, one at a time, by Ray and in a loop; from command to end."""
    num_trials = 4 if args.quick else 50
    sets = (*(SMALL if args.quick else ONE_PROCESS), "train.epochs=1")
    write_study(folder, num_trials)
    loop = Command(folder, "tune", "--study", "cost", "--launcher", "local", sets=sets).end()
    on_ray = Command(folder, "tune", "--study", "cost", "--launcher", "ray", "--concurrency", "1", sets=sets).end()
    figures = {"trials": num_trials, "loop_s": loop, "ray_s": on_ray}
    yield "study by Ray over the same trials in a loop", on_ray / loop, 1.1, figures


def measure_memory(folder: Path, args: argparse.Namespace) -> Iterator[tuple]:
    """Compare the proportional set sizes of all processes of a study, and of its training alone."""
    write_study(folder, 2)
    sets = (*SMALL, "train.epochs=4")
    alone = peak_gb(Command(folder, "train", "--launcher", "local", sets=sets))
    study = ("--study", "cost", "--launcher", "ray", "--concurrency")
    one, two = (peak_gb(Command(folder, "tune", *study, number, sets=sets)) for number in ("1", "2"))
    figures = {"training_gb": alone, "study_gb": one, "study_of_two_gb": two}
    yield "GB beyond the training, one trial at a time", one - alone, 0.6, figures
    yield "GB a trial beyond the training, two side by side", two / 2 - alone, 0.6, figures


def measure_stop(folder: Path, args: argparse.Namespace) -> Iterator[tuple]:
    """Measure from SIGTERM to the end of the process, in each state."""
    write_study(folder, 4)
    tune = ("tune", "--study", "cost", "--launcher")
    states: dict[str, tuple] = {
        "starting": (("train", "--launcher", "ray"), LONG, lambda c: c.says("Ray: one worker with")),
        "training": (("train", "--launcher", "ray"), EACH_STEP, Command.has_stepped),
        "between epochs": (("train", "--launcher", "ray"), LONG, Command.has_row),
        "in a study": ((*tune, "ray"), LONG, Command.has_row),
        "in a long step": (("train", "--launcher", "ray"), LONG_STEP, lambda c: c.says("started in")),
        "training, local": (("train", "--launcher", "local"), EACH_STEP, Command.has_stepped),
        "in a study, local": ((*tune, "local"), LONG, Command.has_row),
        "in a long step, local": (("train", "--launcher", "local"), LONG_STEP, lambda c: c.position()),
    }
    with running_cluster() as address, all_cpus_held(address):
        found = [
            stop_in(folder, ("train", "--address", address), LONG, lambda c: c.says("waiting for"))
            for _ in range(args.repeats)
        ]
    yield "seconds to stop, waiting for workers", statistics.median(found), 5, {"all_s": found}
    for name, (command, sets, condition) in states.items():
        found = [stop_in(folder, command, sets, condition) for _ in range(args.repeats)]
        yield f"seconds to stop, {name}", statistics.median(found), 5, {"all_s": found}


def stop_in(folder: Path, line: tuple[str, ...], sets: tuple[str, ...], condition: Callable) -> float:
    command = Command(folder, *line, sets=sets)
    command.wait_for(condition)
    return command.stop()


def measure_kill(folder: Path, args: argparse.Namespace) -> Iterator[tuple]:
    """Kill the worker of a run that saves each step; measure to the first step beyond."""
    seconds = []
    for _ in range(args.repeats):
        command = Command(folder, "train", "--launcher", "ray", sets=EACH_STEP)
        command.wait_for(Command.has_stepped)
        worker = command.says(r"first: process (\d+)")
        assert worker is not None
        os.kill(int(worker[1]), signal.SIGKILL)
        killed, at = time.monotonic(), command.position()
        command.wait_for(lambda c, at=at: c.position() != at)
        seconds.append(time.monotonic() - killed)
        assert command.position() > at, "it went back"
        command.stop()
    interval = Config.model_fields["train"].annotation.model_fields["checkpoint_seconds"].default
    figures = {"bar_is": "the default of train.checkpoint_seconds; here each step is saved"}
    yield "seconds from a worker's kill to the next new step", statistics.median(seconds), interval, figures


def write_study(folder: Path, num_trials: int) -> None:
    (folder / "tune_configs").mkdir(exist_ok=True)
    study = {"name": "cost", "doc": "Equal trials.", "points": [{"name": "a"}], "seeds": [*range(num_trials)]}
    (folder / "tune_configs" / "cost.yaml").write_text(yaml.safe_dump(study))


@contextmanager
def running_cluster() -> Iterator[str]:
    """Start a cluster of two logical CPUs, which other processes join."""
    options = {"num_cpus": 2, "include_dashboard": False, "object_store_memory": 80 * 2**20}
    cluster = Cluster(initialize_head=True, head_node_args=options)
    try:
        yield cluster.address
    finally:
        cluster.shutdown()


@contextmanager
def all_cpus_held(address: str) -> Iterator[None]:
    """Hold the CPUs of a cluster, as another job would."""
    ray.init(address=address, log_to_driver=False, logging_level="ERROR")
    assert ray.util.placement_group([{"CPU": 2}]).wait(60)
    try:
        yield
    finally:
        ray.shutdown()


PARTS: dict[str, Callable] = {"epoch": measure_epoch, "start": measure_start, "study": measure_study}
PARTS |= {"memory": measure_memory, "stop": measure_stop, "kill": measure_kill}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat, fewer epochs, four trials")
    parser.add_argument("--repeats", type=int, default=None, help="3 by default")
    parser.add_argument("--parts", nargs="*", choices=[*PARTS], default=[*PARTS])
    args = parser.parse_args()
    args.repeats = args.repeats or (1 if args.quick else 3)
    figures, load = [], os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        for part in args.parts:
            for name, value, bar, detail in PARTS[part](Path(folder), args):
                figures.append({"figure": name, "value": value, "bar": bar, "holds": value <= bar, **detail})
                print(f"{name}: {value:.2f}, bar {bar:g}: {'holds' if value <= bar else 'MISSED'}", flush=True)
    report(
        benchmark="cluster",
        ratio=max(figure["value"] / figure["bar"] for figure in figures),
        ratio_is="the worst figure over its bar",
        bar=1.0,
        figures=figures,
        repeats=args.repeats,
        cores=len(os.sched_getaffinity(0)),
        load_before=load,
        quick=args.quick,
    )


if __name__ == "__main__":
    main()
