"""Whether tensors share memory: a call may only write elements that nothing else in it names."""

from __future__ import annotations

import torch

__all__ = ["overlaps_itself", "share_memory"]


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two indices of ``tensor`` can name one address (an expanded tensor does). Reads strides only.

    Dimensions are taken from the smallest stride up; each must step over everything the smaller ones span. That
    refuses a few interleavings that would not collide, which no engine lays out, and accepts none that do.
    """
    if tensor.is_contiguous() or tensor.numel() <= 1:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                return True
            reach += stride * (size - 1)
    return False


def share_memory(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether some byte belongs to an element of ``x`` and to one of ``y``. Exact: views interleaved in one row
    do not share. Costs nothing unless both are views of one storage and their ranges meet.
    """
    if not x.numel() or not y.numel() or x.untyped_storage().data_ptr() != y.untyped_storage().data_ptr():
        return False
    (x_first, x_last), (y_first, y_last) = _range(x), _range(y)
    first, last = min(x_first, y_first), max(x_last, y_last)
    if x_last <= y_first or y_last <= x_first:
        return False
    touched = torch.zeros(last - first, dtype=torch.bool)
    _bytes_of(x, touched, x_first - first).fill_(True)
    return bool(_bytes_of(y, touched, y_first - first).any())


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the byte after the last, in the tensor's storage."""
    first = int(tensor.storage_offset())
    span = sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
    return first * tensor.element_size(), (first + span + 1) * tensor.element_size()


def _bytes_of(tensor: torch.Tensor, storage: torch.Tensor, first: int) -> torch.Tensor:
    """The tensor's view of ``storage``, one element per byte, starting at byte ``first``."""
    width = tensor.element_size()
    return storage.as_strided((*tensor.shape, width), (*(s * width for s in tensor.stride()), 1), first)
