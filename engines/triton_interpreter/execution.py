"""How a launch is executed: `tl` patched once, programs in a chosen order, errors as they were raised."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from random import Random
from typing import Any

import numpy as np
import torch

__all__ = ["ORDERS", "Executor", "Order", "Program"]

#: Coordinates of one program in its grid.
Program = tuple[int, int, int]
#: Puts a grid's programs in the order they run in.
Order = Callable[[Sequence[Program]], Sequence[Program]]


def _forward(programs: Sequence[Program]) -> Sequence[Program]:
    return programs


def _backward(programs: Sequence[Program]) -> Sequence[Program]:
    return programs[::-1]


def _outside_in(programs: Sequence[Program]) -> Sequence[Program]:
    """The first, the last, the second, the last but one: neighbours far apart in time."""
    return [programs[i // 2 if i % 2 == 0 else -1 - i // 2] for i in range(len(programs))]


def _shuffled(seed: int) -> Order:
    def order(programs: Sequence[Program]) -> Sequence[Program]:
        return Random(seed).sample(list(programs), len(programs))

    return order


ORDERS: dict[str, Order] = {
    "forward": _forward,
    "backward": _backward,
    "outside in": _outside_in,
    "shuffled 0": _shuffled(0),
    "shuffled 1": _shuffled(1),
}


class Executor:
    """Stands in for the interpreter's own launch.

    As shipped, every call of a ``@triton.jit`` function, ``tl.sum`` among them, patches the whole of ``tl`` again (a
    third of the time), every launch copies each tensor's storage onto itself, and an error arrives as the text of
    another one.

    Attributes:
        order: in which a grid's programs run.
        launches: launches executed.
        between: called before each program with its coordinates, and with None after the last.
        lent: called with the name and the tensor of memory that launches of one call share.
    """

    def __init__(self, interpreter: Any, tl: Any) -> None:
        self.order: Order = _forward
        self.launches = 0
        self.between: Callable[[Program | None], None] | None = None
        self.lent: Callable[[str, torch.Tensor], None] | None = None
        self._interpreter = interpreter
        self._patch_once(tl)
        interpreter._get_np_dtype = _remembering(interpreter._get_np_dtype, tl.block_type, tl.pointer_type)
        executor = self

        def launch(self: Any, *args: Any, **kwargs: Any) -> None:
            executor._launch(self, args, kwargs)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            return self.rewrite()(*args, **kwargs)

        interpreter.GridExecutor.__call__ = launch
        interpreter.InterpretedFunction.__call__ = call

    def _patch_once(self, tl: Any) -> None:
        """What ``_patch_lang`` does for a kernel that sees both ``tl`` and ``tl.core``, never undone."""
        sees_both = type("Kernel", (), {"__globals__": {"tl": tl, "core": tl.core}})
        self._interpreter._patch_lang(sees_both)

    def workspace(self, words: int, device: torch.device) -> torch.Tensor:
        """Memory for the launches of one call; what nobody has written there is NaN."""
        memory = torch.full((words,), math.nan, device=device)
        if self.lent is not None:
            self.lent("workspace", memory)
        return memory

    @contextmanager
    def ordered(self, order: Order) -> Iterator[None]:
        """Run programs in this order while active."""
        before, self.order = self.order, order
        try:
            yield
        finally:
            self.order = before

    def _launch(self, kernel: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        interpreter = self._interpreter
        builder = interpreter.interpreter_builder
        names = inspect.getfullargspec(kernel.fn).args
        given = inspect.getcallargs(kernel.fn, *args, **{k: v for k, v in kwargs.items() if k in names})
        values = {
            name: value if name in kernel.constexprs else interpreter._implicit_cvt(value)
            for name, value in given.items()
        }
        grid = kernel.grid(values) if callable(kernel.grid) else kernel.grid
        x, y, z = (*grid, 1, 1, 1)[:3]
        programs = [(i, j, k) for k in range(z) for j in range(y) for i in range(x)]
        builder.set_grid_dim(x, y, z)
        self.launches += 1
        with np.errstate(all="ignore"):  # a GPU raises no flags either: exp overflows, 0 * inf is NaN
            for program in self.order(programs):
                builder.set_grid_idx(*program)
                if self.between is not None:
                    self.between(program)
                kernel.fn(**values)
        if self.between is not None:
            self.between(None)


def _remembering(numpy_dtype: Callable[[Any], Any], block: Any, pointer: Any) -> Callable[[Any], Any]:
    """The interpreter's dtype table, which is asked at every load and cast and built anew each time as shipped."""
    table: dict[str, Any] = {}

    def lookup(kind: Any) -> Any:
        element = kind.element_ty if isinstance(kind, block) else kind
        if isinstance(element, pointer):
            return numpy_dtype(kind)
        found = table.get(element.name)
        if found is None:
            found = table[element.name] = numpy_dtype(element)
        return found

    return lookup
