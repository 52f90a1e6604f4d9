"""Which layers of a divided model save what all tensor-parallel ranks save alike (ZeRO-R's P_a).

Rajbhandari et al. 2019, section 6.1. They are those that begin a region in which ranks divide
features, which save their whole input, and those with parameters that every rank has and trains
alike, and no layers below them, such as a layer norm. What lies within a region is divided already,
and with sequence parallelism so is what lies between.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hpcml.comm import Axis
from hpcml.nn import Module
from hpcml.parallel.partition import partitioned
from hpcml.parallel.tensor.convolutions import ColumnParallelConv
from hpcml.parallel.tensor.layers import ColumnParallelLinear


def keep_parts(model: Module, axis: Axis, *, offload: bool) -> None:
    """Let these layers keep this rank's part only; backward gathers the rest. See `partitioned`."""
    for module in model.modules():
        own = module._parameters.values()
        alike = (
            own
            and not module._modules
            and all(p.part is None and axis.name not in p.layout for p in own)
        )
        if alike or isinstance(module, ColumnParallelLinear | ColumnParallelConv):
            module.forward = _within(module.forward, axis, offload)  # type: ignore[method-assign]


def _within(forward: Callable[..., Any], axis: Axis, offload: bool) -> Callable[..., Any]:
    def partly(*args: Any, **kwargs: Any) -> Any:
        with partitioned(axis, offload=offload):
            return forward(*args, **kwargs)

    return partly
