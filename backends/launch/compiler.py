"""What a framework brings to the launcher: where its kernels want their arguments, and the kernels."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .image import Image

if TYPE_CHECKING:
    from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = ["Compiler", "Layout", "Variant"]


@dataclass(frozen=True, slots=True)
class Layout:
    """All of a launch that follows from a call's shapes, strides, dtypes and scalars: all but the addresses.

    Attributes:
        block: the kernel's parameters, one after another as the driver wants them, addresses 0.
        places: of each tensor the kernel is given: its index in ``TENSORS``, and the byte in ``block`` where its
            address goes (a multiple of 8).
        grid: blocks along x, y, z; none of them is launched if one is 0.
        vectors: of these tensors (indices in ``TENSORS``), the addresses must be multiples of 16 for the wide kernel;
            empty if the kernel looks for itself.
        wide: whether strides allow the wide kernel.
        key: what machine code depends on beside the problem, the config and ``wide``.
        scratch: the byte in ``block`` where the address of per-block scratch memory goes, or of a chain's workspace;
            None if kernels need none.
    """

    block: bytes
    places: tuple[tuple[int, int], ...]
    grid: tuple[int, int, int]
    vectors: tuple[int, ...] = ()
    wide: bool = True
    key: Hashable = None
    scratch: int | None = None


@dataclass(frozen=True, slots=True)
class Variant:
    """Which machine code: a layout's key, and whether tensors are accessed 16 bytes at a time."""

    key: Hashable
    wide: bool


class Compiler(Protocol):
    """One framework's compiler for one problem and config. Pure but for files: needs no GPU and no driver."""

    def layout(self, call: Call) -> Layout:
        """How calls like this one are launched. An output not given yet is contiguous. Reads no device memory."""

    def expected(self) -> Sequence[Variant]:
        """What calls of the problem will most likely need: compiled when the problem is bound."""

    def image(self, variant: Variant, fresh: bool = False) -> Image:
        """Compile, or read what an earlier process compiled (never if ``fresh``). Raises one of :meth:`errors`."""

    def errors(self) -> tuple[type[Exception], ...]:
        """What the compiler raises for a kernel it cannot build."""
