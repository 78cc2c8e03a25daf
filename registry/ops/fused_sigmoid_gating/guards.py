"""Whether tensors are like those of an earlier, validated call: one C++ call where torch has it, else plain Python.

``guard(tensors)(*others)`` is True only if each of ``others`` has the type, dtype, device, sizes, strides,
``requires_grad`` and dispatch keys of its counterpart, under the same dispatch state of the thread (inference mode,
autocast, tracing modes). Addresses and contents are free. It returns False, and never raises, for what is no tensor;
it must be given as many arguments as it was made from.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

__all__ = ["Guard", "PythonGuard", "compiled_guards", "guard", "is_current_stream_capturing", "plain"]

Guard = Callable[..., bool]

_PLAIN = (torch.Tensor, torch.nn.Parameter)

# What the wrapper in torch.cuda calls; only ever asked about tensors on a GPU.
is_current_stream_capturing: Callable[[], bool] = getattr(
    torch._C, "_cuda_isCurrentStreamCapturing", torch.cuda.is_current_stream_capturing
)


def plain(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is no subclass with a behaviour of its own: only such calls are remembered."""
    return type(tensor) in _PLAIN


class PythonGuard:
    """The guard in plain Python, a few microseconds instead of one."""

    def __init__(self, tensors: tuple[torch.Tensor, ...]) -> None:
        self._state = _thread_state()
        self._expected = tuple((type(t), _properties(t)) for t in tensors)

    def __call__(self, *tensors: Any) -> bool:
        for tensor, (kind, properties) in zip(tensors, self._expected, strict=True):
            # The type first: others may not have the properties, or answer in symbols.
            if type(tensor) is not kind or tensor.layout is not torch.strided or _properties(tensor) != properties:
                return False
        return self._state == _thread_state()


def _properties(t: torch.Tensor) -> tuple[Any, ...]:
    keys = torch._C._dispatch_keys(t).raw_repr()
    return t.shape, t.stride(), t.dtype, t.device, t.requires_grad, keys


def _thread_state() -> tuple[int, int]:
    include, exclude = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return include.raw_repr(), exclude.raw_repr()


@cache
def compiled_guards() -> Any:
    """torch's own class of guards, or None where it is missing or does not behave as this module promises.

    It is part of torch.compile and not of torch's public interface: what it does here is tried once, not assumed.
    """
    try:
        from torch._C._dynamo.guards import TensorGuards

        def make(*tensors: torch.Tensor) -> Any:
            # With both names, or it crashes.
            return TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)

        x, y = torch.empty(2, 3), torch.empty(2, 3)
        check = make(x, y).check
        other: tuple[Any, ...] = (
            None,
            1,
            torch.empty(3, 2),
            torch.empty(2, 3, 1),
            torch.empty(3, 2).t(),
            torch.empty(2, 3, dtype=torch.float64),
            torch.empty(2, 3, device="meta"),
            torch.empty(2, 3, requires_grad=True),
            torch.nn.Parameter(torch.empty(2, 3), requires_grad=False),
        )
        works = check(x, y) is True and check(y.clone(), x.clone()) is True
        works = works and not any(check(x, t) or check(t, y) for t in other)
    except (ImportError, AttributeError, TypeError, RuntimeError):
        return None
    return make if works else None


def guard(tensors: tuple[torch.Tensor, ...]) -> Guard:
    """The fastest guard there is for ``tensors``; see the module's description."""
    make = compiled_guards()
    # torch's guards refuse a tensor that is given twice, always.
    if make is None or len({id(t) for t in tensors}) < len(tensors):
        return PythonGuard(tensors)
    check: Guard = make(*tensors).check
    return check
