"""Whole models whose images ranks divide, beside the same model of one rank, batch by batch."""

from __future__ import annotations

from typing import Any

import pytest

from hpcml.comm import Mesh
from hpcml.comm import run as on_threads
from tests.parallel.cases import name_of, ranks_of
from tests.parallel.spatial.models import same

cases = pytest.mark.parametrize
FP32 = {"dtype": "float32"}
WAYS: list[tuple[str, dict[str, int], dict[str, Any]]] = [
    ("classifier", {"sp_w": 2}, {}),
    ("divided", {"sp_h": 2}, {"zero": 2}),
    ("ignored", {"sp_h": 2}, {"zero": 1}),
    ("ignored", {"dp": 2, "sp_w": 2}, {}),
    ("volume", {"sp_d": 2}, {"zero": 3}),
    ("classifier", {"sp_h": 2}, FP32),
    ("heights", {"sp_w": 2}, {"microbatch": 3, "zero": 1}),
    ("classifier", {"sp_w": 3}, {"zero": 1}),
    ("deep", {"sp_h": 3}, {"zero": 3, "overlap": True}),
    ("classifier", {"sp_h": 3}, {"spatial_end": "block", "spatial_style": "samples"}),
    ("squares", {"sp_w": 3}, {}),
    ("volume", {"sp_w": 3}, FP32),
    ("classifier", {"sp_h": 2, "sp_w": 2}, {}),
    ("divided", {"sp_w": 4}, {"zero": 1}),
    ("divided", {"sp_h": 2, "sp_w": 2}, {"zero": 3}),
    ("deep", {"sp_h": 2, "sp_w": 2}, {}),
    ("pixels", {"sp_h": 2, "sp_w": 2}, {"zero": 2}),
    ("pixels", {"sp_h": 4}, FP32),
    ("volume", {"sp_d": 2, "sp_w": 2}, {}),
    ("classifier", {"dp": 2, "sp_h": 2}, {"zero": 1}),
    ("pixels", {"dp": 2, "sp_w": 2}, {"zero": 2}),
    ("divided", {"dp": 2, "sp_w": 2}, {"zero": 3}),
    ("heights", {"dp": 2, "sp_h": 2}, {"zero": 1, "shard_ranks": 2}),
    ("classifier", {"dp": 2, "sp_w": 2}, {**FP32, "zero": 3}),
    ("resnet", {"sp_w": 2}, {}),
    ("resnet", {"sp_h": 2, "sp_w": 2}, {"zero": 1}),
    ("meshnet", {"sp_w": 3}, {}),
    ("meshnet", {"dp": 2, "sp_h": 2}, {"zero": 3}),
    ("meshnet3", {"sp_d": 2, "sp_w": 2}, {"zero": 2}),
    ("volume", {"dp": 2, "sp_d": 2, "sp_h": 1, "sp_w": 2}, {"zero": 3}),
]


@cases(("kind", "layout", "options"), WAYS, ids=name_of)
def test_training_is_that_of_one_rank(
    kind: str, layout: dict[str, int], options: dict[str, Any]
) -> None:
    on_threads(lambda: same(kind, layout, options), ranks=ranks_of(layout))


@pytest.mark.mpi
@cases(("kind", "layout", "options"), WAYS, ids=name_of)
def test_training_with_mpi(kind: str, layout: dict[str, int], options: dict[str, Any]) -> None:
    """Likewise on the processes of mpiexec, on as many ranks as there are."""
    if ranks_of(layout) == Mesh().size > 1:
        same(kind, layout, options)
