"""GraphLayout: the packed sequences of a captured batch, whose lengths and slots change between replays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ...errors import ArgumentTypeError, ArgumentValueError
from .offsets import offsets_of_lengths
from .transfer import staged

if TYPE_CHECKING:
    import torch

__all__ = ["GraphLayout"]


class GraphLayout:
    """Up to ``max_n`` packed sequences whose tensors stay where they are, so that a CUDA graph can be replayed.

    Pass it as ``cu_seqlens=`` (and ``slots`` as ``initial_state_indices=``) while capturing, call :meth:`update` before
    each replay. Sequences beyond those given are padding: of length 0, with slot -1, they read and write nothing.
    Made by ``SequenceLayout.padded``.

    Nothing is promised about the lengths on the host, because a captured call must not remember them: a backend sees
    offsets on the device and, if given, a longest length that holds for every replay.

    Attributes:
        cu_seqlens: ``[max_n + 1]`` offsets, at first all 0.
        slots: ``[max_n]`` slot numbers, at first all -1; of the same dtype.
        max_n: most sequences; max_length: most tokens of one (None: any); max_tokens: most tokens of all (None: any).
        n: sequences at the last update; tokens: their tokens.
    """

    def __init__(
        self,
        max_n: int,
        device: torch.device | str = "cpu",
        *,
        max_length: int | None = None,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """``dtype``: int32 (default) or int64.

        Raises:
            ArgumentTypeError, ArgumentValueError: a negative limit, or another dtype.
        """
        import torch

        for name, limit in (("max_n", max_n), ("max_length", max_length), ("max_tokens", max_tokens)):
            if limit is not None and limit < 0:
                raise ArgumentValueError(name, "a limit of zero or more", str(limit))
        kind = torch.int32 if dtype is None else dtype
        if kind not in (torch.int32, torch.int64):
            raise ArgumentTypeError("dtype", "int32 or int64", str(kind))
        self.max_n = max_n
        self.max_length = max_length
        self.max_tokens = max_tokens
        self.cu_seqlens = torch.zeros(max_n + 1, dtype=kind, device=device)
        self.slots = torch.full((max_n,), -1, dtype=kind, device=device)
        self.n = 0
        self.tokens = 0

    def update(self, lengths: Sequence[int], slots: Sequence[int] | torch.Tensor | None = None) -> None:
        """Write the lengths of the next replay, and its slots, into the same tensors.

        The copies are queued on the current stream, which should be the one that replays; the host does not wait.

        Args:
            lengths: tokens of each sequence, at most ``max_n`` of them.
            slots: of as many sequences: integers, or a tensor on any device. None leaves the slots as they are.

        Raises:
            ArgumentTypeError, ArgumentValueError: more sequences or tokens than the layout holds, a length that is
                negative or beyond ``max_length``, other counts of slots and lengths, or a stream that is being
                captured. Nothing has been written then.
        """
        import torch

        offsets, n = offsets_of_lengths(lengths), len(lengths)
        if n > self.max_n:
            raise ArgumentValueError("lengths", f"at most max_n = {self.max_n} sequences", f"{n}")
        if self.max_length is not None and max(lengths, default=0) > self.max_length:
            raise ArgumentValueError("lengths", f"lengths up to max_length = {self.max_length}", str(max(lengths)))
        if self.max_tokens is not None and offsets[-1] > self.max_tokens:
            raise ArgumentValueError("lengths", f"at most max_tokens = {self.max_tokens}", f"{offsets[-1]} tokens")
        if offsets[-1] > torch.iinfo(self.cu_seqlens.dtype).max:
            raise ArgumentValueError("lengths", f"tokens that {self.cu_seqlens.dtype} counts", f"{offsets[-1]} tokens")
        if slots is not None and len(slots) != n:
            raise ArgumentValueError("slots", f"a slot for each of {n} sequences", f"{len(slots)}")
        if self.cu_seqlens.is_cuda and torch.cuda.is_current_stream_capturing():
            raise ArgumentValueError("lengths", "an update between replays", "an update inside a capture")
        self._write(self.cu_seqlens, (*offsets, *(offsets[-1:] * (self.max_n - n))))
        if isinstance(slots, torch.Tensor):
            self.slots[:n].copy_(slots, non_blocking=True)
            self.slots[n:].fill_(-1)
        elif slots is not None:
            self._write(self.slots, (*slots, *((-1,) * (self.max_n - n))))
        self.n, self.tokens = n, offsets[-1]

    @staticmethod
    def _write(tensor: torch.Tensor, values: Sequence[int]) -> None:
        tensor.copy_(staged(values, tensor.dtype, tensor.device), non_blocking=True)

    def __repr__(self) -> str:
        return f"GraphLayout(n={self.n} of {self.max_n}, tokens={self.tokens}, max_length={self.max_length})"
