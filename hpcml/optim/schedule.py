"""Learning rate as a function of the step."""

from __future__ import annotations

import math


def learning_rate(
    step: int, *, lr: float, schedule: str, warmup: int, min_lr: float, steps: int
) -> float:
    """Return the learning rate of `step` (from 0).

    It rises linearly over `warmup` steps to `lr`; then it stays there ("constant"), or falls along
    half a cosine to `min_lr` at `steps` ("cosine": Loshchilov and Hutter 2017, without restarts).
    """
    if step < warmup:
        return lr * (step + 1) / (warmup + 1)
    if schedule == "constant":
        return lr
    if step >= steps:
        return min_lr
    progress = (step - warmup) / max(steps - warmup, 1)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (lr - min_lr)
