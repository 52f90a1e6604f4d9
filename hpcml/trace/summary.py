"""Shares of a step by what ranks did, and pipelines beside their theory, as text."""

from __future__ import annotations

from collections.abc import Sequence

from hpcml.trace.record import Recorded
from hpcml.trace.segments import TRANSFER, WAITING, segments
from hpcml.trace.theory import Theory, theories


def summary(ranks: Sequence[Recorded]) -> str:
    """A line a rank: what its time in a step went to; a line for each pipeline below."""
    lines = ["rank       ms   compute  transfer   waiting      idle"]
    for rank, did in zip(ranks, segments(ranks), strict=True):
        whole = rank.end - rank.start
        spent = dict.fromkeys(("compute", TRANSFER, WAITING), 0.0)
        for one in did:
            kind = one.what if one.what in spent else "compute"
            spent[kind] += one.end - one.start
        shares = [*spent.values(), whole - sum(spent.values())]
        cells = "".join(f"{share / whole:10.1%}" for share in shares)
        lines.append(f"{rank.rank:<4}{whole * 1e3:9.1f}{cells}")
    return "\n".join([*lines, *map(beside, theories(ranks))])


def beside(theory: Theory) -> str:
    """A pipeline's makespan and bubble, measured and simulated."""
    simulation = theory.simulation
    names = ", ".join(str(rank.rank) for rank in theory.ranks)
    return (
        f"pipeline of ranks {names}: {theory.makespan * 1e3:.1f} ms, {theory.ratio:.3f} of the "
        f"simulation; bubble {theory.bubble:.1%}, simulated {simulation.bubble:.1%}"
    )
