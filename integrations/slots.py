"""Slot numbers for states that lie in batch order: one pool row per sequence."""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = ["slots"]


def slots(n: int, device: torch.device) -> torch.Tensor:
    """``[n]`` int32: 0, 1, ...; one tensor for all calls, except inside graphs, which own what they allocate."""
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.arange(n, dtype=torch.int32, device=device)
    return _kept_slots(n, device)


@lru_cache(maxsize=128)
def _kept_slots(n: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.arange(n, dtype=torch.int32, device=device)
