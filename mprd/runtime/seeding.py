"""Generators that depend on what is drawn, not on what was drawn before: nothing to save, nothing to lose."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch


class RngStream(IntEnum):
    """What a generator is for: the last part of its key."""

    WEIGHTS = 0
    ORDER = 1
    GCN_ORDER = 2
    GCN_PAIRS = 3
    COLLAPSE = 4


def generator(seed: int, *key: int) -> torch.Generator:
    """Return a CPU generator for this seed and key, independent of every other key's."""
    state = np.random.SeedSequence([seed, *key]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def draw_uniforms(seed: int, epoch: int, ids: Iterable[int], key: int, *, num_draws: int) -> np.ndarray:
    """Draw numbers in [0, 1), float64 `[n, num_draws]`; a row depends on (seed, epoch, id, key) and nothing else.

    The ids are counters of one Philox generator, whose numbers are a function of key and counter: a generator a row
    would take five times as long.
    """
    philox = np.random.Philox(np.random.SeedSequence([seed, epoch, key]))
    source, state = np.random.Generator(philox), philox.state
    rows = []
    for number in ids:
        state["state"]["counter"][:] = 0, number, 0, 0
        philox.state = state
        rows.append(source.random(num_draws))
    return np.array(rows).reshape(-1, num_draws)
