"""Gamma, eta and the learning rate: pure functions of the epoch, which counts from 0."""

from __future__ import annotations

import math
from typing import Literal

EtaKind = Literal["linear", "cosine", "step", "exponential", "constant"]


def progress(epoch: int, num_epochs: int) -> float:
    """Return how far an epoch lies between the first (0) and the last (1)."""
    return epoch / (num_epochs - 1) if num_epochs > 1 else 0.0


def gamma(epoch: int, num_epochs: int, *, start: float = 1.0, end: float = 0.5) -> float:
    """Return the weight of the new feature in Eq. 1, linear from the first epoch to the last (Sec. 5.2)."""
    return start + (end - start) * progress(epoch, num_epochs)


def eta(
    epoch: int,
    num_epochs: int,
    *,
    kind: EtaKind = "linear",
    start: float = 1.0,
    end: float = 0.1,
    step_epoch: float = 0.5,
) -> float:
    """Return the weight of the meta gradient in Eq. 10, which never rises with the epoch.

    The paper gives no formula. `step` falls to `end` once the share `step_epoch` of the epochs has passed.
    """
    t = progress(epoch, num_epochs)
    if kind == "linear":
        return start + (end - start) * t
    if kind == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * t)) / 2
    if kind == "step":
        return start if epoch < step_epoch * num_epochs else end
    if kind == "exponential":
        return start * (end / start) ** t
    return start


def learning_rate(epoch: int, base: float, *, step: int, factor: float) -> float:
    """Return the learning rate: `base`, times `factor` once every `step` epochs (Sec. 5.2)."""
    return base * factor ** (epoch // step)
