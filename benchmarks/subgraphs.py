"""Pair graphs by Ray Data actors over the serial builder: the start, the rate by number of actors, and memory.

The ratio is of the wall time for all pairs of the largest size; above 1 the serial builder is faster. Ray's own
start (once a process) is apart. More actors than cores show what the pool costs, not what a larger machine gives.
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

from mprd.parallel.ray_actors import RayBuilder
from mprd.subgraphs import SubgraphBatch, build_serially

NUM_IMAGES, SHORTEST, LONGEST = 12_936, 8, 16


def ragged_lists() -> torch.Tensor:
    """Draw lists of 8 to 16 neighbors for as many images as Market-1501 trains on, [N, K]."""
    draw = torch.Generator().manual_seed(0)
    # steps from the own id, distinct and never back to it
    steps = torch.rand(NUM_IMAGES, 64, generator=draw).argsort(1)[:, :LONGEST] + 1
    ids = (torch.arange(NUM_IMAGES)[:, None] + steps) % NUM_IMAGES
    counts = torch.randint(SHORTEST, LONGEST + 1, (NUM_IMAGES, 1), generator=draw)
    return ids.masked_fill(torch.arange(LONGEST) >= counts, -1)


def near_pairs(num_pairs: int) -> torch.Tensor:
    """Draw pairs of images that may stand in each other's lists, [P, 2]."""
    draw = torch.Generator().manual_seed(1)
    first = torch.randint(NUM_IMAGES, (num_pairs,), generator=draw)
    return torch.stack([first, (first + torch.randint(1, 65, (num_pairs,), generator=draw)) % NUM_IMAGES], 1)


def batch_sizes(num_pairs: int, size: int) -> list[int]:
    """Cut so many pairs into batches of `size`."""
    return [min(size, num_pairs - start) for start in range(0, num_pairs, size)]


def resident() -> tuple[float, float]:
    """Return this process's own and shared resident memory in MB; shared is what it has mapped of the store."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    own, shared = (int(status[key].split()[0]) / 1024 for key in ("RssAnon", "RssShmem"))
    return own, shared


def seconds_of(function: Callable[[], Iterator[SubgraphBatch]]) -> float:
    """Return the wall time of reading a stream to its end."""
    started = time.perf_counter()
    for _ in function():
        pass
    return time.perf_counter() - started


def measure(num_pairs: int, size: int, actors: list[int], lists: torch.Tensor) -> list[dict]:
    """Time the serial builder and the pool, with each number of actors."""
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
    """Wait until the last pool has given its CPUs back."""
    while ray.available_resources().get("CPU", 0) < num_cpus:
        time.sleep(0.05)


def watch_memory(num_pairs: int, size: int, num_actors: int, lists: torch.Tensor) -> dict:
    """Stream so many pairs and print the memory ten times on the way."""
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="1e4 and 1e5 pairs, 3e5 for the memory")
    parser.add_argument("--actors", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch", type=int, default=256, help="pairs a batch, about a GCN step")
    parser.add_argument("--memory-pairs", type=int, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    lists, load = ragged_lists(), os.getloadavg()[0]
    started = time.perf_counter()
    ray.init(
        address="local",
        num_cpus=max(args.actors),
        include_dashboard=False,
        log_to_driver=False,
        logging_level="ERROR",
    )
    init = time.perf_counter() - started
    if not args.quick:  # an execution that is not counted: the first reads torch from the disk
        seconds_of(lambda: RayBuilder(max(args.actors))(near_pairs(1000), lists, [1000]))
        wait_for_cpus(max(args.actors))
    counts = (10_000, 100_000) if args.quick else (10_000, 100_000, 1_000_000)
    rows = [
        row
        for n in counts
        for row in measure(n, args.batch, args.actors if n == counts[-1] else args.actors[-1:], lists)
    ]
    memory = watch_memory(
        args.memory_pairs or (300_000 if args.quick else 10_000_000), 8 * args.batch, max(args.actors), lists
    )
    ray.shutdown()
    report(
        benchmark="subgraphs",
        ratio=rows[-1]["over_serial"],
        ratio_is="wall time on Ray Data over the serial builder, largest size, most actors",
        ray_init_s=round(init, 2),
        rows=rows,
        memory=memory,
        cores=len(os.sched_getaffinity(0)),
        load_at_start=round(load, 1),
        quick=args.quick,
    )


if __name__ == "__main__":
    main()
