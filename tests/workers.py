"""Several workers as processes of this machine."""

from __future__ import annotations

import datetime
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing

from mprd.runtime.distributed import joined_workers


def enter(rank: int, size: int, work: Callable[..., Any], args: tuple[Any, ...], folder: Path) -> None:
    """Join the process group, run the work, and write its result to a file."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder / 'store'}", timeout=timeout, rank=rank, world_size=size)
    result = work(joined_workers(torch.device("cpu")), *args)
    dist.barrier()
    dist.destroy_process_group()
    (folder / f"{rank}.pickle").write_bytes(pickle.dumps(result))


def on_workers(size: int, work: Callable[..., Any], *args: Any, folder: Path) -> list[Any]:
    """Run `work(workers, *args)` in `size` processes, forked to import torch once; return the results by rank."""
    multiprocessing.start_processes(enter, (size, work, args, folder), nprocs=size, start_method="fork")
    return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(size)]
