"""Kernel parameters: their order, which strides are constants, and how a Call fills them in.

One block of 8-byte integers (pointers, strides in bytes, counts) followed by four floats, laid out as the driver wants
them, so that a launch passes one buffer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ...registry.ops.fused_sigmoid_gating.call import Call
from .variant import ITEM, Variant

__all__ = [
    "FLOATS",
    "INTEGERS",
    "NUMBERS",
    "POINTERS",
    "STRIDES",
    "Packer",
    "floats",
    "inner_strides",
    "is_aligned",
    "packer",
]

#: Tensors of a Call in the kernel's order; an absent one is address 0.
POINTERS = (
    "A_log a dt_bias q k v b out pool read_slots write_slots cu_seqlens intermediates intermediate_rows parents"
).split()
#: Strides, in bytes. ``a_inner``, ``dt_bias_inner`` are used by KDA only.
STRIDES = (
    "q_batch q_token q_head q_inner k_batch k_token k_head k_inner v_batch v_token v_head v_inner "
    "a_batch a_token a_head a_inner b_batch b_token b_head out_batch out_token out_head out_inner "
    "A_log_head dt_bias_head dt_bias_inner pool_slot pool_head pool_k pool_v "
    "steps_row steps_step steps_head steps_k steps_v"
).split()
#: Sequences; tokens of a batch row; steps per row of ``parents``; then whether each index tensor is int64.
NUMBERS = "sequences length parent_steps wide_read wide_write wide_cu wide_rows wide_parents".split()
FLOATS = "scale softplus_beta softplus_threshold lower_bound".split()

#: Tensors whose width ``NUMBERS`` tells, in its order.
_INDICES = "read_slots write_slots cu_seqlens intermediate_rows parents".split()
#: Where strides, numbers and (as bytes) floats start in a block.
STRIDE_AT = len(POINTERS)
NUMBER_AT = STRIDE_AT + len(STRIDES)
INTEGERS = NUMBER_AT + len(NUMBERS)
_STATE_PLACES = (
    POINTERS.index("pool"),
    POINTERS.index("intermediates"),
    *(STRIDE_AT + STRIDES.index(name) for name in ("pool_slot", "steps_row", "steps_step")),
)


def inner_strides(variant: Variant) -> dict[str, int]:
    """The strides, in bytes, that a kernel of this variant has built in: all 0 (so given per call) for ``any``."""
    io, a, bias = ITEM[variant.io], ITEM[variant.a], ITEM[variant.dt_bias]
    known = {"q_inner": io, "k_inner": io, "v_inner": io, "out_inner": io, "a_inner": a, "dt_bias_inner": bias}
    for what, dtype in (("pool", variant.state), ("steps", variant.steps)):
        item = ITEM[dtype] if dtype else 0
        k, v = (variant.v, 1) if variant.layout == "kv" else (1, variant.k)
        known |= {f"{what}_k": k * item, f"{what}_v": v * item}
    return dict.fromkeys(known, 0) if variant.strides == "any" else known


@dataclass(frozen=True, slots=True)
class Packer:
    """Fills the integers of a parameter block, in the order :data:`POINTERS`, :data:`STRIDES`, :data:`NUMBERS`.

    Only what the variant reads is filled in; the rest of a fresh block is 0. ``block`` is anything indexable.
    """

    pointers: tuple[tuple[int, str], ...]
    strides: tuple[tuple[int, str, int], ...]
    widths: tuple[tuple[int, str], ...]

    def fill(self, call: Call, block: Any) -> None:
        """Everything."""
        self.fill_shapes(call, block)
        self.fill_pointers(call, block)

    def fill_pointers(self, call: Call, block: Any) -> None:
        """Addresses, and the widths of index tensors: what differs between calls of equal shapes."""
        for at, name in self.pointers:
            block[at] = getattr(call, name).data_ptr()
        for at, name in self.widths:
            block[at] = getattr(call, name).element_size() == 8

    def fill_shapes(self, call: Call, block: Any) -> None:
        """Strides and counts: with strides ``dense``, functions of the key that :meth:`shapes` gives."""
        for at, name, axis in self.strides:
            tensor: torch.Tensor = getattr(call, name)
            block[at] = tensor.stride(axis) * tensor.element_size()
        block[NUMBER_AT] = call.n
        block[NUMBER_AT + 1] = call.q.shape[1]
        if call.parents is not None:
            block[NUMBER_AT + 2] = call.parents.shape[1]

    @staticmethod
    def shapes(call: Call) -> tuple[int, int, int]:
        """What dense strides depend on beside the problem."""
        steps = 0 if call.intermediates is None else call.intermediates.shape[1]
        return call.q.shape[1], steps, 0 if call.parents is None else call.parents.shape[1]


def is_aligned(block: Any) -> bool:
    """Whether the states in a filled block can be accessed in 16 bytes: addresses and outer strides allow it."""
    bits = 0
    for at in _STATE_PLACES:
        bits |= block[at]
    return bits % 16 == 0


def packer(variant: Variant) -> Packer:
    """The packer of a variant; the same for ``wide`` and its opposite."""
    fixed = inner_strides(variant) if variant.strides != "any" else {}
    strides = []
    for i, name in enumerate(STRIDES):
        owner, which = name.rsplit("_", 1)
        found = None if name in fixed else _axis(owner, which, variant)
        if found is not None:
            strides.append((STRIDE_AT + i, *found))
    return Packer(
        pointers=tuple((i, name) for i, name in enumerate(POINTERS) if _used(name, variant)),
        strides=tuple(strides),
        widths=tuple((NUMBER_AT + 3 + i, name) for i, name in enumerate(_INDICES) if _used(name, variant)),
    )


def floats(call: Call) -> tuple[float, float, float, float]:
    """The values of :data:`FLOATS`; a bound the kernel does not use is 0."""
    return call.scale, call.softplus_beta, call.softplus_threshold, call.lower_bound or 0.0


def _used(name: str, variant: Variant) -> bool:
    match name:
        case "pool" | "read_slots":
            return variant.state is not None
        case "write_slots":
            return variant.update in ("in_place", "separate")
        case "cu_seqlens":
            return variant.varlen
        case "intermediates" | "intermediate_rows":
            return variant.verify != "none"
        case "parents":
            return variant.verify == "tree"
        case _:
            return True


def _axis(owner: str, which: str, variant: Variant) -> tuple[str, int] | None:
    """The tensor and the axis that a stride's name means; None where the variant reads no such stride."""
    if owner == "steps":
        owner = "intermediates"
    if not _used(owner, variant) or (owner == "intermediates" and variant.verify == "none"):
        return None
    if owner in ("pool", "intermediates"):
        outer = {"slot": 0, "row": 0, "step": 1, "head": 1 if owner == "pool" else 2}
        inner = ("k", "v") if variant.layout == "kv" else ("v", "k")
        return owner, outer[which] if which in outer else (-2, -1)[inner.index(which)]
    if owner in ("A_log", "dt_bias"):
        if which == "inner":
            return (owner, 1) if variant.kda else None
        return owner, 0
    if which == "batch":
        return None if variant.varlen else (owner, 0)
    if which == "inner" and owner == "a" and not variant.kda:
        return None
    return owner, {"token": 1, "head": 2, "inner": 3}[which]
