"""SequenceLayout: the packed sequences of one batch, known on the host, built once and reused by every layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from ...errors import ArgumentTypeError, ArgumentValueError
from .classes import LengthClass
from .profile import VarlenProfile

if TYPE_CHECKING:
    import torch

__all__ = ["SequenceLayout", "check_offsets"]


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


class SequenceLayout:
    """N packed sequences: offsets on the host and on the device, lengths, class, chunks. Immutable.

    Build one per batch, pass it as ``cu_seqlens=`` to every layer's call.

    Attributes:
        cu_seqlens: ``[N + 1]`` int32 or int64 offsets on the device of the batch.
        offsets: the same offsets on the host.
        n: number of sequences; ``tokens``: total number of tokens; ``longest``: longest length (0 if none).
        profile: the VarlenProfile of the batch.
    """

    offsets: tuple[int, ...]
    cu_seqlens: torch.Tensor
    n: int
    tokens: int
    longest: int
    profile: VarlenProfile

    def __init__(self, offsets: tuple[int, ...], cu_seqlens: torch.Tensor) -> None:
        check_offsets(offsets)
        n, tokens = len(offsets) - 1, offsets[-1]
        longest = max((b - a for a, b in pairwise(offsets)), default=0)
        values = {
            "offsets": offsets,
            "cu_seqlens": cu_seqlens,
            "n": n,
            "tokens": tokens,
            "longest": longest,
            "profile": VarlenProfile.of(n, tokens, longest),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"SequenceLayout is immutable: build a new one instead of setting {name}")

    @classmethod
    def from_cu_seqlens(cls, cu_seqlens: torch.Tensor) -> SequenceLayout:
        """From ``[N + 1]`` offsets; one device-to-host copy when they are on a GPU.

        Raises:
            ArgumentTypeError: not a tensor, or not int32 / int64.
            ArgumentValueError: not 1-D, empty, not starting at 0, or decreasing.
        """
        import torch

        if not isinstance(cu_seqlens, torch.Tensor):
            raise ArgumentTypeError("cu_seqlens", "a tensor [N + 1]", type(cu_seqlens).__name__)
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ArgumentTypeError("cu_seqlens", "dtype int32 or int64", str(cu_seqlens.dtype))
        if cu_seqlens.dim() != 1:
            raise ArgumentValueError("cu_seqlens", "shape [N + 1]", f"shape {list(cu_seqlens.shape)}")
        return cls(tuple(cu_seqlens.tolist()), cu_seqlens)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int],
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> SequenceLayout:
        """From lengths known on the host: no device-to-host copy. ``dtype``: int32 (default) or int64."""
        import torch

        offsets = [0]
        for i, length in enumerate(lengths):
            try:
                tokens = operator.index(length)  # numpy's integers too, but no float is cut
            except TypeError:
                raise ArgumentTypeError("lengths", "integers", f"lengths[{i}] = {length!r}") from None
            if tokens < 0:
                raise ArgumentValueError("lengths", "lengths >= 0", f"lengths[{i}] = {length}")
            offsets.append(offsets[-1] + tokens)
        kind = torch.int32 if dtype is None else dtype
        if kind is torch.int32 and offsets[-1] > 2**31 - 1:
            raise ArgumentValueError("dtype", "int64 for more than 2**31 - 1 tokens", "int32")
        return cls(tuple(offsets), torch.tensor(offsets, dtype=kind, device=device))

    @property
    def length_class(self) -> LengthClass:
        return self.profile.length_class

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Length of each sequence, in tokens."""
        return tuple(b - a for a, b in pairwise(self.offsets))

    @cached_property
    def by_length(self) -> tuple[int, ...]:
        """Sequence numbers, longest first (stable): step t touches a prefix of them."""
        return tuple(sorted(range(self.n), key=lambda i: -self.lengths[i]))

    def chunk_offsets(self, chunk: int) -> tuple[int, ...]:
        """``[N + 1]``: how many chunks of ``chunk`` tokens come before each sequence (chunks never span two)."""
        if chunk < 1:
            raise ArgumentValueError("chunk", "a chunk of at least 1 token", str(chunk))
        total = [0]
        for length in self.lengths:
            total.append(total[-1] + -(-length // chunk))
        return tuple(total)

    def split(self, threshold: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sequence numbers of length <= ``threshold`` and of length > ``threshold``, both in batch order."""
        short = tuple(i for i, length in enumerate(self.lengths) if length <= threshold)
        long = tuple(i for i, length in enumerate(self.lengths) if length > threshold)
        return short, long

    def __repr__(self) -> str:
        return f"SequenceLayout({self.profile.label}, n={self.n}, tokens={self.tokens}, longest={self.longest})"
