"""The order of a run's samples: a function of (seed, sample number), without state and ranks.

Every epoch is a permutation of the data set that can be evaluated at any point, in no memory: a
Feistel network is a bijection whatever its round function (Luby and Rackoff 1988), and walking
along its cycles until a value falls below n makes it one of 0 .. n - 1 (Black and Rogaway 2002).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hpcml import rng

Array = np.ndarray[Any, np.dtype[Any]]

ROUNDS = 16  # eight leave epochs of 5 to 7 samples visibly uneven; a batch takes 0.3 ms


class Sampler:
    """Sample number k of a run, 0, 1, 2, ..., as an index into a data set of `n` samples.

    Numbers e * n to (e + 1) * n - 1 are epoch e, which visits every index once.
    """

    def __init__(self, n: int, seed: int) -> None:
        """An order of `n` >= 1 samples; another `seed` gives another one."""
        if n < 1:
            raise ValueError(f"n={n}: a sampler needs at least one sample")
        self.n = n
        self._key = np.uint64(rng.key(seed, "data order"))
        bits = (n - 1).bit_length()  # 2^bits is at most 2 n - 1: few values walk on
        self._right_bits = np.uint64(bits - bits // 2)
        self._left_mask = np.uint64((1 << bits // 2) - 1)
        self._right_mask = np.uint64((1 << (bits - bits // 2)) - 1)

    def indices(self, start: int, stop: int) -> Array:
        """Return the data set's indices (int64) of the samples numbered start .. stop - 1."""
        epoch, place = np.divmod(np.arange(start, stop, dtype=np.uint64), np.uint64(self.n))
        key = _mix(_mix(epoch + np.uint64(1)) ^ self._key)
        index = self._permute(place, key)
        walking = np.flatnonzero(index >= self.n)
        while walking.size:
            index[walking] = self._permute(index[walking], key[walking])
            walking = walking[index[walking] >= self.n]
        return index.astype(np.int64)

    def _permute(self, value: Array, key: Array) -> Array:
        """Permute 0 .. 2^bits - 1 by rounds on the left and the right half of the bits in turn."""
        left, right = value >> self._right_bits, value & self._right_mask
        for number in range(ROUNDS):
            round_key = key + np.uint64(number)
            if number % 2:
                right = right ^ (_mix(_mix(left) ^ round_key) & self._right_mask)
            else:
                left = left ^ (_mix(_mix(right) ^ round_key) & self._left_mask)
        return left << self._right_bits | right


def _mix(value: Array) -> Array:
    """Hash 64-bit words: SplitMix64 (Steele, Lea, Flood 2014), increment and finaliser."""
    value = value + np.uint64(0x9E3779B97F4A7C15)
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = value ^ (value >> np.uint64(31))
    return mixed
