"""The mesh of the tests: of this process alone, and, under mpiexec, of all ranks."""

from __future__ import annotations

import pytest

from hpcml.comm import Mesh
from tests.comm.conftest import job
from tests.parallel.cases import serial_mesh

__all__ = ["job", "mesh"]


@pytest.fixture(params=["alone", pytest.param("ranks", marks=pytest.mark.mpi)])
def mesh(request: pytest.FixtureRequest) -> Mesh:
    """Where to train."""
    return serial_mesh() if request.param == "alone" else Mesh()
