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


# NumPy's SeedSequence and torch's Mersenne twister, for many keys at once; the names are the algorithms' own
INIT_A, MULT_A, INIT_B, MULT_B, MIX_L, MIX_R = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED, 0xCA01F9DD, 0x4973F715
TWIST, TWIST_GAP, MAX_DRAWS = 0x9908B0DF, 397, 113
LOW_32 = 0xFFFFFFFF


def draw_uniforms(seed: int, epoch: int, ids: np.ndarray, key: int, *, num_draws: int) -> np.ndarray:
    """Draw numbers in [0, 1), float64 `[n, num_draws]`, for the keys (epoch, id, key) of many ids `[n]`.

    Row i is, to the bit, `torch.rand(num_draws, generator=generator(seed, epoch, ids[i], key), dtype=torch.float64)`.
    """
    assert num_draws <= MAX_DRAWS, "further numbers would need the second round of the twister"
    words = [*words_of(seed), *words_of(epoch), np.asarray(ids).astype(np.uint32), *words_of(key)]
    return twister_uniforms(seed_words(words), num_draws=num_draws)


def words_of(number: int) -> list[np.ndarray]:
    """Cut a number into 32-bit words, the low one first."""
    count = max(1, -(-number.bit_length() // 32))
    return [np.array([number >> 32 * place & LOW_32], dtype=np.uint32) for place in range(count)]


def seed_words(entropy: list[np.ndarray]) -> np.ndarray:
    """Return the second word of `np.random.SeedSequence(entropy).generate_state(2)`, the one that torch seeds with."""
    constant = INIT_A

    def scramble(word: np.ndarray) -> np.ndarray:
        nonlocal constant
        word = np.bitwise_xor(word, np.uint32(constant))
        constant = constant * MULT_A & LOW_32
        word = word * np.uint32(constant)
        return word ^ (word >> np.uint32(16))

    def mix(pool: np.ndarray, word: np.ndarray) -> np.ndarray:
        mixed = np.subtract(pool * np.uint32(MIX_L), word * np.uint32(MIX_R), dtype=np.uint32)
        return mixed ^ (mixed >> np.uint32(16))

    padded = [*entropy, *words_of(0) * (4 - len(entropy))]
    pool = [scramble(word) for word in padded[:4]]
    for source in range(4):
        for place in range(4):
            if place != source:
                pool[place] = mix(pool[place], scramble(pool[source]))
    for word in padded[4:]:
        pool = [mix(held, scramble(word)) for held in pool]
    word = pool[1] ^ np.uint32(INIT_B * MULT_B & LOW_32)
    word = word * np.uint32(INIT_B * MULT_B * MULT_B & LOW_32)
    return word ^ word >> np.uint32(16)


def twister_uniforms(seeds: np.ndarray, *, num_draws: int) -> np.ndarray:
    """Return the first numbers of a Mersenne twister for each seed `[n]` uint32, 53 bits each, `[n, num_draws]`."""
    num_words = 2 * num_draws
    state = np.empty((TWIST_GAP + num_words, len(seeds)), dtype=np.uint32)
    state[0] = seeds
    for place in range(1, len(state)):
        last = state[place - 1]
        state[place] = (last ^ last >> np.uint32(30)) * np.uint32(1812433253) + np.uint32(place)
    high, low = np.uint32(0x80000000), np.uint32(0x7FFFFFFF)
    joined = state[:num_words] & high | state[1 : num_words + 1] & low
    word = state[TWIST_GAP:] ^ joined >> np.uint32(1) ^ (joined & np.uint32(1)) * np.uint32(TWIST)
    word ^= word >> np.uint32(11)
    word ^= word << np.uint32(7) & np.uint32(0x9D2C5680)
    word ^= word << np.uint32(15) & np.uint32(0xEFC60000)
    word ^= word >> np.uint32(18)
    whole = word[::2].astype(np.uint64) << np.uint64(32) | word[1::2]
    return ((whole & np.uint64((1 << 53) - 1)) * 2.0**-53).T
