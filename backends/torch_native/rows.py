"""Reading the token rows of a block of sequences and writing its outputs, without padding and without waiting.

Three ways to reach the rows of n sequences: a plain view (a batch of equal lengths, or packed sequences of equal
length that follow one another: decode, a single prompt), a gather by row number (lengths differ), and the same
gather with masks (only the device knows the lengths).
"""

from __future__ import annotations

import torch

from .sequences import Block, Sequences

__all__ = ["BlockRows", "Window"]


class Window:
    """Steps ``[t, t + width)`` of a block's first ``n`` sequences.

    Attributes:
        n, t, width: as above. Rows beyond a sequence's end stand for its last row.
        valid: ``[n, width]`` bool, which rows are real; None where all are.
    """

    def __init__(self, block: BlockRows, n: int, t: int, width: int) -> None:
        self.n, self.t, self.width = n, t, width
        self._block = block
        self._rows: torch.Tensor | None = None
        self.valid: torch.Tensor | None = None
        if not block.is_view:
            self._rows, self.valid = self._number_rows()

    def _number_rows(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        block = self._block
        starts, lengths = block.starts[: self.n, None], block.lengths[: self.n, None]
        steps = torch.arange(self.t, self.t + self.width, device=starts.device)
        if block.sequences.on_host and block.shortest(self.n) >= self.t + self.width:
            return starts + steps, None
        valid = steps < lengths
        rows = starts + torch.minimum(steps, lengths - 1)
        return (rows if block.sequences.on_host else rows.clamp(0, block.sequences.call.q.shape[1] - 1)), valid

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """The window of ``tokens [B, T, ...]`` as ``[n, width, ...]``: a view, or gathered. Dtype unchanged."""
        if self._rows is None:
            return self._block.view(tokens, self.n)[:, self.t : self.t + self.width]
        return torch.unflatten(tokens[0].index_select(0, self._rows.flatten()), 0, (self.n, self.width))

    def write(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Store ``values [n, width, heads, V]`` (any strides, compute dtype) in ``out [B, T, heads, V]``."""
        if self._rows is None:
            self._block.view(out, self.n)[:, self.t : self.t + self.width].copy_(values)
            return
        rows, flat = self._rows.flatten(), values.flatten(0, 1)
        if self.valid is not None:
            rows, flat = self._redirect(rows, flat, out[0])
        out[0].index_copy_(0, rows, flat.to(out.dtype))

    def _redirect(self, rows: torch.Tensor, flat: torch.Tensor, out: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Make every write harmless: beyond its end a sequence writes its last value to its last row once more."""
        assert self.valid is not None
        sequences = torch.arange(self.n, device=rows.device)[:, None]
        inside = self.valid.sum(1, keepdim=True)  # rows of this window that are real
        steps = torch.arange(self.width, device=rows.device)
        source = (sequences * self.width + torch.minimum(steps, (inside - 1).clamp(min=0))).flatten()
        if self._block.sequences.on_host:
            return rows, flat.index_select(0, source)
        # A sequence that ended before this window rewrites what its last row holds; an empty one, having no row,
        # does what the first other sequence does; if all are empty, row 0 gets its own value back.
        filled = self._block.lengths[: self.n] > 0
        stand_in = torch.where(filled, sequences[:, 0], filled.to(torch.int8).argmax())
        rows = rows.view(self.n, self.width).index_select(0, stand_in).flatten()
        source = source.view(self.n, self.width).index_select(0, stand_in).flatten()
        fresh = (inside > 0).expand(-1, self.width).index_select(0, stand_in).flatten()
        values = flat.index_select(0, source).to(out.dtype)
        return rows, torch.where(fresh[:, None, None], values, out.index_select(0, rows))


class BlockRows:
    """The token rows of one block."""

    def __init__(self, sequences: Sequences, block: Block) -> None:
        self.sequences = sequences
        self.block = block
        self.is_view = sequences.on_host and (sequences.call.cu_seqlens is None or self._follow_one_another())
        if not self.is_view:
            self.starts = sequences.device_starts[block.first : block.last]
            self.lengths = sequences.device_lengths[block.first : block.last]

    def _follow_one_another(self) -> bool:
        mine = slice(self.block.first, self.block.last)
        starts, lengths = self.sequences.starts[mine], self.sequences.lengths[mine]
        return lengths[0] == lengths[-1] and all(s == starts[0] + i * lengths[0] for i, s in enumerate(starts))

    def shortest(self, n: int) -> int:
        """Length of the shortest of the first ``n`` sequences (host lengths only)."""
        return self.sequences.lengths[self.block.first + n - 1]

    def view(self, tokens: torch.Tensor, n: int) -> torch.Tensor:
        """All rows of the first ``n`` sequences as a view ``[n, length, ...]`` of ``tokens [B, T, ...]``."""
        if self.sequences.call.cu_seqlens is None:
            return tokens[self.block.first : self.block.first + n]
        length = self.sequences.lengths[self.block.first]
        start = self.sequences.starts[self.block.first]
        return torch.unflatten(tokens[0, start : start + n * length], 0, (n, length))

    def window(self, t: int, width: int) -> Window:
        """Steps ``[t, t + width)``, cut at the end of the block's longest sequence, of those alive at ``t``."""
        width = min(width, self.sequences.longest(self.block) - t)
        return Window(self, self.sequences.live(self.block, t), t, width)
