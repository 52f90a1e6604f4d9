"""Sums in memory that the ranks of a node share, to which each adds when it comes to it.

Words that all ranks see only ever grow: how often something has been done since the beginning, by
all of them. So nothing is set back, and a rank that was away for long still reads them rightly.
"""

from __future__ import annotations

from typing import Any

from hpcml.kernels.cpu.atomics import add, exchange, load, relax, sched_yield, store
from hpcml.kernels.cpu.jit import inline, kernel
from hpcml.kernels.cpu.shared import copy

BLOCK = 1 << 14
"""Elements that one rank at a time adds to."""
_TAKEN = -1


def blocks(size: int) -> int:
    """Blocks of a sum of `size` elements."""
    return -(-size // BLOCK)


@inline
def _rest(looks: int, spins: int) -> None:
    if looks < spins:
        relax()
    else:
        sched_yield()


@kernel("int64(int64[::1], int64, int64, int64, int64, int64, T[::1], T[::1])")
def add_to(
    words: Any, ranks: int, rank: int, done: int, spins: int, yields: int, x: Any, total: Any
) -> Any:
    """Add `x` to `total`; whoever is the first of `ranks` at a block puts it there instead.

    `words`: for each block how often it was added to. Ranks begin at different blocks. Returns how
    many are done: fewer than all if another rank kept one for so many looks (`spins` and `yields`
    are those of `shared.meet`); call again with that as `done`.
    """
    every = words.size
    for k in range(done, every):
        block = (rank * every // ranks + k) % every
        looks = 0
        times = exchange(words, block, _TAKEN)
        while times == _TAKEN:
            if looks == spins + yields:
                return k
            _rest(looks, spins)
            looks += 1
            times = exchange(words, block, _TAKEN)
        ours, theirs = x[block * BLOCK : (block + 1) * BLOCK], total[block * BLOCK :]
        if times % ranks == 0:
            copy(ours, theirs)
        else:
            for j in range(ours.size):
                theirs[j] += ours[j]
        store(words, block, times + 1)
    return every


@kernel("void(int64[::1], int64)")
def count(words: Any, index: int) -> None:
    """Add one to a word; what this rank wrote before is visible to who reads it."""
    add(words, index, 1)


@kernel("boolean(int64[::1], int64, int64, int64, int64)")
def reached(words: Any, index: int, value: int, spins: int, yields: int) -> Any:
    """Whether a word is `value` or more, by now or after so many looks."""
    looks = 0
    while load(words, index) < value:
        if looks == spins + yields:
            return False
        _rest(looks, spins)
        looks += 1
    return True
