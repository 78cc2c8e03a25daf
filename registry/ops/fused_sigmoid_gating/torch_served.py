"""What the kernels of the torch operators share: which op they run, and their refusal to lose gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import is_grad_enabled

from ....errors import ArgumentValueError

__all__ = [
    "LEAVES",
    "NAME",
    "SERVING",
    "any_requires_grad",
    "process_wide",
    "process_wide_call",
    "refuse_grad",
    "served",
    "serving",
]

NAME = "fused_sigmoid_gating"

#: The arguments that gradients flow to.
LEAVES = ("A_log", "a", "dt_bias", "q", "k", "v", "b", "initial_state_source")

#: Whether one of the tensors (or None) among its arguments requires a gradient.
any_requires_grad = torch._C._any_requires_grad

#: The op that the operators run instead of the process's.
SERVING: ContextVar[Any] = ContextVar("isokern_fused_sigmoid_gating_serving", default=None)


@contextmanager
def serving(op: Any) -> Iterator[None]:
    """Within the block the operators run ``op``, of a registry of its own; for examining a backend."""
    token = SERVING.set(op)
    try:
        yield
    finally:
        SERVING.reset(token)


def served() -> Any:
    """The op that the operators run."""
    op = SERVING.get()
    return process_wide() if op is None else op


@cache
def process_wide() -> Any:
    """The process's op, which the operators run outside of ``serving``."""
    from ... import get

    return get(NAME)


@cache
def process_wide_call() -> Callable[..., torch.Tensor]:
    """The process's op's method: objects are called by way of a dictionary, methods are not."""
    call: Callable[..., torch.Tensor] = process_wide().__call__
    return call


def refuse_grad(*leaves: torch.Tensor | None) -> None:
    """Raise ArgumentValueError where autograd is on and one of ``leaves``, in the order of ``LEAVES``, requires it."""
    if not is_grad_enabled():
        return
    for name, leaf in zip(LEAVES, leaves, strict=False):  # trailing defaults may be missing
        if leaf is not None and leaf.requires_grad:
            raise ArgumentValueError(
                name,
                "a tensor that does not require grad where the call writes to its arguments and is traced",
                "requires_grad=True",
                "use torch.no_grad(), or disable_state_update=True without buffers and out=, or call the op eagerly",
            )
