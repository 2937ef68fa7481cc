"""Random generators derived from (seed, purpose, position), so that no generator state has to be saved."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

import numpy as np
import torch


class RngStream(IntEnum):
    """The purpose of a generator, the last part of its key."""

    WEIGHTS = 0
    ORDER = 1
    GCN_ORDER = 2
    GCN_PAIRS = 3
    COLLAPSE = 4


def generator(seed: int, *key: int) -> torch.Generator:
    """Return a CPU generator for a seed and key, independent of those of other keys.

    The key is a spawn key: entropy alone is padded with zeros, so (1,) and (1, 0) would be one key.
    """
    state = np.random.SeedSequence(seed, spawn_key=key).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(state[0]) << 32 | int(state[1]))


def draw_uniforms(seed: int, epoch: int, ids: Iterable[int], key: int, *, num_draws: int) -> np.ndarray:
    """Draw numbers in [0, 1), float64 `[n, num_draws]`; a row depends on (seed, epoch, id, key) alone.

    The ids are counters of one Philox generator, which is faster than a generator per row.
    """
    philox = np.random.Philox(np.random.SeedSequence([seed, epoch, key]))
    source, state = np.random.Generator(philox), philox.state
    rows = []
    for number in ids:
        state["state"]["counter"][:] = 0, number, 0, 0
        philox.state = state
        rows.append(source.random(num_draws))
    return np.array(rows).reshape(-1, num_draws)
