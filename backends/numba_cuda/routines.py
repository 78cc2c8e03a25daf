"""Device functions as Numba compiles them: each once per process, however many kernels use it, inlined by NVVM.

Numba's own ``inline="always"`` copies and analyses a function before typing, anew in every kernel, which costs more
time than all the rest; and Numba's calls of other device functions ask for the GPU, which need not be there.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from functools import cache
from types import CodeType
from typing import Any

from numba import cuda, types
from numba.cuda.core.targetconfig import ConfigStack
from numba.cuda.extending import intrinsic
from numba.cuda.flags import CUDAFlags

from .target import Function

__all__ = ["exchange", "index", "routine", "value"]


def routine(function: Function) -> Function:
    """A function without result."""
    return _compiled(_Source.of(function), types.void)


def value(function: Function) -> Function:
    """A function whose result is a float32."""
    return _compiled(_Source.of(function), types.float32)


def index(function: Function) -> Function:
    """A function whose result is an int64."""
    return _compiled(_Source.of(function), types.int64)


@cache
def exchange(n: int) -> Function:
    """``(values, mask, out)``: ``n`` values of the lane whose number differs in ``mask``."""

    @routine
    def shuffles(values: Any, mask: Any, out: Any) -> Any:
        for i in range(n):
            out[i] = cuda.shfl_xor_sync(0xFFFFFFFF, values[i], mask)

    return shuffles


@dataclass(frozen=True, slots=True)
class _Source:
    """A function, equal to every other that has the same code and the same values to close over.

    Of functions that it closes over, those made here are the same object where they are equal: so whatever two kernels
    have in common is compiled for the first.
    """

    code: CodeType
    closure: tuple[tuple[type, Any], ...]
    function: Function = field(compare=False)

    @classmethod
    def of(cls, function: Function) -> _Source:
        held = [cell.cell_contents for cell in function.__closure__ or ()]
        return cls(function.__code__, tuple((type(x), x) for x in held), function)


class _Flags(CUDAFlags):  # type: ignore[misc]
    """The flags of a compilation, equal to themselves alone.

    What Numba has typed is keyed by the flags in force, a copy of the compilation's own, and it compares all of them by
    value at every operator. Here the copy is one object for all compilations with these flags.
    """

    def __init__(self, values: CUDAFlags, in_force: _Flags | None = None) -> None:
        super().__init__(values)
        self.in_force = in_force or self

    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)

    def copy(self) -> _Flags:
        return self.in_force


@cache
def _inlining(flags: CUDAFlags) -> _Flags:
    """A kernel's flags, with which what it calls is inlined."""
    made = _Flags(flags)
    made.forceinline = True
    return made


@cache
def _compiled(source: _Source, result: Any) -> Function:
    function = source.function

    def call(typingctx: Any, *given: Any) -> Any:
        def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            above = ConfigStack().top()
            shared = above if isinstance(above, _Flags) else _inlining(above)
            # Of its own: passes of the compiler change some of them for a while.
            made = context.compile_subroutine(builder, function, signature, flags=_Flags(shared, shared))
            return context.call_internal(builder, made.fndesc, signature, args)

        return result(*given), codegen

    # Numba reads the number of arguments off the signature.
    mine, theirs = inspect.signature(call), inspect.signature(function)
    named = [mine.parameters["typingctx"], *theirs.parameters.values()]
    vars(call)["__signature__"] = mine.replace(parameters=named)
    return intrinsic(call)  # type: ignore[no-any-return]
