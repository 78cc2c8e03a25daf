"""Packed batches: where each sequence starts, and a causal convolution that does not look beyond that.

transformers keeps packed sequences apart only with other packages' kernels; here they always are.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.activations import ACT2FN

from ...errors import IntegrationError
from ...registry.varlen.layout import SequenceLayout

__all__ = ["Layouts", "packed_conv", "packed_offsets"]


def packed_offsets(kwargs: dict[str, Any], batch: int) -> torch.Tensor | None:
    """The offsets ``[N + 1]`` of a packed batch among a layer's keyword arguments; None for an ordinary one.

    Raises:
        IntegrationError: sequences are marked, but not by ``cu_seq_lens_q``, or the batch has several rows.
    """
    offsets = kwargs.get("cu_seq_lens_q")
    if offsets is None:
        if kwargs.get("seq_idx") is not None:
            supported = "cu_seq_lens_q (beside seq_idx, or alone)"
            raise IntegrationError("transformers", "packed batch", "seq_idx without cu_seq_lens_q", supported)
        return None
    if not isinstance(offsets, torch.Tensor) or batch != 1:
        found = f"{type(offsets).__name__} with a batch of {batch} rows"
        raise IntegrationError("transformers", "packed batch", found, "cu_seq_lens_q, a tensor, with one row")
    return offsets


def packed_conv(
    x: torch.Tensor, offsets: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, activation: str
) -> torch.Tensor:
    """``x`` ``[1, channels, T]`` convolved with ``weight`` ``[channels, width]``, each sequence by itself."""
    length, width = x.shape[-1], weight.shape[-1]
    places = torch.arange(length, device=x.device, dtype=offsets.dtype)
    starts = offsets[(torch.searchsorted(offsets, places, right=True) - 1)]
    since = places - starts
    wide = x.to(weight.dtype)
    total = wide * weight[:, -1:]
    for back in range(1, min(width, length)):
        earlier = torch.nn.functional.pad(wide, (back, 0))[..., :length]
        total = total + torch.where(since >= back, earlier, 0) * weight[:, width - 1 - back, None]
    if bias is not None:
        total = total + bias[:, None]
    made: torch.Tensor = ACT2FN[activation](total)
    return made.to(x.dtype)


@dataclass(slots=True)
class Layouts:
    """The SequenceLayout of the batch in hand, made by its first layer and used by the others.

    Only where autograd needs one: its backends must know the lengths on the host, which costs a batch on a GPU one
    device-to-host copy. Without autograd the op takes the tensor, and nothing waits.
    """

    _last: tuple[weakref.ref[torch.Tensor], int, SequenceLayout] | None = field(default=None, repr=False)

    def of(self, offsets: torch.Tensor) -> SequenceLayout:
        last = self._last  # read once: threads replace it
        if last is not None and last[0]() is offsets and last[1] == offsets._version:
            return last[2]
        made = SequenceLayout.from_cu_seqlens(offsets)
        self._last = (weakref.ref(offsets), offsets._version, made)
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Layouts:
        return Layouts()

    def __reduce__(self) -> tuple[Any, ...]:
        return Layouts, ()
