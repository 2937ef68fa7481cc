"""How many trials run side by side on Ray, as the cluster grows and shrinks."""

from __future__ import annotations

import time

from mprd.errors import UserError
from mprd.parallel.resources import Bundle, count_fits, describe_machines, has_autoscaler

AHEAD = 4
"""Trials that wait for the machines of an autoscaler: at most so many start at a time."""
COUNT_SECONDS = 5
"""Interval in which the cluster is counted."""


def check_options(concurrency: int | None, gpus_per_trial: float | None) -> None:
    """Raise UserError for numbers that no cluster could meet."""
    if concurrency is not None and concurrency < 1:
        raise UserError(f"--concurrency must be at least 1, but got {concurrency}")
    gpus = gpus_per_trial or 0
    if gpus < 0 or (gpus > 1 and gpus != int(gpus)):
        raise UserError(f"--gpus-per-trial must be a share below 1 or a whole number, but got {gpus}")


class Slots:
    """The trials that may run side by side, as the cluster grows and shrinks."""

    def __init__(self, bundle: Bundle, concurrency: int | None) -> None:
        self.bundle, self.concurrency = bundle, concurrency
        # trials that wait make an autoscaler start machines
        self.num_ahead = AHEAD if has_autoscaler() else 0
        self.fits, self.counted = count_fits(bundle), time.monotonic()

    def count(self) -> int:
        """Return their number, at least one, which waits where none fits."""
        if time.monotonic() - self.counted > COUNT_SECONDS:
            self.fits, self.counted = count_fits(self.bundle), time.monotonic()
        fits = max(1, self.fits + self.num_ahead)
        return min(fits, self.concurrency or fits)

    def describe(self) -> str:
        """Return in words what fits now, on which machines, and whether it may grow."""
        fits = min(self.fits, self.concurrency or self.fits)
        grow = ", and more on machines of the autoscaler" if self.num_ahead and fits != self.concurrency else ""
        return f"{fits} side by side on {describe_machines()}{grow}"
