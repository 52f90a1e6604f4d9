"""Small blocks of matrix products whose sums stay in registers: the inner loops of convolutions.

A tile has some rows and one or two vectors of columns: as many sums as the CPU has registers for,
less what holds the factors (Goto and van de Geijn 2008, section 6). They are written in LLVM's own
language, because numba has no vectors; LLVM makes of them what BLAS libraries have in assembly.

Memory is given by address and offsets in bytes; tables are of addresses. `zero` is a 0 of the type
of the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from llvmlite import binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WORD, _INT, _BYTE = ir.IntType(64), ir.IntType(32), ir.IntType(8)
_AHEAD = 8
"""Rows of the right factor that are asked for before they are needed."""


def _registers() -> tuple[int, int, int]:
    """Rows of a tile; the same of sums over rows, of which powers of 2 are most; bytes a vector."""
    features = llvm.get_host_cpu_features()
    if features.get("avx512f"):
        return 14, 13, 64  # 32 registers: 28 sums, 2 of the one factor, 1 or 2 of the other
    if features.get("avx2"):
        return 6, 6, 32  # 16 registers
    return 14, 13, 16  # AArch64 has 32; where there are fewer, LLVM keeps some sums in memory


HIGH, DEEP, BYTES = _registers()


class Code:
    """Writes LLVM's language: vectors in memory, and a tile of sums."""

    def __init__(self, context: Any, builder: Any, zero: Any, rows: int = 0, vectors: int = 0):
        self.builder = builder
        self.real = context.get_value_type(zero)
        self.size = zero.bitwidth // 8
        self.lanes = BYTES // self.size
        self.vector = ir.VectorType(self.real, self.lanes)
        self.sums = [
            [cgutils.alloca_once(builder, self.vector) for _ in range(vectors)] for _ in range(rows)
        ]

    def function(self, name: str, result: Any, *arguments: Any) -> Any:
        """One of LLVM's own functions."""
        kind = ir.FunctionType(result, arguments)
        return cgutils.get_or_insert_function(self.builder.module, kind, name)

    def of_vectors(self, name: str, result: Any, *arguments: Any) -> Any:
        """One of LLVM's functions of vectors."""
        return self.function(f"{name}.v{self.lanes}f{8 * self.size}", result, *arguments)

    def at(self, address: Any, offset: Any, kind: Any) -> Any:
        """A pointer to `offset` bytes beyond an address."""
        offset = _WORD(offset) if isinstance(offset, int) else offset
        return self.builder.inttoptr(self.builder.add(address, offset), kind.as_pointer())

    def words(self, table: Any, first: Any, count: int, more: Any) -> list[Any]:
        """`count` words of a table, from number `first` on, to which `more` is added."""
        start = self.builder.inttoptr(table, _WORD.as_pointer())
        places = [self.builder.add(first, _WORD(i)) for i in range(count)]
        found = [self.builder.load(self.builder.gep(start, [place])) for place in places]
        return [self.builder.add(word, more) for word in found]

    def load(self, address: Any, offset: Any = 0) -> Any:
        """The vector at an address."""
        return self.builder.load(self.at(address, offset, self.vector), align=self.size)

    def mask(self, count: Any) -> Any:
        """Which places of a vector lie before `count`."""
        numbers = ir.Constant(ir.VectorType(_WORD, self.lanes), list(range(self.lanes)))
        return self.builder.icmp_signed("<", numbers, self.spread(count, numbers.type))

    def some(self, address: Any, mask: Any, offset: Any = 0) -> Any:
        """The numbers at an address where the mask is set, else 0; the others are not read."""
        pointer = self.vector.as_pointer()
        load = self.of_vectors(
            "llvm.masked.load", self.vector, pointer, _INT, mask.type, self.vector
        )
        here, nothing = self.at(address, offset, self.vector), ir.Constant(self.vector, None)
        return self.builder.call(load, [here, _INT(self.size), mask, nothing])

    def store(self, value: Any, address: Any, offset: Any = 0) -> None:
        """Store a vector at an address."""
        self.builder.store(value, self.at(address, offset, self.vector), align=self.size)

    def store_some(self, value: Any, mask: Any, address: Any, offset: Any = 0) -> None:
        """Store the numbers of a vector where the mask is set; others there stay as they are."""
        pointer = self.vector.as_pointer()
        store = self.of_vectors(
            "llvm.masked.store", ir.VoidType(), self.vector, pointer, _INT, mask.type
        )
        self.builder.call(
            store, [value, self.at(address, offset, self.vector), _INT(self.size), mask]
        )

    def fetch(self, address: Any, offset: int, to_write: bool = False) -> None:
        """Ask for a line, to be in all caches."""
        prefetch = self.function(
            "llvm.prefetch.p0", ir.VoidType(), _BYTE.as_pointer(), _INT, _INT, _INT
        )
        pointer = self.at(address, offset, _BYTE)
        self.builder.call(prefetch, [pointer, _INT(int(to_write)), _INT(3), _INT(1)])

    def begin(self, addresses: Sequence[Any]) -> None:
        """Set each row of sums to what is at its address."""
        for sums, address in zip(self.sums, addresses, strict=True):
            for v, place in enumerate(sums):
                self.builder.store(self.load(address, v * BYTES), place)

    def add(self, left: Sequence[Any], right: Any) -> None:
        """Add to sum (r, v) the number at left[r] times vector v of the row at `right`."""
        fma = self.of_vectors("llvm.fma", self.vector, *[self.vector] * 3)
        factors = [self.load(right, v * BYTES) for v in range(len(self.sums[0]))]
        for pointer, sums in zip(left, self.sums, strict=True):
            number = self.spread(self.builder.load(pointer), self.vector)
            for place, factor in zip(sums, factors, strict=True):
                total = self.builder.load(place)
                self.builder.store(self.builder.call(fma, [number, factor, total]), place)

    def spread(self, number: Any, vector: Any) -> Any:
        """A vector of the same number."""
        undefined = ir.Constant(vector, ir.Undefined)
        first = self.builder.insert_element(undefined, number, _INT(0))
        zeros = ir.Constant(ir.VectorType(_INT, vector.count), [0] * vector.count)
        return self.builder.shuffle_vector(first, undefined, zeros)

    def end(self, addresses: Sequence[Any]) -> None:
        """Store each row of sums at its address."""
        for sums, address in zip(self.sums, addresses, strict=True):
            for v, place in enumerate(sums):
                self.store(self.builder.load(place), address, v * BYTES)


