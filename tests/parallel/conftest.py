"""The mesh of the tests: of this process alone, and, under mpiexec, of all ranks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import pytest

from hpcml.comm import Mesh
from hpcml.comm.choice import VARIABLE
from tests.comm.conftest import job
from tests.parallel.cases import serial_mesh

__all__ = ["job", "mesh"]


@pytest.fixture(params=["alone", pytest.param("ranks", marks=pytest.mark.mpi)])
def mesh(request: pytest.FixtureRequest) -> Mesh:
    """Where to train."""
    return serial_mesh() if request.param == "alone" else Mesh()


@pytest.fixture
def rings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Algorithms whose volume does not depend on the size of the message."""
    chosen = {"allgather": "ring", "reduce_scatter": "pairwise"}
    rows = [f'{operation} = [[inf, "{name}"]]' for operation, name in chosen.items()]
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:  # of this rank alone
        file.write("\n".join("\n".join([f"[node.{ranks}]", *rows]) for ranks in (2, 3, 4)))
        file.flush()
        monkeypatch.setenv(VARIABLE, file.name)
        yield
