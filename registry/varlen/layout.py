"""SequenceLayout: the packed sequences of one batch, known on the host, built once and reused by every layer."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING

from ...errors import ArgumentTypeError, ArgumentValueError
from .classes import LengthClass
from .offsets import check_offsets, check_offsets_tensor, longest_of, offsets_of_lengths
from .profile import VarlenProfile
from .runs import Run, Span, spans_of
from .transfer import to_device

if TYPE_CHECKING:
    import torch

    from .graph_layout import GraphLayout

__all__ = ["SequenceLayout", "check_offsets"]


class SequenceLayout:
    """N packed sequences: offsets on the host and on the device, lengths, class, chunks. Immutable.

    Build one per batch, pass it as ``cu_seqlens=`` to every layer's call. What is derived from it on the device is
    made at first use, on the stream that is current then, and kept.

    Attributes:
        cu_seqlens: ``[N + 1]`` int32 or int64 offsets on the device of the batch.
        offsets: the same offsets on the host.
        n: number of sequences; ``tokens``: total number of tokens; ``longest``: longest length (0 if none).
        profile: the VarlenProfile of the batch.
        identity: an object of this layout's own, to know it again by without keeping its tensors alive.
    """

    offsets: tuple[int, ...]
    cu_seqlens: torch.Tensor
    n: int
    tokens: int
    longest: int
    profile: VarlenProfile
    identity: object
    _on_device: dict[tuple[str, int], tuple[torch.Tensor, ...]]
    _spans: dict[int, tuple[Span, ...]]
    _runs: dict[int, tuple[Run, ...]]

    def __init__(self, offsets: tuple[int, ...], cu_seqlens: torch.Tensor) -> None:
        check_offsets(offsets)
        n, tokens, longest = len(offsets) - 1, offsets[-1], longest_of(offsets)
        values = {
            "offsets": offsets,
            "cu_seqlens": cu_seqlens,
            "n": n,
            "tokens": tokens,
            "longest": longest,
            "profile": VarlenProfile.of(n, tokens, longest),
            "identity": object(),
            "_on_device": {},
            "_spans": {},
            "_runs": {},
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
        check_offsets_tensor(cu_seqlens)
        return cls(tuple(cu_seqlens.tolist()), cu_seqlens)

    @classmethod
    def from_lengths(
        cls,
        lengths: Sequence[int] | torch.Tensor,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> SequenceLayout:
        """From lengths known on the host: one host-to-device copy, which the host does not wait for.

        Args:
            lengths: tokens of each sequence: integers, or a tensor of them on the CPU.
            device: of the batch; dtype: int32 (default) or int64.

        Raises:
            ArgumentTypeError, ArgumentValueError: a length is no integer or negative, or int32 cannot count the tokens.
        """
        import torch

        offsets = offsets_of_lengths(_on_host(lengths, "lengths"))
        kind = torch.int32 if dtype is None else dtype
        if kind is torch.int32 and offsets[-1] > 2**31 - 1:
            raise ArgumentValueError("dtype", "int64 for more than 2**31 - 1 tokens", "int32")
        return cls(offsets, to_device(offsets, kind, device))

    @classmethod
    def from_query_start_loc(
        cls,
        query_start_loc: torch.Tensor,
        *,
        query_start_loc_cpu: torch.Tensor | Sequence[int] | None = None,
        lengths: Sequence[int] | torch.Tensor | None = None,
        max_query_len: int | None = None,
    ) -> SequenceLayout:
        """From another engine's attention metadata. Copies from the device only where the host was told nothing.

        Args:
            query_start_loc: ``[N + 1]`` offsets on the device of the batch (kept, not copied).
            query_start_loc_cpu: the same offsets on the host, or
            lengths: the tokens of each of the N sequences on the host (integers, or a CPU tensor).
            max_query_len: the longest length the engine states.

        Raises:
            ArgumentTypeError, ArgumentValueError: as for ``from_cu_seqlens``; host values of another count, or a
                longest length beyond ``max_query_len``. That host and device hold the same values is not checked here
                (the op's ``validate="full"`` does).
        """
        check_offsets_tensor(query_start_loc, "query_start_loc")
        if query_start_loc_cpu is not None:
            host = _on_host(query_start_loc_cpu, "query_start_loc_cpu")
            offsets = tuple(int(x) for x in (host if isinstance(host, Sequence) else host.tolist()))
            name = "query_start_loc_cpu"
        elif lengths is not None:
            offsets, name = offsets_of_lengths(_on_host(lengths, "lengths")), "lengths"
        else:
            offsets, name = tuple(query_start_loc.tolist()), "query_start_loc"
        if len(offsets) != query_start_loc.shape[0]:
            n = query_start_loc.shape[0] - 1
            raise ArgumentValueError(name, f"the N = {n} sequences of query_start_loc", f"{len(offsets) - 1} sequences")
        check_offsets(offsets, name)
        longest = longest_of(offsets)
        if max_query_len is not None and longest > max_query_len:
            raise ArgumentValueError("max_query_len", f"at least the longest length {longest}", str(max_query_len))
        return cls(offsets, query_start_loc)

    @staticmethod
    def padded(
        max_n: int,
        device: torch.device | str = "cpu",
        *,
        max_length: int | None = None,
        max_tokens: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> GraphLayout:
        """A layout for CUDA graphs: tensors that stay in place while lengths and slots change; see GraphLayout."""
        from .graph_layout import GraphLayout

        return GraphLayout(max_n, device, max_length=max_length, max_tokens=max_tokens, dtype=dtype)

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

    def device_chunk_offsets(self, chunk: int) -> torch.Tensor:
        """:meth:`chunk_offsets` as a ``[N + 1]`` tensor beside ``cu_seqlens``, of its dtype; copied once per chunk."""
        kept = self._on_device.get(("chunk", chunk))
        if kept is None:
            kept = self._keep(("chunk", chunk), (self.chunk_offsets(chunk),))
        return kept[0]

    def device_split(self, threshold: int) -> tuple[torch.Tensor, torch.Tensor]:
        """:meth:`split` as two 1-D tensors beside ``cu_seqlens``, of its dtype; copied once per threshold."""
        kept = self._on_device.get(("split", threshold))
        if kept is None:
            kept = self._keep(("split", threshold), self.split(threshold))
        short, long = kept
        return short, long

    def spans(self, threshold: int) -> tuple[Span, ...]:
        """The batch cut where sequences of length <= ``threshold`` and > ``threshold`` meet; see ``spans_of``."""
        kept = self._spans.get(threshold)
        return self._spans.setdefault(threshold, spans_of(self.offsets, threshold)) if kept is None else kept

    def runs(self, threshold: int) -> tuple[Run, ...]:
        """:meth:`spans`, each with a layout of its own, made once per threshold.

        Its offsets are a view of ``cu_seqlens``, or one subtraction queued on the current stream: nothing is copied
        from the host. Inside a capture that subtraction becomes part of the graph and is kept for nobody else.
        """
        kept = self._runs.get(threshold)
        if kept is not None:
            return kept
        spans = self.spans(threshold)
        if len(spans) == 1:
            return (Run(spans[0], self),)  # not kept: a layout that holds itself would outlive its last user
        made = tuple(Run(span, self._part(span)) for span in spans)
        if self.cu_seqlens.is_cuda and _capturing():
            return made
        return self._runs.setdefault(threshold, made)

    def _part(self, span: Span) -> SequenceLayout:
        offsets = tuple(x - span.start for x in self.offsets[span.first : span.last + 1])
        cu = self.cu_seqlens[span.first : span.last + 1]
        return SequenceLayout(offsets, cu - span.start if span.start else cu)

    def _keep(self, name: tuple[str, int], rows: tuple[tuple[int, ...], ...]) -> tuple[torch.Tensor, ...]:
        cu = self.cu_seqlens
        # Two threads may both make them; one is kept.
        return self._on_device.setdefault(name, tuple(to_device(row, cu.dtype, cu.device) for row in rows))

    def __repr__(self) -> str:
        return f"SequenceLayout({self.profile.label}, n={self.n}, tokens={self.tokens}, longest={self.longest})"


def _capturing() -> bool:
    import torch

    return torch.cuda.is_current_stream_capturing()


def _on_host(values: Sequence[int] | torch.Tensor, argument: str) -> Sequence[int] | torch.Tensor:
    """``values`` as they are, or an error if reading them would wait for a device or is not possible at all."""
    import torch

    if isinstance(values, torch.Tensor):
        if values.device.type != "cpu":
            raise ArgumentValueError(argument, "values on the host", f"a tensor on {values.device}")
        if values.is_floating_point() or values.dim() != 1:
            raise ArgumentTypeError(argument, "a 1-D tensor of integers", f"{values.dtype} {list(values.shape)}")
    return values
