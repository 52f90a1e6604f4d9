"""What a rank reads of an image for its block of a layer's output: arithmetic along one dimension.

Places are counted in the whole image; an output that a rank computes is counted in the whole
output. A layer of windows reads at output o the places o stride - before + tap dilation.
"""

from __future__ import annotations

from dataclasses import dataclass

from hpcml.autograd.ops.pooling import Band
from hpcml.nn.part import Range


@dataclass(frozen=True)
class Window:
    """Windows along one dimension."""

    size: int
    stride: int
    before: int
    """Padding."""
    dilation: int

    def reads(self, outputs: Range) -> Range:
        """The places that outputs (first, end) read, which may lie beyond the image."""
        first, end = outputs
        start = first * self.stride - self.before
        return start, (end - 1) * self.stride - self.before + (self.size - 1) * self.dilation + 1

    def scattered_from(self, outputs: Range, n: int) -> Range:
        """Of n places, those from which the transposed layer makes these outputs.

        Output o comes of place i and tap t where o = i stride - before + t dilation. At least one
        place, from which the first output can be counted.
        """
        first, end = outputs
        reach = (self.size - 1) * self.dilation
        low = min(-(-(first + self.before - reach) // self.stride),
                  (first + self.before) // self.stride)  # fmt: skip
        low = min(max(low, 0), n - 1)
        high = (end - 1 + self.before) // self.stride + 1
        return low, max(min(high, n), low + 1)


def within(reads: Range, n: int) -> Range:
    """What of a range lies in an image of n places; one place at least."""
    first = min(max(reads[0], 0), n - 1)
    return first, max(min(reads[1], n), first + 1)


def mirrored(reads: Range, n: int, mode: str) -> Range:
    """What of an image of n places a range reads that goes on beyond its ends by `mode`.

    "reflect": the inner places mirrored; "replicate": the outermost.
    """
    first, end = within(reads, n)
    if mode == "reflect":
        before, after = max(-reads[0], 0), max(reads[1] - n, 0)
        if before:
            end = max(end, min(before + 1, n))
        if after:
            first = min(first, max(n - 1 - after, 0))
    return first, end


def rows(band: Band, outputs: Range) -> tuple[Range, Band]:
    """What outputs (first, end) read that are products with a band matrix, and their matrix."""
    first, end = outputs
    starts, counts = band.first[first:end], band.count[first:end]
    low, high = int(starts.min()), int((starts + counts).max())
    return (low, high), Band(starts - low, counts, band.weights[first:end])
