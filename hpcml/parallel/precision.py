"""Dynamic loss scaling: gradients in float16 are computed large enough not to vanish.

Micikevicius et al. 2018, "Mixed precision training", section 3.2; the constants are PyTorch's.
"""

from __future__ import annotations


class LossScaler:
    """The factor of the loss: lowered when a gradient overflows, raised after a time without.

    It depends on nothing but the sequence of overflows, so it is the same on all ranks.
    """

    def __init__(
        self,
        scale: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
    ) -> None:
        self.scale = scale
        """By how much the loss is multiplied, and gradients divided."""
        self._growth, self._backoff, self._interval = growth, backoff, interval
        self._good = 0  # steps since the scale was changed

    @property
    def exhausted(self) -> bool:
        """Whether the scale is as low as it gets: an overflow now is the model's own."""
        return self.scale <= 1

    def update(self, overflow: bool) -> None:
        """Take note of a step; `overflow`: its gradient was not finite, and it was skipped."""
        self._good = 0 if overflow else self._good + 1
        if overflow:
            self.scale = max(self.scale * self._backoff, 1.0)
        elif self._good == self._interval:
            self.scale, self._good = self.scale * self._growth, 0
