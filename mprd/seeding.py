"""Generators that depend on what is drawn, not on what was drawn before: nothing to save, nothing to lose."""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch


class Draw(IntEnum):
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
