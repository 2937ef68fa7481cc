"""Compare building pair graphs on Ray Data actors with the serial builder: start, rate by number of actors, memory.

The ratio is of the wall times for the largest number of pairs; above 1 the serial builder is faster. The start of Ray
itself, once a process, is reported apart. More actors than cores measure the cost of the pool, not a larger machine.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import ray
import torch
from common import report

from mprd.parallel.ray_subgraphs import RayBuilder
from mprd.subgraphs import SubgraphBatch, build_serially

NUM_IMAGES, SHORTEST, LONGEST = 12_936, 8, 16


def ragged_lists() -> torch.Tensor:
    """Draw lists of 8 to 16 neighbors for as many images as Market-1501 trains on, [N, K]."""
    draw = torch.Generator().manual_seed(0)
    # distinct steps from the own id, never back to it
    steps = torch.rand(NUM_IMAGES, 64, generator=draw).argsort(1)[:, :LONGEST] + 1
    ids = (torch.arange(NUM_IMAGES)[:, None] + steps) % NUM_IMAGES
    counts = torch.randint(SHORTEST, LONGEST + 1, (NUM_IMAGES, 1), generator=draw)
    return ids.masked_fill(torch.arange(LONGEST) >= counts, -1)


def near_pairs(num_pairs: int) -> torch.Tensor:
    """Draw pairs of images that can be in each other's lists, [P, 2]."""
    draw = torch.Generator().manual_seed(1)
    first = torch.randint(NUM_IMAGES, (num_pairs,), generator=draw)
    return torch.stack([first, (first + torch.randint(1, 65, (num_pairs,), generator=draw)) % NUM_IMAGES], 1)


def batch_sizes(num_pairs: int, size: int) -> list[int]:
    """Return the sizes of batches of `size` pairs, the last one smaller."""
    return [min(size, num_pairs - start) for start in range(0, num_pairs, size)]


def resident() -> tuple[float, float]:
    """Return the private and the shared (mapped object store) resident memory of this process in MB."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    own, shared = (int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssShmem"))
    return own, shared


def seconds_of(function: Callable[[], Iterator[SubgraphBatch]]) -> float:
    """Return the wall time of exhausting a stream."""
    started = time.perf_counter()
    for _ in function():
        pass
    return time.perf_counter() - started


def measure(num_pairs: int, size: int, actors: list[int], lists: torch.Tensor) -> list[dict]:
    """Time the serial builder, and the pool with each number of actors."""
    pairs, sizes = near_pairs(num_pairs), batch_sizes(num_pairs, size)
    serial = seconds_of(lambda: build_serially(pairs, lists, sizes))
    rows = []
    for num_actors in actors:
        builder = RayBuilder(num_actors)
        wall = seconds_of(lambda builder=builder: builder(pairs, lists, sizes))
        start = builder.start_seconds or 0.0
        rows.append(
            {
                "pairs": num_pairs,
                "actors": num_actors,
                "serial_s": round(serial, 3),
                "ray_s": round(wall, 3),
                "first_graphs_s": round(start, 3),
                "serial_pairs_per_s": round(num_pairs / serial),
                "ray_pairs_per_s": round(num_pairs / wall),
                "over_serial": round(wall / serial, 3),
            }
        )
        print(rows[-1], flush=True)
        wait_for_cpus(max(actors))
    return rows


def wait_for_cpus(num_cpus: int) -> None:
    """Wait until the last pool has released its CPUs."""
    while ray.available_resources().get("CPU", 0) < num_cpus:
        time.sleep(0.05)


def watch_memory(num_pairs: int, size: int, num_actors: int, lists: torch.Tensor) -> dict:
    """Stream pairs and print the memory after every tenth."""
    pairs, sizes = near_pairs(num_pairs), batch_sizes(num_pairs, size)
    marks, done, started = [], 0, time.perf_counter()
    for batch in RayBuilder(num_actors)(pairs, lists, sizes):
        done += len(batch)
        if done * 10 >= num_pairs * (len(marks) + 1):
            marks.append(tuple(round(megabytes) for megabytes in resident()))
            print(f"{done} pairs, {time.perf_counter() - started:.1f} s, own and shared MB: {marks[-1]}", flush=True)
    own = [mark[0] for mark in marks]
    return {
        "pairs": num_pairs,
        "seconds": round(time.perf_counter() - started, 1),
        "own_mb_first_and_last_tenth": [own[0], own[-1]],
        "own_mb_highest": max(own),
        "shared_mb_highest": max(mark[1] for mark in marks),
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1e4 and 1e5 pairs, 3e5 for the memory")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=256, help="pairs a batch, about a GCN step")
    parser.add_argument("--memory-pairs", type=int, default=None)
    return parser.parse_args()


def start_ray(num_cpus: int) -> float:
    """Start Ray on this machine; return the seconds it took."""
    started = time.perf_counter()
    ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    return time.perf_counter() - started


def main() -> None:
    options = parse_options()
    torch.set_num_threads(1)
    lists, load, most_actors = ragged_lists(), os.getloadavg()[0], max(options.actors)
    ray_seconds = start_ray(most_actors)
    if not options.quick:  # warm up: the first execution reads torch from the disk
        seconds_of(lambda: RayBuilder(most_actors)(near_pairs(1000), lists, [1000]))
        wait_for_cpus(most_actors)
    counts = (10_000, 100_000) if options.quick else (10_000, 100_000, 1_000_000)
    rows = []
    for count in counts:
        actors = options.actors if count == counts[-1] else options.actors[-1:]
        rows += measure(count, options.batch, actors, lists)
    num_pairs = options.memory_pairs or (300_000 if options.quick else 10_000_000)
    memory = watch_memory(num_pairs, 8 * options.batch, most_actors, lists)
    ray.shutdown()
    report(
        benchmark="subgraphs",
        ratio=rows[-1]["over_serial"],
        ratio_is="wall time on Ray Data over the serial builder, largest size, most actors",
        ray_init_s=round(ray_seconds, 2),
        rows=rows,
        memory=memory,
        cores=len(os.sched_getaffinity(0)),
        load_at_start=round(load, 1),
        quick=options.quick,
    )


if __name__ == "__main__":
    main()
