"""Offsets of packed sequences: checks, and from lengths or another engine's metadata to offsets."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from ...errors import ArgumentTypeError, ArgumentValueError

if TYPE_CHECKING:
    import torch

__all__ = ["check_offsets", "check_offsets_tensor", "longest_of", "offsets_of_lengths"]


def check_offsets(offsets: Sequence[int], argument: str = "cu_seqlens") -> None:
    """Raise ArgumentValueError unless ``offsets`` is ``[0, ..., T]``, not empty and never decreasing."""
    if len(offsets) == 0:
        raise ArgumentValueError(argument, "N + 1 offsets, at least [0]", "an empty sequence")
    if offsets[0] != 0:
        raise ArgumentValueError(argument, "offsets starting at 0", f"first offset {offsets[0]}")
    for i in range(1, len(offsets)):
        if offsets[i] < offsets[i - 1]:
            raise ArgumentValueError(
                argument,
                "offsets that never decrease",
                f"offset {i} is {offsets[i]} after {offsets[i - 1]}",
            )


def check_offsets_tensor(tensor: Any, argument: str = "cu_seqlens") -> None:
    """Raise unless ``tensor`` is a 1-D int32 or int64 tensor. Reads no values.

    Raises:
        ArgumentTypeError: not a tensor, or not int32 / int64.
        ArgumentValueError: not 1-D.
    """
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise ArgumentTypeError(argument, "a tensor [N + 1]", type(tensor).__name__)
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ArgumentTypeError(argument, "dtype int32 or int64", str(tensor.dtype))
    if tensor.dim() != 1:
        raise ArgumentValueError(argument, "shape [N + 1]", f"shape {list(tensor.shape)}")


def offsets_of_lengths(lengths: Sequence[int] | torch.Tensor) -> tuple[int, ...]:
    """``(0, ..., T)`` from the length of each sequence.

    Raises:
        ArgumentTypeError: something in it is no integer. ArgumentValueError: a length is negative.
    """
    offsets = [0]
    values = lengths if isinstance(lengths, Sequence) else lengths.tolist()
    for i, length in enumerate(values):
        try:
            tokens = operator.index(length)  # numpy's integers too, but no float is cut
        except TypeError:
            raise ArgumentTypeError("lengths", "integers", f"lengths[{i}] = {length!r}") from None
        if tokens < 0:
            raise ArgumentValueError("lengths", "lengths >= 0", f"lengths[{i}] = {length}")
        offsets.append(offsets[-1] + tokens)
    return tuple(offsets)


def longest_of(offsets: Sequence[int]) -> int:
    """Length of the longest sequence; 0 if there is none."""
    return max((b - a for a, b in pairwise(offsets)), default=0)
