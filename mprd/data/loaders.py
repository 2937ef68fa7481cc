"""Batches of images from helper processes, which end with this process and need no disk, socket or /dev/shm.

A helper is forked, writes batches into memory that it shares by inheritance, and announces them through a pipe. torch's
DataLoader passes each tensor through a file in /dev/shm and a socket below TMPDIR, and hangs where one of them fails.
"""

from __future__ import annotations

import logging
import math
import mmap
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Protocol

import torch
from torch import Tensor

from mprd.errors import UserError
from mprd.runtime.machine import num_cores

logger = logging.getLogger("mprd")

AHEAD = 2
"""Batches that a helper prepares ahead, each in a slot of its own."""
WATCH_SECONDS = 1.0
"""Interval at which a helper checks that its parent is alive."""
STOP_SECONDS = 5.0
"""Longest wait for the end of a helper that was killed."""
CAUSES: dict[int, str] = {
    signal.SIGKILL: "memory runs out (a container's limit counts all processes)",
    signal.SIGBUS: "a disk or /dev/shm is full (of a container: --shm-size) or a file was cut while it was read",
}
"""The usual causes of a signal."""

Item = tuple[Tensor, int]
Prepared = list[int] | UserError | str
"""The ids of a batch whose images lie in the slot, an error of the user, or the traceback of another one."""


class Images(Protocol):
    """Images as tensors of one shape."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of an item's tensor, `[3, H, W]`, float32."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item:
        """Return an image, and the id that is yielded with it."""


class ImageLoader:
    """Iterate over batches (images `[B, 3, H, W]`, ids `[B]` int64) in order; raise a helper's UserError unchanged.

    Helpers use neither an accelerator nor torch's thread pool nor global random generators. Where the system allows no
    helper, images are prepared in this process.
    """

    def __init__(
        self, images: Images, batches: Sequence[Sequence[int]], *, num_workers: int, pin: bool = False
    ) -> None:
        """Use at most one helper per batch and core; 0 prepares images in this process.

        Args:
            pin: yield images in page-locked memory.
        """
        self.images, self.pin = images, pin
        self.batches = [[int(index) for index in batch] for batch in batches]
        self.num_workers = min(num_workers, len(self.batches), num_cores())

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        helpers = self.start_helpers()
        try:
            for images, ids in self.receive(helpers) if helpers else self.prepare():
                yield images, torch.tensor(ids)
        finally:
            for helper in helpers:
                helper.stop()

    def start_helpers(self) -> list[Helper]:
        """Start the helpers; return none where the system does not allow them."""
        helpers: list[Helper] = []
        try:
            for number in range(self.num_workers):
                helpers.append(Helper(self.images, self.batches[number :: self.num_workers]))
        except OSError as error:
            reason = error.strerror or error
            logger.warning("data.num_workers: cannot start loader processes (%s); this process prepares images", reason)
            for helper in helpers:
                helper.stop()
            return []
        return helpers

    def receive(self, helpers: Sequence[Helper]) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield the batches of helpers that take turns, copied before a helper writes its next but one."""
        for number in range(len(self.batches)):
            helper = helpers[number % len(helpers)]
            shared, ids = helper.receive()
            images = shared.pin_memory() if self.pin else shared.clone()
            helper.free_slot()
            yield images, ids

    def prepare(self) -> Iterator[tuple[Tensor, list[int]]]:
        """Yield batches prepared in this process."""
        for batch in self.batches:
            images, ids = zip(*(self.images[index] for index in batch), strict=True)
            stacked = torch.stack(images)
            yield stacked.pin_memory() if self.pin else stacked, list(ids)


class Helper:
    """A forked process that prepares batches, a few ahead of the reader."""

    def __init__(self, images: Images, batches: list[list[int]]) -> None:
        """Start it; raise OSError where the system lacks processes, memory or pipes for it."""
        self.sizes = [len(batch) for batch in batches]
        self.slots = shared_slots(max(self.sizes), images.shape)
        self.num_received = 0
        # forked ones use neither an accelerator nor torch's threads; spawned ones would import torch for every pass
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        arguments = (theirs, images, batches, self.slots, os.getpid())
        self.process = context.Process(target=serve, args=arguments, daemon=True)
        try:
            self.process.start()
        finally:
            # held by the helper alone, so that its end is seen here
            theirs.close()

    def receive(self) -> tuple[Tensor, list[int]]:
        """Wait for the next batch; return its images, valid until `free_slot`, and ids. Raises UserError."""
        wait([self.pipe, self.process.sentinel])
        try:
            found: Prepared = self.pipe.recv()
        except (EOFError, OSError):
            raise UserError(self.explain_end()) from None
        if isinstance(found, UserError):
            raise found
        if isinstance(found, str):
            raise RuntimeError(f"in a loader process:\n{found}")
        slot = self.slots[self.num_received % AHEAD]
        return slot[: self.sizes[self.num_received]], found

    def free_slot(self) -> None:
        """Let the helper write over the batch received last."""
        self.num_received += 1
        if self.num_received - 1 + AHEAD < len(self.sizes):
            # an end of the helper is found by the next `receive`
            with suppress(OSError):
                self.pipe.send(None)

    def stop(self) -> None:
        """End the helper at once."""
        self.process.kill()
        self.process.join(STOP_SECONDS)
        self.pipe.close()

    def explain_end(self) -> str:
        """Return why the helper may have ended, and what helps."""
        self.process.join(STOP_SECONDS)
        code = self.process.exitcode or 0
        how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        cause = CAUSES.get(-code, "")
        return (
            f"a loader process {how}{cause and f', as happens where {cause}'}; what helps: fewer of them "
            "(data.num_workers, in extract --decoders; 0 loads images in this process), or a smaller train.batch_size "
            "and eval.batch_size"
        )


def shared_slots(batch_size: int, shape: tuple[int, int, int]) -> Tensor:
    """Return float32 `[AHEAD, batch_size, 3, H, W]` in memory that forked processes share, outside of /dev/shm."""
    memory = mmap.mmap(-1, 4 * AHEAD * batch_size * math.prod(shape))
    return torch.frombuffer(memory, dtype=torch.float32).view(AHEAD, batch_size, *shape)


def serve(pipe: Connection, images: Images, batches: list[list[int]], slots: Tensor, parent: int) -> None:
    """Prepare batches in a helper: write each into a slot that is free, and send its ids, or its error instead."""
    # the main process handles them, and then stops its helpers
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=end_with, args=(parent,), daemon=True).start()
    torch.set_num_threads(1)
    for number, batch in enumerate(batches):
        if number >= AHEAD:
            pipe.recv()
        pipe.send(fill(slots[number % AHEAD], images, batch))
    # the parent stops it
    pipe.poll(None)


def fill(slot: Tensor, images: Images, batch: list[int]) -> Prepared:
    """Write a batch into a slot and return its ids, or the error."""
    ids = []
    try:
        for row, index in enumerate(batch):
            slot[row], shown = images[index]
            ids.append(shown)
    except UserError as error:
        return error
    except MemoryError:
        return UserError(
            "data.num_workers: no memory left for loader processes; fewer of them, or smaller batches help"
        )
    except Exception:
        return traceback.format_exc()
    return ids


def end_with(parent: int) -> None:
    """End this process within seconds of its parent, which may have been killed."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os._exit(1)
