"""Draws are functions of (seed, epoch, id, key)."""

from __future__ import annotations

import numpy as np
import pytest

from mprd.runtime.seeding import draw_uniforms, generator


@pytest.mark.parametrize("key", [(0, 0, 100), (7, 3, 101), (2**40 + 5, 19, 0), (1, 2**33, 2**35)])
def test_the_draws_of_an_id_are_those_of_its_own_generator(key: tuple[int, int, int]) -> None:
    ids = [0, 1, 12935, 2**31]
    drawn = draw_uniforms(*key[:2], ids, key[2], num_draws=54)
    words = np.random.SeedSequence(key).generate_state(2, np.uint64)
    for row, number in zip(drawn, ids, strict=True):
        alone = np.random.Generator(np.random.Philox(key=words, counter=[0, number, 0, 0])).random(54)
        assert np.array_equal(row, alone)


def test_draws_differ_by_seed_epoch_id_and_key_and_fill_the_unit_interval() -> None:
    rows = [draw_uniforms(*key[:2], [key[2]], key[3], num_draws=200)[0] for key in np.eye(5, 4, dtype=int).tolist()]
    assert len({row.tobytes() for row in rows}) == 5
    assert all(0 <= row.min() < 0.05 and 0.95 < row.max() < 1 and abs(row.mean() - 0.5) < 0.1 for row in rows)
    assert draw_uniforms(0, 0, [], 0, num_draws=3).shape == (0, 3)


def test_keys_that_differ_by_trailing_zeros_are_other_streams() -> None:
    keys = [(), (1,), (1, 0), (1, 0, 0), (0,), (0, 1)]
    assert len({generator(0, *key).initial_seed() for key in keys}) == len(keys)
    assert generator(7, 1).initial_seed() != generator(0, 7, 1).initial_seed()
