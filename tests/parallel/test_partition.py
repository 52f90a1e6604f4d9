"""Activations that all ranks would save alike, divided among them."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import hpcml
from hpcml import memory
from hpcml.comm import Mesh
from hpcml.models import GPT, NextTokenLoss
from hpcml.parallel.partition import partitioned


def backward(model: hpcml.nn.Module, mesh: Mesh | None) -> tuple[dict[str, np.ndarray], int]:
    """Gradients of a batch that is the same on all ranks, and the bytes saved for backward."""
    tokens = np.random.default_rng(0).integers(0, 11, (2, 3, 30))
    gc.collect()
    before = memory.account().live["activations"]
    if mesh is None:
        loss = NextTokenLoss()(model(tokens[0]), tokens[1])
    else:
        with partitioned(mesh["dp"]):
            loss = NextTokenLoss()(model(tokens[0]), tokens[1])
    saved = memory.account().live["activations"] - before
    model.zero_grad()
    loss.backward()
    return {n: p.grad.numpy().copy() for n, p in model.named_parameters()}, saved


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_same_gradients_with_a_part_of_the_memory(mesh: Mesh, dtype: str) -> None:
    model = GPT(11, 30, layers=3, heads=2, width=50).to(hpcml.backend.dtype(dtype))
    whole, all_bytes = backward(model, None)
    found, part_bytes = backward(model, mesh)
    for name, array in whole.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)
    if mesh.size > 1:
        assert part_bytes < 1.15 * all_bytes / mesh.size
    else:
        assert part_bytes == all_bytes
