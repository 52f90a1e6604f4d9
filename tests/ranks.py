"""Programs of ranks in tests: on threads, and on the ranks of mpiexec."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from hpcml.comm import run

OnRanks = Callable[..., None]


def on_ranks_of(where: Callable[..., Any], counts: Sequence[int] = (1, 2, 3, 4)) -> Any:
    """A fixture: `on_ranks(program)` runs `program(where())` on so many threads, or under mpiexec.

    where: makes the mesh or the axis; named arguments of `on_ranks` are passed on to it.
    """

    @pytest.fixture(params=[*counts, pytest.param("mpi", marks=pytest.mark.mpi)])
    def on_ranks(request: pytest.FixtureRequest) -> OnRanks:
        def start(program: Callable[[Any], None], **options: Any) -> None:
            def here() -> None:
                program(where(**options))

            if request.param == "mpi":
                here()
            else:
                run(here, ranks=request.param)

        return start

    return on_ranks
