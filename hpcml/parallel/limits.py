"""What to do when memory runs out, said where the model and the batch are known."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hpcml.backend import PRECISIONS
from hpcml.errors import MemoryLimitError
from hpcml.optim import Optimizer
from hpcml.optim.buckets import Sharding
from hpcml.parallel.states import advice


@contextmanager
def advised(optimizer: Optimizer, sharding: Sharding, microbatch: int = 0) -> Iterator[None]:
    """Add to a `MemoryLimitError` from inside what would have fitted.

    microbatch: samples that are being computed. Nothing is added to what another rank has told.
    """
    try:
        yield
    except MemoryLimitError as error:
        if not error.live:
            raise
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        names = {dtype: name for name, dtype in PRECISIONS.items()}
        error.advise(
            advice(
                error,
                params=sum(p.numel() for p in trained),
                stage=sharding.stage,
                ranks=sharding.size,
                precision=names[trained[0].dtype.name],
                states=len(optimizer.states),
                microbatch=microbatch,
            )
        )
        raise
