"""Host integers to a device without waiting for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

__all__ = ["staged", "to_device"]


def staged(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """``values`` as a host tensor that a copy to ``device`` can read while the host goes on.

    The memory is page-locked for a GPU. torch's allocator gives it out again only after the copies that read it are
    done, so it may be dropped as soon as they are queued.
    """
    import torch

    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda")


def to_device(values: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """``values`` as a tensor on ``device``, queued on its current stream; the host does not wait."""
    import torch

    place = torch.device(device)
    if place.type == "cuda":
        return staged(values, dtype, place).to(place, non_blocking=True)
    return torch.tensor(values, dtype=dtype, device=place)
