"""Checks of what is read or written here before or after the op, which checks all that it is given."""

from __future__ import annotations

from typing import Any

import torch

from ..errors import ArgumentTypeError, ArgumentValueError
from ..registry.ops.fused_sigmoid_gating.dtypes import INDEX_DTYPES
from ..registry.ops.fused_sigmoid_gating.memory import overlaps_itself
from ..registry.varlen.offsets import check_offsets_tensor

__all__ = ["gradients_wanted", "ranked", "required", "sequences", "shaped", "slot_numbers", "writable"]


def gradients_wanted(*given: Any) -> bool:
    """Whether autograd follows what is made of ``given``, some of which may be None."""
    return torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in given)


def required(name: str, value: Any) -> None:
    """Raise ArgumentTypeError unless ``value`` is a tensor."""
    if not isinstance(value, torch.Tensor):
        raise ArgumentTypeError(name, "a tensor", "None" if value is None else type(value).__name__)


def ranked(name: str, tensor: Any, axes: str) -> None:
    """Raise unless ``tensor`` is one, with as many axes as ``axes``, ``"[B, T, H, K]"``, names."""
    required(name, tensor)
    if tensor.dim() != axes.count(",") + 1:
        raise ArgumentValueError(name, f"shape {axes}", _shape(tensor))


def shaped(name: str, tensor: Any, axes: str, shape: tuple[int, ...]) -> None:
    """Raise unless ``tensor`` is one of ``shape``; ``axes`` says it in words."""
    required(name, tensor)
    if tensor.shape != shape:
        raise ArgumentValueError(name, f"{axes} = {list(shape)}", _shape(tensor))


def sequences(q: torch.Tensor, cu_seqlens: Any) -> int:
    """N: the sequences of packed tokens, or one per row of q. Raises unless the offsets are ``[N + 1]`` integers."""
    if cu_seqlens is None:
        return q.shape[0]
    check_offsets_tensor(cu_seqlens)
    if not cu_seqlens.shape[0]:
        raise ArgumentValueError("cu_seqlens", "shape [N + 1], N >= 0", "shape [0]")
    return int(cu_seqlens.shape[0]) - 1


def slot_numbers(name: str, numbers: Any, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise unless ``numbers`` is an int32 or int64 tensor of ``shape`` on ``device``."""
    required(name, numbers)
    if numbers.dtype not in INDEX_DTYPES:
        raise ArgumentTypeError(name, "dtype int32 or int64", str(numbers.dtype))
    shaped(name, numbers, "[N]" if len(shape) == 1 else "[N, steps]", shape)
    _same_device(name, numbers, device)


def writable(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    """Raise unless floats can be copied into ``tensor``: of a float dtype, on ``device``, with elements of its own."""
    if not tensor.dtype.is_floating_point:
        raise ArgumentTypeError(name, "a float dtype", str(tensor.dtype))
    _same_device(name, tensor, device)
    if overlaps_itself(tensor):
        raise ArgumentValueError(name, "a tensor that owns each of its elements", f"stride {tensor.stride()}")


def _same_device(name: str, tensor: torch.Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise ArgumentValueError(name, f"q's device {device}", f"device {tensor.device}")


def _shape(tensor: torch.Tensor) -> str:
    return f"shape {list(tensor.shape)}"
