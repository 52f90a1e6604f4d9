"""Which algorithm serves a call: measured on this kind of machine, else the least by its cost."""

from __future__ import annotations

from hpcml.comm.algorithms import Algorithm, Machine, Situation, algorithms

NODE = Machine(alpha=3e-6, beta=1.5e-10, gamma=5e-11)
"""Messages through the memory of a node."""
NETWORK = Machine(alpha=3e-5, beta=8e-9, gamma=5e-11)
"""Messages over a network."""


def choose(operation: str, nbytes: int, situation: Situation) -> Algorithm:
    """The algorithm for a payload of `nbytes` (as the ledger counts it) in this situation."""
    fit = [
        candidate
        for candidate in algorithms(operation).values()
        if candidate.applies(situation) and (candidate.ordered or not situation.ordered)
    ]
    assert fit, f"no algorithm for {operation} in {situation}"
    machine = NETWORK if situation.spread else NODE
    return min(fit, key=lambda candidate: candidate.cost(nbytes, situation.size, machine))
