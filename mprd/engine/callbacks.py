"""Callbacks that watch the loop."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mprd.engine.trainer import Trainer


def ignore(*_: Any) -> None:
    """Do nothing."""


@dataclass(frozen=True)
class Callbacks:
    """What `fit` calls besides training; each may raise to end the run."""

    after_step: Callable[[Trainer, int], None] = ignore
    """After each step, with the number of steps of the phase."""
    after_epoch: Callable[[Trainer], None] = ignore
    """After each epoch's training."""
    between_epochs: Callable[[Trainer], None] = ignore
    """With the state at the first step of the next epoch."""
