"""bfloat16 and fused multiply-add as the GPU does them, put into the interpreter's instruction set."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["correct", "from_bfloat16", "to_bfloat16"]

_QUIET_NAN = np.uint16(0x7FFF)


def from_bfloat16(patterns: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The values behind bfloat16 bit patterns; exact."""
    return (patterns.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bit patterns of float32 values rounded to nearest even; overflow becomes infinite, NaN stays NaN."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), _QUIET_NAN, rounded.astype(np.uint16))


def correct(interpreter: Any, tl: Any) -> None:
    """Replace what the interpreter computes wrongly, for the rest of the process.

    Args:
        interpreter: the module ``triton.runtime.interpreter``.
        tl: the module ``triton.language``.
    """
    builder = type(interpreter.interpreter_builder)
    handle = interpreter.TensorHandle
    bfloat16, float32 = tl.bfloat16, tl.float32
    convert = interpreter._convert_float

    def convert_float(data: Any, source: Any, target: Any, rounding: Any) -> Any:
        if source == float32 and target == bfloat16:
            return to_bfloat16(data)
        if source == bfloat16 and target == float32:
            return from_bfloat16(data)
        return convert(data, source, target, rounding)

    def is_bfloat16(x: Any) -> bool:
        return bool(x.dtype.scalar == bfloat16)

    def widened(x: Any) -> Any:
        return handle(from_bfloat16(x.data), float32) if is_bfloat16(x) else x

    def in_float32(method: Callable[..., Any]) -> Callable[..., Any]:
        """Widen bfloat16 operands, do the operation, round its result (comparisons stay booleans)."""

        def operation(self: Any, *operands: Any) -> Any:
            if not any(hasattr(x, "dtype") and is_bfloat16(x) for x in operands):
                return method(self, *operands)
            result = method(self, *(widened(x) if hasattr(x, "dtype") else x for x in operands))
            if result.data.dtype == np.bool_:
                return handle(result.data, tl.int1)
            return handle(to_bfloat16(result.data), bfloat16)

        return operation

    def multiply_add(self: Any, x: Any, y: Any, z: Any) -> Any:
        """float32 through float64, where the product is exact: one rounding, but for double rounding's 2**-29."""
        if z.data.dtype != np.float32:
            return handle(x.data * y.data + z.data, z.dtype.scalar)
        exact = x.data.astype(np.float64) * y.data
        return handle((exact + z.data).astype(np.float32), z.dtype.scalar)

    dot = builder.create_dot

    def create_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), d, *rest)

    interpreter._convert_float = convert_float
    builder.binary_op = in_float32(builder.binary_op)
    builder.unary_op = in_float32(builder.unary_op)
    builder.create_fabs = in_float32(builder.create_fabs)
    builder.create_rsqrt = in_float32(builder.create_rsqrt)
    builder.create_fma = in_float32(multiply_add)
    builder.create_dot = create_dot
    _correct_reductions(interpreter, tl, handle, bfloat16, float32)
    _correct_indices(interpreter)


def _correct_indices(interpreter: Any) -> None:
    """A scalar as a loop's bound: up to Triton 3.6 it is an array of one value, which NumPy 2.4 makes no number of."""
    patch = interpreter._patch_lang_tensor

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patch_tensor


def _correct_reductions(interpreter: Any, tl: Any, handle: Any, bfloat16: Any, float32: Any) -> None:
    """Reduce and scan bfloat16 in float32, rounding once at the end."""

    def in_float32(apply: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
        def applied(self: Any, given: Any) -> Any:
            if isinstance(given, tuple):
                return apply(self, given)  # of several tensors: indices beside values, one by one below
            if given.handle.dtype.scalar != bfloat16:
                return apply(self, given)
            wide = handle(from_bfloat16(given.handle.data), float32)
            shape = list(wide.data.shape)
            result = apply(self, tl.tensor(wide, tl.block_type(float32, shape)))
            narrow = handle(to_bfloat16(result.handle.data), bfloat16)
            kind = tl.block_type(bfloat16, list(narrow.data.shape)) if result.type.is_block() else bfloat16
            return tl.tensor(narrow, kind)

        return applied

    for operation in (interpreter.ReduceOps, interpreter.ScanOps):
        operation.apply = in_float32(operation.apply)
