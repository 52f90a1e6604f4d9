"""Numbers moved in whole vectors: copied, gathered, transposed. Memory is as in `tiles`."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils
from numba.extending import intrinsic

from hpcml.kernels.cpu.images.tiles import BYTES, DEEP, Code, of_words

_WORD, _INT = ir.IntType(64), ir.IntType(32)


@intrinsic
def copy(typingctx: Any, zero: Any, count: Any, source: Any, target: Any) -> Any:
    """Copy `count` numbers from one address to another, in whole vectors and a masked one."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, count, source, target = args
        code = Code(context, builder, signature.args[0])
        steps = builder.sdiv(builder.add(count, _WORD(code.lanes - 1)), _WORD(code.lanes))
        with cgutils.for_range(builder, steps) as step:
            chosen = code.mask(builder.sub(count, builder.mul(step.index, _WORD(code.lanes))))
            offset = builder.mul(step.index, _WORD(BYTES))
            code.store_some(code.some(source, chosen, offset), chosen, target, offset)
        return context.get_dummy_value()

    return of_words(zero, 3), generate


@intrinsic
def gather(
    typingctx: Any, zero: Any, count: Any, few: Any, sources: Any, shift: Any, target: Any
) -> Any:
    """Copy `few` numbers, at most DEEP, from each of `count` addresses, moved by shift, to a row.

    Rows begin at `target`, as many whole vectors apart as DEEP numbers need.
    """

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        _, count, few, sources, shift, target = args
        code = Code(context, builder, signature.args[0])
        vectors = -(-DEEP * code.size // BYTES)
        masks = [code.mask(builder.sub(few, _WORD(v * code.lanes))) for v in range(vectors)]
        with cgutils.for_range(builder, count) as row:
            (source,) = code.words(sources, row.index, 1, shift)
            there = builder.add(target, builder.mul(row.index, _WORD(vectors * BYTES)))
            for v, mask in enumerate(masks):
                code.store_some(code.some(source, mask, v * BYTES), mask, there, v * BYTES)
        return context.get_dummy_value()

    return of_words(zero, 5), generate


@intrinsic
def transpose(typingctx: Any, zero: Any, sources: Any, targets: Any) -> Any:
    """Transpose a square of as many numbers as a vector has: tables of its rows, and of columns."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        code = Code(context, builder, signature.args[0])
        lanes, first = code.lanes, _WORD(0)
        rows = [code.load(address) for address in code.words(args[1], first, lanes, first)]
        kind = ir.VectorType(_INT, lanes)
        apart = 1
        while apart < lanes:  # of pairs of rows, exchange what lies across the diagonal
            low = [j if not j & apart else lanes + j - apart for j in range(lanes)]
            high = [j + apart if not j & apart else lanes + j for j in range(lanes)]
            for i in (i for i in range(lanes) if not i & apart):
                pair = rows[i], rows[i + apart]
                for which, mask in ((i, low), (i + apart, high)):
                    rows[which] = builder.shuffle_vector(*pair, ir.Constant(kind, mask))
            apart *= 2
        for row, address in zip(rows, code.words(args[2], first, lanes, first), strict=True):
            code.store(row, address)
        return context.get_dummy_value()

    return of_words(zero, 2), generate
