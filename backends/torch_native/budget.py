"""How much memory a block may work in. Imports no torch: predicates and configs need it too."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = ["block_bytes", "largest_block"]

#: Share of what a call holds (inputs, output, pool) that a block's working memory may come to ...
_SHARE = 0.18
#: ... unless that is less than this: smaller blocks cost more time in dispatch than their memory is worth.
_LEAST = 2 << 20


def largest_block(held: int) -> int:
    """Bytes a block may work in, beside ``held`` bytes of inputs, output and pool."""
    return max(_LEAST, int(_SHARE * held))


def block_bytes(call: Call, block_kib: int) -> int:
    """``block_kib`` KiB in bytes, or less where that would be a large share of what ``call`` holds."""
    held = sum(t.numel() * t.element_size() for t in call.tensors().values())
    return min(block_kib << 10, largest_block(held))
