"""Gamma, eta and the learning rate: pure functions of the epoch, which counts from 0."""

from __future__ import annotations

import math
from typing import Literal

EtaKind = Literal["linear", "cosine", "step", "exponential", "constant"]

GAMMA_START, GAMMA_END = 1.0, 0.5
"""Sec. 5.2."""
ETA_START = 1.0
"""In Eq. 10 both gradients count alike at first."""
ETA_STEP = 0.5
"""Share of the epochs after which `step` falls; the paper gives no schedule."""
LR_FACTOR = 0.1
"""Sec. 5.2: divided by 10 every `train.lr_step` epochs."""


def progress(epoch: int, num_epochs: int) -> float:
    """Return how far an epoch lies between the first (0) and the last (1)."""
    return epoch / (num_epochs - 1) if num_epochs > 1 else 0.0


def gamma(epoch: int, num_epochs: int) -> float:
    """Return the weight of the new feature in Eq. 1, linear from the first epoch to the last (Sec. 5.2)."""
    return GAMMA_START + (GAMMA_END - GAMMA_START) * progress(epoch, num_epochs)


def eta(epoch: int, num_epochs: int, *, kind: EtaKind = "linear", end: float = 0.1) -> float:
    """Return the weight of the meta gradient in Eq. 10, which never rises with the epoch.

    The paper gives no formula.
    """
    t, start = progress(epoch, num_epochs), ETA_START
    if kind == "linear":
        return start + (end - start) * t
    if kind == "cosine":
        return end + (start - end) * (1 + math.cos(math.pi * t)) / 2
    if kind == "step":
        return start if epoch < ETA_STEP * num_epochs else end
    if kind == "exponential":
        return start * (end / start) ** t
    return start


def learning_rate(epoch: int, base: float, *, step: int) -> float:
    """Return the learning rate: `base`, times 0.1 once every `step` epochs (Sec. 5.2)."""
    return base * LR_FACTOR ** (epoch // step)
