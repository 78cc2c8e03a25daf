"""Slots of states: numbers of states that lie in batch order, and the way from there to slots anywhere."""

from __future__ import annotations

from functools import lru_cache

import torch

__all__ = ["scatter", "slots"]


def slots(n: int, device: torch.device) -> torch.Tensor:
    """``[n]`` int32: 0, 1, ...; one tensor for all calls, except inside graphs, which own what they allocate."""
    if torch.compiler.is_compiling() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return torch.arange(n, dtype=torch.int32, device=device)
    return _kept_slots(n, device)


@lru_cache(maxsize=128)
def _kept_slots(n: int, device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.arange(n, dtype=torch.int32, device=device)


def scatter(pool: torch.Tensor, states: torch.Tensor, targets: torch.Tensor, valid: torch.Tensor) -> None:
    """``pool[targets[i]] = states[i]`` for each valid i; the host reads nothing of it.

    Entries that are not valid repeat one that is, so that every entry writes something true; where there is none, they
    all put slot 0 back.

    Args:
        pool: ``[slots, ...]``; states: ``[M, ...]``, of any float dtype; targets: ``[M]`` slots; valid: ``[M]`` bool.
    """
    if not valid.numel() or not pool.shape[0]:
        return
    # An index with an axis: the host would read one without.
    some = valid.to(torch.int8).argmax(0, keepdim=True)
    source = torch.where(valid, torch.arange(valid.numel(), device=valid.device), some)
    none = ~valid[some]
    written = torch.where(none.view(-1, *[1] * (states.dim() - 1)), pool[:1], states[source])
    pool.index_copy_(0, torch.where(none, 0, targets.to(torch.int64)[source]), written.to(pool.dtype))
