"""Uninitialised outputs, made as cheaply as torch can.

A call of ``torch.empty_like`` spends half its time finding out what it is asked for. What torch.compile's own code
calls instead takes sizes, strides and a dtype, and allocates on the current device, in the same caching allocator. It
is not part of torch's public interface: what it makes is looked at once before it is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

__all__ = ["Maker", "output_maker"]

#: From the call's v to an output like it.
Maker = Callable[[torch.Tensor], torch.Tensor]


def output_maker(v: torch.Tensor, dtype: torch.dtype) -> Maker:
    """What makes packed tensors of v's shape on v's device, whichever device is current and however v lies."""
    shape, device = tuple(v.shape), v.device
    strides = _packed(shape)
    direct = _direct(device.type)
    if direct is not None and _works(direct, device.type):
        index = device.index
        if device.type == "cpu" or torch.cuda.device_count() == 1:
            return lambda v: direct(shape, strides, dtype)
        current = torch._C._cuda_getDevice

        def make(v: torch.Tensor) -> torch.Tensor:
            if current() == index:
                return direct(shape, strides, dtype)  # type: ignore[no-any-return]
            return torch.empty(shape, dtype=dtype, device=device)

        return make
    if v.stride() == strides and v.dtype == dtype:
        return torch.empty_like  # which would keep the strides of a view
    return lambda v: torch.empty(shape, dtype=dtype, device=device)


def _packed(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The strides that torch gives a tensor of this shape."""
    strides, step = [0] * len(shape), 1
    for i in range(len(shape) - 1, -1, -1):
        strides[i] = step
        step *= max(1, shape[i])
    return tuple(strides)


def _direct(device_type: str) -> Any:
    """torch's allocation by sizes, strides and dtype; None where it has none."""
    try:
        from torch._C._dynamo import guards
    except ImportError:
        return None
    return getattr(guards, f"_empty_strided_{device_type}", None)


@cache
def _works(direct: Any, device_type: str) -> bool:
    shape, strides, dtype = (2, 1, 3), (3, 3, 1), torch.bfloat16
    try:
        made = direct(shape, strides, dtype)
    except (TypeError, RuntimeError):
        return False
    properties = (tuple(made.shape), made.stride(), made.dtype, made.device.type, made.requires_grad)
    return properties == (shape, strides, dtype, device_type, False)
