"""Where a network runs: CPU threads, and which accelerator."""

from __future__ import annotations

import torch

from mprd.errors import UserError


def set_threads(threads: int) -> None:
    """Set torch's CPU threads; 0 leaves them."""
    if threads:
        torch.set_num_threads(threads)


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
