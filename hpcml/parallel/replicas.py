"""A check that data-parallel replicas are replicas still.

They start alike and get the same updates, so that they stay alike to the last bit, unless something
is wrong: another library or CPU on one machine, bad memory, a random number that depends on the
rank, a user's own change on one rank only. Such a drift raises no error by itself; the loss is
merely not what it should be.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from hpcml.backend import Array, to_kind
from hpcml.comm import Axis

_DIGEST = 16


class ReplicaError(RuntimeError):
    """The replicas of the parameters differ; raised on all ranks of the axis."""


def check_replicas(parameters: Iterable[tuple[str, Array]], axis: Axis) -> None:
    """Raise `ReplicaError` unless the named parameters have the same bits on all ranks of `axis`.

    parameters: names and values, replicated along `axis`. The error names
    the first that differs, and which ranks differ from the rest. Compares hashes (BLAKE2b), 16
    bytes for each parameter. Collective.
    """
    names, digests = [], bytearray()
    for name, parameter in parameters:
        names.append(name)
        values = np.ascontiguousarray(to_kind(parameter, "cpu"))
        digests += hashlib.blake2b(
            values.reshape(-1).view(np.uint8).data, digest_size=_DIGEST
        ).digest()
    if not names:
        return
    found = axis.allgather(np.frombuffer(digests, np.uint8))
    found = found.reshape(axis.size, len(names), _DIGEST)
    differs = np.flatnonzero((found != found[0]).any(axis=(0, 2)))
    if len(differs):
        raise ReplicaError(_report(axis, names[differs[0]], found[:, differs[0]], len(differs)))


def _report(axis: Axis, name: str, digests: np.ndarray[Any, Any], count: int) -> str:
    groups: dict[bytes, list[int]] = {}
    for rank, digest in enumerate(digests):
        groups.setdefault(digest.tobytes(), []).append(rank)
    # The largest group first; among equal ones that of the lowest rank.
    usual, *others = sorted(groups.values(), key=len, reverse=True)
    odd = sorted(rank for group in others for rank in group)
    more = f" (and {count - 1} more)" if count > 1 else ""
    return (
        f"replicas along {axis.name} have drifted apart: parameter {name}{more} differs on "
        f"{_ranks(odd)} from {_ranks(usual)}"
    )


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
