"""The bytes of the model states by formula: parameters, gradients and optimizer state on a rank.

Rajbhandari et al. 2019, "ZeRO", section 5: of what each of N data-parallel ranks holds as a copy,
stage 1 keeps 1/N of the optimizer state, stage 2 of the gradients too, stage 3 of the parameters
too. With Adam in mixed precision (section 3.1: 2 + 2 bytes and 12 of optimizer state a parameter)
that makes 16, 4 + 12/N, 2 + 14/N and 16/N bytes a parameter; in single precision 16, 8 + 8/N,
4 + 12/N and 16/N.
"""

from __future__ import annotations

from hpcml.errors import MemoryLimitError

STAGES = (0, 1, 2, 3)
_SHARDED_FROM = {"params": 3, "grads": 2, "optim": 1}  # the stage
_ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "fp64": 8}


def model_states(stage: int, ranks: int, precision: str, states: int = 2) -> dict[str, float]:
    """Return the bytes a parameter on each of `ranks` ranks: of "params", "grads" and "optim".

    stage: 0 to 3. precision: "fp32", "fp64", "bf16" or "fp16"; with 16 bits the optimizer keeps
    parameters and states in 32. states: arrays that the optimizer keeps (Adam: 2).
    """
    size = _ITEMSIZE[precision]
    master = 4 if size == 2 else 0
    whole = {"params": size, "grads": size, "optim": master + states * max(size, 4)}
    return {
        name: nbytes / (ranks if stage >= _SHARDED_FROM[name] else 1)
        for name, nbytes in whole.items()
    }


def fitting_stages(
    params: int, ranks: int, precision: str, budget: float, states: int = 2
) -> list[int]:
    """Return the stages whose states of `params` parameters fit into `budget` bytes a rank."""
    return [
        stage for stage in STAGES
        if params * sum(model_states(stage, ranks, precision, states).values()) <= budget
    ]  # fmt: skip


def advice(
    error: MemoryLimitError,
    *,
    params: int,
    stage: int,
    ranks: int,
    precision: str,
    states: int,
    microbatch: int,
) -> str:
    """Return what would have fitted where `error` was raised: higher stages, a smaller microbatch.

    params, stage, ranks, precision, states: as for `model_states`. microbatch: samples of the one
    under way, 0 if there was none. Both answers are bounds: what the rest of the step would have
    allocated is not known, so a stage needs "at least", a microbatch has "at most".
    """
    held = dict(error.live)
    held[error.category] += error.request
    rest = held["activations"] + held["buffers"]
    lines = []
    for higher in fitting_stages(params, ranks, precision, error.limit - rest, states):
        if higher > stage and ranks > 1:
            need = params * sum(model_states(higher, ranks, precision, states).values()) + rest
            lines.append(f"  zero.stage={higher}: needs at least {need:,.0f} bytes a rank")
    most = _samples(held, error.limit, microbatch)
    if most:
        lines.append(f"  train.microbatch={most}, at most: {microbatch} samples were under way")
    if not lines:
        return (
            "neither a higher zero.stage nor a smaller train.microbatch would fit: use more ranks "
            "with zero.stage=3, a smaller model, or a higher device.memory_limit"
        )
    return "\n".join(["what would fit:", *lines])


def _samples(held: dict[str, int], limit: int, microbatch: int) -> int:
    """Samples whose activations fit beside the rest; each of `microbatch` holds at least so much.

    Fewer than `microbatch`, because `held` exceeds `limit`.
    """
    activations = held["activations"]
    room = limit - (sum(held.values()) - activations)
    return max(room * microbatch // activations, 0) if activations else 0
