"""Batch norm over data-parallel ranks: as of the whole batch on one rank, and PyTorch's."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hpcml
from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from hpcml.errors import UserError
from tests.parallel.cases import name_of, ranks_of, serial_mesh, values
from tests.parallel.spatial.models import MODELS

cases = pytest.mark.parametrize
SIZES = (7, 2, 5)
"""Of batches: uneven shares, and ranks that have none."""


def trained(kind: str, mesh: Mesh, **options: Any) -> Any:
    model, loss, batch = MODELS[kind]
    step = hpcml.parallelize(
        model().to(np.float64), loss=loss, optimizer=hpcml.optim.SGD, lr=0.1, momentum=0.9, seed=3,
        mesh=mesh, sync_batchnorm=True, **options,
    )  # fmt: skip
    losses = [step(batch(number, size)) for number, size in enumerate(SIZES)]
    return losses, values(step), step.gathered_buffers(), step.measure([batch(9)])["loss"]


@cases(
    ("kind", "layout", "options"),
    [
        ("classifier", {"dp": 2}, {}),
        ("classifier", {"dp": 3}, {"zero": 1}),
        ("resnet", {"dp": 3}, {"zero": 3}),
        ("classifier", {"dp": 3}, {"overlap": True}),
        ("classifier", {"dp": 2, "sp_h": 2}, {}),
        ("divided", {"dp": 2, "sp_w": 2}, {"zero": 2}),
        ("heights", {"dp": 2, "sp_w": 2}, {}),
    ],
    ids=name_of,
)
def test_as_the_whole_batch(kind: str, layout: dict[str, int], options: dict[str, Any]) -> None:
    losses, parameters, buffers, measured = trained(kind, serial_mesh())

    def program() -> Any:
        return trained(kind, Mesh(**layout), **options)

    for found in on_threads(program, ranks=ranks_of(layout), timeout=30):
        np.testing.assert_allclose(found[0], losses, rtol=1e-11)
        for name, array in parameters.items():
            largest = np.abs(array).max()
            np.testing.assert_allclose(found[1][name], array, 0, 1e-11 * largest, err_msg=name)
        for name, array in buffers.items():
            np.testing.assert_allclose(found[2][name], array, 1e-5, 1e-6, err_msg=name)
        np.testing.assert_allclose(found[3], measured, rtol=1e-5)


def test_refused_where_ranks_do_not_meet() -> None:
    def program() -> None:
        with pytest.raises(UserError, match=r"sync_batchnorm=true with data_parallel.mode=local"):
            trained("classifier", Mesh(), mode="local")
        with pytest.raises(UserError, match=r"sync_batchnorm=true with mesh.pp=2: .*mesh.pp=1"):
            trained("classifier", Mesh(pp=2, dp=2))

    on_threads(program, ranks=4)
