"""Where a network runs: CPU threads, and which accelerator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mprd.errors import UserError


def set_threads(threads: int) -> None:
    """Set torch's CPU threads; 0 leaves them."""
    if threads:
        torch.set_num_threads(threads)


def send(values: Any, device: torch.device, *, dtype: torch.dtype | None = None) -> Tensor:
    """Copy numbers of the host to a device and go on at once.

    A plain copy returns when the accelerator is done with all that it was given before.
    """
    return torch.as_tensor(values, dtype=dtype).to(device, non_blocking=True)


class Fetched:
    """Whole numbers on their way from a device to the host, which does other work until it asks for them."""

    def __init__(self, numbers: Tensor) -> None:
        """Send for `numbers` `[n]`."""
        self.numbers = numbers.to("cpu", non_blocking=True)
        is_awaited = numbers.device.type == "cuda"
        self.arrival = torch.cuda.current_stream(numbers.device).record_event() if is_awaited else None

    def tolist(self) -> list[int]:
        """Return the numbers once they are here."""
        if self.arrival is not None:
            self.arrival.synchronize()
        return self.numbers.tolist()


def choose_device(name: str, *, setting: str = "train.device") -> torch.device:
    """Turn `auto`, `cpu` or `cuda[:N]` into a device that is there; raise UserError naming the setting otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"{setting} must be auto, cpu, cuda or cuda:N, but got {name!r}") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"{setting}: {name} is not on this machine ({torch.cuda.device_count()} CUDA devices)")
    return device