def _apart(builder: Any, name: str, words: Sequence[Any]) -> Any:
    """Call a function of its own: a builder for its body and its arguments, None if it has one.

    Registers are given out by function. Within a long one, where much else is alive, the addresses
    of an innermost loop would go to memory and back with each step.
    """
    known = builder.module.globals.get(name)
    kind = ir.FunctionType(ir.VoidType(), [_WORD] * len(words))
    function = known or ir.Function(builder.module, kind, name)
    builder.call(function, words)
    if known is not None:
        return None
    function.linkage = "internal"
    function.attributes.add("noinline")
    return ir.IRBuilder(function.append_basic_block()), function.args


def of_words(zero: Any, count: int) -> Any:
    """The type of a function of numbers like `zero` that takes so many words."""
    return types.void(zero, *[types.int64] * count)


def _rows(vectors: int) -> Any:
    @intrinsic
    def rows(
        typingctx: Any, zero: Any, left: Any, ahead: Any, taps: Any, run: Any, right: Any,
        begins: Any, outs: Any, column: Any,
    ) -> Any:  # fmt: skip
        """out[r] = begin[r] + sum over t and c of left[t, r][c] * right[t * run + c].

        left, begins and outs: tables (taps, HIGH), (HIGH), (HIGH); the addresses of the last two
        are moved by column. right: a matrix (taps * run, vectors). ahead: bytes from numbers of
        `left` to some that are needed later; a line of these is asked for in each step, because
        many requests at once would keep others waiting.
        """

        def generate(context: Any, outside: Any, signature: Any, args: Any) -> Any:
            size = signature.args[0].bitwidth // 8
            inside = _apart(outside, f"hpcml_rows_{vectors}_{size}", args[1:])
            if inside is None:
                return context.get_dummy_value()
            builder, (left, ahead, taps, run, right, begins, outs, column) = inside
            code = Code(context, builder, signature.args[0], HIGH, vectors)
            high, width = _WORD(HIGH), vectors * BYTES
            for address in code.words(outs, _WORD(0), HIGH, column):
                for offset in range(0, width, 64):
                    code.fetch(address, offset, to_write=True)
            code.begin(code.words(begins, _WORD(0), HIGH, column))
            with cgutils.for_range(builder, taps) as tap:
                lines = code.words(left, builder.mul(tap.index, high), HIGH, _WORD(0))
                before, later = builder.mul(tap.index, run), builder.add(lines[0], ahead)
                with cgutils.for_range(builder, run) as place:
                    along = builder.mul(place.index, _WORD(code.size))
                    step = builder.mul(builder.add(before, place.index), _WORD(width))
                    row = builder.add(right, step)
                    for offset in range(0, width, 64):
                        code.fetch(row, _AHEAD * width + offset)
                    line = builder.mul(place.index, _WORD(64))
                    code.fetch(builder.add(later, line), 0)
                    code.add([code.at(line, along, code.real) for line in lines], row)
            code.end(code.words(outs, _WORD(0), HIGH, column))
            builder.ret_void()
            return context.get_dummy_value()

        return of_words(zero, 8), generate

    return rows


def _columns(vectors: int, fetching: bool) -> Any:
    @intrinsic
    def columns(
        typingctx: Any, zero: Any, left: Any, pitch: Any, count: Any, right: Any, outs: Any,
        column: Any, ahead: Any, pace: Any,
    ) -> Any:  # fmt: skip
        """out[i] += sum over k of left[k, i] * right[k].

        left: rows of DEEP numbers, `pitch` bytes apart. right: rows of two vectors, of which these
        are the first. outs: a table (DEEP), whose addresses are moved by column. If `fetching`, the
        line at ahead is asked for, and with each row what lies `pace` bytes further: numbers that
        are needed later.
        """

        def generate(context: Any, outside: Any, signature: Any, args: Any) -> Any:
            size = signature.args[0].bitwidth // 8
            name = f"hpcml_columns_{vectors}_{fetching}_{size}"
            inside = _apart(outside, name, args[1:])
            if inside is None:
                return context.get_dummy_value()
            builder, (left, pitch, count, right, outs, column, ahead, pace) = inside
            code = Code(context, builder, signature.args[0], DEEP, vectors)
            places = code.words(outs, _WORD(0), DEEP, column)
            code.begin(places)
            with cgutils.for_range(builder, count) as place:
                line = builder.add(left, builder.mul(place.index, pitch))
                numbers = [code.at(line, i * code.size, code.real) for i in range(DEEP)]
                step = builder.mul(place.index, _WORD(2 * BYTES))
                if fetching:
                    code.fetch(builder.add(ahead, builder.mul(place.index, pace)), 0)
                code.add(numbers, builder.add(right, step))
            code.end(places)
            builder.ret_void()
            return context.get_dummy_value()

        return of_words(zero, 8), generate

    return columns


rows_of_one, rows_of_two = _rows(1), _rows(2)
columns_of_one, columns_of_two = _columns(1, False), _columns(2, False)
columns_fetching = _columns(2, True)
