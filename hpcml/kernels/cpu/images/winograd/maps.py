"""The linear maps of Winograd's convolution: M X M^T of many small matrices X at once.

F(4 x 4, 3 x 3) of Lavin and Gray 2016 ("Fast algorithms for convolutional neural networks",
section 4.1): 4 x 4 outputs of a 3 x 3 filter by 36 multiplications instead of 144,

    Y = A^T [(G w G^T) * (B^T x B)] A,

where x are 6 x 6 inputs and * is element by element. Its adjoints need the same maps and A, G^T.
The matrices are those of Toom and Cook for some points and infinity: products of polynomials are
computed from their values. Points decide how large rounding errors are (Barabasz et al. 2020,
"Error analysis and improving the accuracy of Winograd convolution for deep neural networks"); of
dyadic ones with +- pairs, which leave zeros in B, these gave the smallest, half of those of the
usual 0, +-1, +-2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from hpcml.kernels.cpu.images.tiles import BYTES, Code, of_words

OUT, TAPS, IN = 4, 3, 6
"""Sides of a tile of outputs, of the filter, and of the inputs of a tile."""
ALL = IN * IN
"""Numbers that a tile becomes."""

_POINTS = (Fraction(0), Fraction(3, 4), Fraction(-3, 4), Fraction(3, 2), Fraction(-3, 2))

Matrix = Sequence[Sequence[float | Fraction]]


def _with_roots(roots: Sequence[Fraction]) -> list[Fraction]:
    """Coefficients, the constant first, of a polynomial with these roots; as many as inputs."""
    made = [Fraction(1)]
    for root in roots:
        low, high = [*made, Fraction(0)], [Fraction(0), *made]
        made = [h - root * c for c, h in zip(low, high, strict=True)]
    return made + [Fraction(0)] * (IN - len(made))


def _transposed(matrix: Matrix) -> Matrix:
    return list(zip(*matrix, strict=True))


def matrices() -> tuple[Matrix, Matrix, Matrix]:
    """A^T (4 x 6), G (6 x 3) and B^T (6 x 6) of the points."""
    a = [[p**i for i in range(OUT)] for p in _POINTS] + [
        [Fraction(i == OUT - 1) for i in range(OUT)]
    ]
    g, b = [], []
    for p in _POINTS:
        others = [q for q in _POINTS if q != p]
        g.append([p**k / math.prod(p - q for q in others) for k in range(TAPS)])
        b.append(_with_roots(others))
    g.append([Fraction(k == TAPS - 1) for k in range(TAPS)])
    b.append(_with_roots(_POINTS))
    return _transposed(a), g, b


def _multiplied(code: Code, matrix: Matrix, vectors: Sequence[Any]) -> list[Any]:
    """The product of a constant matrix and a column of vectors."""
    fma = code.of_vectors("llvm.fma", code.vector, *[code.vector] * 3)
    found = []
    for row in matrix:
        total = None
        for factor, vector in zip(row, vectors, strict=True):
            if factor == 0:
                continue
            if total is None and factor == 1:
                total = vector
                continue
            number = ir.Constant(code.vector, [float(factor)] * code.lanes)
            if total is None:
                total = code.builder.fmul(number, vector)
            else:
                total = code.builder.call(fma, [number, vector, total])
        found.append(total)
    return found


def _sandwich(matrix: Matrix, starts: bool = False) -> Any:
    rows, columns = len(matrix), len(matrix[0])

    @intrinsic
    def sandwich(
        typingctx: Any, zero: Any, count: Any, sources: Any, shift: Any, begins: Any, targets: Any,
        offset: Any,
    ) -> Any:  # fmt: skip
        """targets = begins + matrix sources matrix^T, for `count` numbers that lie side by side.

        sources, begins, targets: tables of the addresses of the entries, row by row; shift and
        offset are added to those of sources, and of the others. begins is not looked at unless
        `starts`.
        """

        def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            _, count, sources, shift, begins, targets, offset = args
            code = Code(context, builder, signature.args[0])
            word, none = count.type, count.type(0)
            steps = builder.sdiv(builder.add(count, word(code.lanes - 1)), word(code.lanes))
            with cgutils.for_range(builder, steps) as step:
                moved = builder.mul(step.index, word(BYTES))
                mask = code.mask(builder.sub(count, builder.mul(step.index, word(code.lanes))))
                from_ = code.words(sources, none, columns**2, builder.add(shift, moved))
                to = code.words(targets, none, rows**2, builder.add(offset, moved))
                x = [code.some(place, mask) for place in from_]
                half = [_multiplied(code, matrix, x[j::columns]) for j in range(columns)]
                lines = [
                    _multiplied(code, matrix, [column[i] for column in half]) for i in range(rows)
                ]
                found = [value for line in lines for value in line]
                if starts:
                    first = code.words(begins, none, rows**2, builder.add(offset, moved))
                    before = [code.some(place, mask) for place in first]
                    found = [builder.fadd(*pair) for pair in zip(before, found, strict=True)]
                for value, place in zip(found, to, strict=True):
                    code.store_some(value, mask, place)
            return context.get_dummy_value()

        return of_words(zero, 6), generate

    return sandwich


_a, _g, _b = matrices()
of_inputs = _sandwich(_b)
of_filters = _sandwich(_g)
to_outputs = _sandwich(_a, starts=True)
of_outputs = _sandwich(_transposed(_a))
to_filters = _sandwich(_transposed(_g))
