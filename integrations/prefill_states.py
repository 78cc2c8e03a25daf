"""The states of FlashInfer's prefill: in batch order or in slots of pools, read from one tensor, written to another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import ArgumentTypeError
from ..registry.ops.fused_sigmoid_gating.dtypes import FLOAT_DTYPES
from .arguments import refuse
from .checks import ranked, shaped, slot_numbers, writable
from .slots import scatter, slots

__all__ = ["States"]


@dataclass(frozen=True, slots=True)
class States:
    """What a prefill starts from: a pool of the caller's, or one of its own in which the final states are made."""

    pool: torch.Tensor | None
    slots: torch.Tensor | None

    @staticmethod
    def of(
        shape: tuple[int, int, int, int],
        device: torch.device,
        initial: torch.Tensor | None,
        wanted: bool,
        output: torch.Tensor | None,
        indices: torch.Tensor | None,
    ) -> States:
        """The pool and its slots, after a check of what the caller gave of them. Nothing of the caller's is written."""
        if not wanted:
            refuse("it belongs to output_final_state=True", output_state=output)
        if indices is not None:
            slot_numbers("state_indices", indices, shape[:1], device)
            if wanted and output is None:
                raise ArgumentTypeError("output_state", "a pool with state_indices", "None")
            if initial is None and output is None:
                refuse("it belongs to initial_state and output_state", state_indices=indices)
        for name, given in (("initial_state", initial), ("output_state", output)):
            if given is not None:
                _check_states(name, given, shape, indices is not None)
        if output is not None:
            writable("output_state", output, device)
        every = slots(shape[0], device)
        # States of its own are rounded to the dtype of the caller's at the end alone.
        wide = torch.float32 if output is None else torch.promote_types(output.dtype, torch.float32)
        if initial is None:
            return States(torch.zeros(shape, dtype=wide, device=device), every) if wanted else States(None, None)
        if not wanted or initial is output:
            return States(initial, every if indices is None else indices)
        if indices is None:
            return States(initial.to(wide, copy=True), every)
        own = initial.index_select(0, indices.clamp(min=0)).to(wide)
        return States(own, torch.where(indices < 0, -1, every))

    def final(self, output: torch.Tensor | None, indices: torch.Tensor | None) -> torch.Tensor:
        """The final states, where the caller wants them."""
        assert self.pool is not None
        if output is None or output is self.pool:
            return self.pool
        if indices is None:
            return output.copy_(self.pool)
        scatter(output, self.pool, indices, indices >= 0)
        return output


def _check_states(name: str, given: torch.Tensor, shape: tuple[int, int, int, int], is_pool: bool) -> None:
    """Raise unless ``given`` holds N states, or a pool of any number, of a dtype the op knows."""
    axes = "[slots, HV, V, K]" if is_pool else "[N, HV, V, K]"
    ranked(name, given, axes)
    shaped(name, given, f"shape {axes}", (given.shape[0] if is_pool else shape[0], *shape[1:]))
    if given.dtype not in FLOAT_DTYPES:
        raise ArgumentTypeError(name, "dtype bfloat16, float16, float32 or float64", str(given.dtype))
