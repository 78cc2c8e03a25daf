"""Writing vector code by hand: what Numba's own loops cannot promise, emitted as LLVM IR.

An *operation* is a Python function over an ``llvmlite`` builder that :func:`operation` turns into something
compiled Numba code can call. Arguments are addresses, counts (int64) and scalars; nothing is bounds-checked. No
fast-math flag is ever set and every fused multiply-add is explicit, so the order of each sum is the order written.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import numba
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

__all__ = [
    "F32",
    "F64",
    "I16",
    "I32",
    "I64",
    "LANES",
    "choose",
    "constant",
    "fma",
    "inlined",
    "jit",
    "load",
    "operation",
    "pointer",
    "repeat",
    "splat",
    "store",
    "vector",
]

#: float32 values per vector: one AVX-512 register, two of AVX2, four of NEON; LLVM splits it as the CPU needs.
LANES = 16

I16, I32, I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
F32, F64 = ir.FloatType(), ir.DoubleType()

_Function = TypeVar("_Function", bound=Callable[..., Any])

_NUMBA_TYPES = {"i64": types.int64, "f32": types.float32, "f64": types.float64, "void": types.void}


def jit(function: _Function) -> _Function:
    """``numba.njit``, typed: a small helper, compiled apart and linked into whatever calls it."""
    return cast(_Function, numba.njit(nogil=True)(function))


def inlined(function: _Function) -> _Function:
    """The same for a large helper with one caller: it becomes part of it, so LLVM optimises its code only once."""
    return cast(_Function, numba.njit(nogil=True, inline="always")(function))


def operation(returns: str, *arguments: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorator: a function ``emit(builder, *values)`` becomes an operation of these argument types.

    Types are ``"i64"``, ``"f32"``, ``"f64"`` and, as result, ``"void"``. Numba converts what is passed.
    """
    signature = _NUMBA_TYPES[returns](*(_NUMBA_TYPES[a] for a in arguments))
    names = ["context", *(f"argument{i}" for i in range(len(arguments)))]

    def decorate(emit: Callable[..., Any]) -> Callable[..., Any]:
        def generate(context: Any, builder: ir.IRBuilder, _signature: Any, values: Sequence[ir.Value]) -> Any:
            result = emit(builder, *values)
            return context.get_dummy_value() if returns == "void" else result

        def definition(_context: Any, *_types: Any) -> tuple[Any, Callable[..., Any]]:
            return signature, generate

        definition.__name__ = emit.__name__
        # Numba matches calls by the declared parameters, so the variadic ones get names.
        parameters = [inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names]
        definition.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        made: Callable[..., Any] = intrinsic(definition)
        return made

    return decorate


def vector(element: ir.Type, lanes: int = LANES) -> ir.Type:
    """The type of ``lanes`` elements; the element type itself for one lane."""
    return element if lanes == 1 else ir.VectorType(element, lanes)


def constant(kind: ir.Type, value: float) -> ir.Constant:
    """``value`` as a scalar of type ``kind``, or in every lane of a vector type."""
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)
    return ir.Constant(kind, value)


def pointer(builder: ir.IRBuilder, address: ir.Value, element: ir.Type) -> ir.Value:
    """An address (int64, bytes) as a pointer to ``element``."""
    return builder.inttoptr(address, element.as_pointer())


def load(builder: ir.IRBuilder, base: ir.Value, index: ir.Value, lanes: int = 1) -> ir.Value:
    """``lanes`` consecutive elements from ``base[index]``; aligned to one element only."""
    at = builder.gep(base, [index])
    element = base.type.pointee
    if lanes > 1:
        at = builder.bitcast(at, vector(element, lanes).as_pointer())
    value = builder.load(at)
    value.align = _size(element)
    return value


def store(builder: ir.IRBuilder, value: ir.Value, base: ir.Value, index: ir.Value) -> None:
    """Write a scalar or a vector from ``base[index]`` on; aligned to one element only."""
    at = builder.gep(base, [index])
    if isinstance(value.type, ir.VectorType):
        at = builder.bitcast(at, value.type.as_pointer())
    builder.store(value, at).align = _size(base.type.pointee)


def _size(element: ir.Type) -> int:
    if isinstance(element, ir.IntType):
        return int(element.width) // 8
    return 4 if isinstance(element, ir.FloatType) else 8


def splat(builder: ir.IRBuilder, value: ir.Value, lanes: int = LANES) -> ir.Value:
    """``value`` in every lane."""
    if lanes == 1:
        return value
    empty = ir.Constant(vector(value.type, lanes), ir.Undefined)
    first = builder.insert_element(empty, value, I32(0))
    return builder.shuffle_vector(first, empty, ir.Constant(vector(I32, lanes), [I32(0)] * lanes))


def fma(builder: ir.IRBuilder, x: ir.Value, y: ir.Value, z: ir.Value) -> ir.Value:
    """``x * y + z`` rounded once."""
    kind = x.type
    lanes, element = (f"v{kind.count}", kind.element) if isinstance(kind, ir.VectorType) else ("", kind)
    name = f"llvm.fma.{lanes}{'f32' if isinstance(element, ir.FloatType) else 'f64'}"
    module = builder.module
    function = module.globals.get(name) or ir.Function(module, ir.FunctionType(kind, [kind] * 3), name)
    return builder.call(function, [x, y, z])


def choose(builder: ir.IRBuilder, selector: ir.Value, cases: Mapping[int, Callable[[], None]]) -> None:
    """Run the one of ``cases`` that ``selector`` (int64) names; nothing if none is."""
    after = ir.Block(builder.function, "after")
    switch = builder.switch(selector, after)
    for value, emit in cases.items():
        block = builder.append_basic_block(f"case_{value}")
        switch.add_case(I64(value), block)
        builder.position_at_end(block)
        emit()
        builder.branch(after)
    builder.function.blocks.append(after)
    builder.position_at_end(after)


def repeat(
    builder: ir.IRBuilder,
    count: ir.Value,
    carried: Sequence[ir.Value],
    body: Callable[[ir.Value, Sequence[ir.Value]], Sequence[ir.Value]],
    start: ir.Value | None = None,
    step: int = 1,
) -> list[ir.Value]:
    """``for i in range(start, count, step): carried = body(i, carried)``; returns what is carried out.

    The carried values are phis: they stay in registers, which is the point of writing the loop here.
    """
    entry = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "inside", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    i = builder.phi(I64)
    values = [builder.phi(value.type) for value in carried]
    builder.cbranch(builder.icmp_signed("<", i, count), inside, after)
    builder.position_at_end(inside)
    new = body(i, values)
    following = builder.add(i, I64(step))
    tail = builder.block
    builder.branch(head)
    i.add_incoming(I64(0) if start is None else start, entry)
    i.add_incoming(following, tail)
    for value, initial, updated in zip(values, carried, new, strict=True):
        value.add_incoming(initial, entry)
        value.add_incoming(updated, tail)
    builder.position_at_end(after)
    return values
