"""Slots and rows on the host: every call looks at them, for that takes two microseconds."""

from __future__ import annotations

import torch

from ....errors import ArgumentValueError

__all__ = ["check_host_indices"]


def check_host_indices(
    pool: torch.Tensor | None,
    read: torch.Tensor | None,
    write: torch.Tensor | None,
    intermediates: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> None:
    """Raise ArgumentValueError unless every slot and row of tensors on a CPU is there; negative ones are none.

    Args: as the call has them; ``write`` may be ``read`` itself, or None.
    """
    if pool is not None:
        _within("initial_state_indices", read, pool.shape[0], "slots of the pool")
        if write is not read:
            _within("output_state_indices", write, pool.shape[0], "slots of the pool")
    if intermediates is not None:
        _within("intermediate_state_indices", rows, intermediates.shape[0], "rows of the buffer")


def _within(name: str, indices: torch.Tensor | None, count: int, what: str) -> None:
    if indices is None or not indices.shape[0]:
        return
    highest = int(indices.numpy().max())
    if highest >= count:
        raise ArgumentValueError(name, f"indices below the {count} {what}", str(highest))
