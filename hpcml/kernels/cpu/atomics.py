"""Words that several threads or processes read and write at once, and what to do while waiting."""

from __future__ import annotations

import platform
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_X86 = platform.machine() in ("x86_64", "AMD64")
sched_yield = types.ExternalFunction("sched_yield", types.int32())


def _pointer(context: Any, builder: Any, signature: Any, args: Any) -> Any:
    """Address of element `args[1]` of the array `args[0]`."""
    array = context.make_array(signature.args[0])(context, builder, args[0])
    return builder.gep(array.data, [args[1]])


@intrinsic
def load(typingctx: Any, words: Any, index: Any) -> Any:
    """Read a word that another sets; what that one wrote before is visible afterwards."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load_atomic(_pointer(context, builder, signature, args), "seq_cst", 8)

    return types.int64(words, index), generate


@intrinsic
def store(typingctx: Any, words: Any, index: Any, value: Any) -> Any:
    """Set a word for others; what this one wrote before is visible to who reads it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature, args)
        builder.store_atomic(args[2], pointer, "release", 8)
        return context.get_dummy_value()

    return types.void(words, index, value), generate


@intrinsic
def exchange(typingctx: Any, words: Any, index: Any, value: Any) -> Any:
    """Set a word and return what it was; what comes after it in the program comes after it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature, args)
        return builder.atomic_rmw("xchg", pointer, args[2], "seq_cst")

    return types.int64(words, index, types.int64), generate


@intrinsic
def add(typingctx: Any, words: Any, index: Any, value: Any) -> Any:
    """Add to a word and return what it was; what comes after it in the program comes after it."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pointer = _pointer(context, builder, signature, args)
        return builder.atomic_rmw("add", pointer, args[2], "seq_cst")

    return types.int64(words, index, types.int64), generate


@intrinsic
def relax(typingctx: Any) -> Any:
    """Tell the CPU that this is a waiting loop."""

    def generate(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if _X86:
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(builder.module.declare_intrinsic("llvm.x86.sse2.pause", [], kind), [])
        return context.get_dummy_value()

    return types.void(), generate
