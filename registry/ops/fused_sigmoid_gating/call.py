"""Call: the op's arguments in canonical form, as every backend receives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from operator import attrgetter
from typing import TYPE_CHECKING, Any

from .problem import Intermediates, Problem, StateLayout, Strides, Update

if TYPE_CHECKING:  # who asks the backends for their configs, or the store for a choice, does without torch
    import torch

    from ...varlen.layout import SequenceLayout

__all__ = ["TENSORS", "Call"]

#: The tensors of a call in the op's declared order: what a pinned runner is given.
TENSORS = tuple(
    "A_log a dt_bias q k v b pool read_slots write_slots cu_seqlens intermediates intermediate_rows parents out".split()
)


@dataclass(eq=False, slots=False)
class Call:
    """Canonical arguments of one call. All tensors are views of what the caller passed, never copies.

    Shapes (N sequences, T tokens per batch row, ``HV % H == 0``):
        q, k ``[B, T, H, K]``; v, out ``[B, T, HV, V]``; b ``[B, T, HV]``;
        a ``[B, T, HV]`` (GDN) or ``[B, T, HV, K]`` (KDA); A_log ``[HV]``; dt_bias ``[HV]`` or ``[HV, K]``;
        pool ``[slots, HV, K, V]`` (layout ``kv``) or ``[slots, HV, V, K]`` (``vk``), None without state;
        read_slots, write_slots ``[N]`` int32/int64, None without a pool; write_slots is read_slots unless the
        caller separates them, and None when the update is disabled;
        cu_seqlens ``[N + 1]`` int32/int64 (then B = 1), None for B sequences of T tokens;
        intermediates ``[rows, steps, HV, K, V]`` (or ``V, K``) with intermediate_rows ``[N]``;
        parents ``[N, steps]`` int32/int64: the step whose state step t starts from, negative for the start.
    """

    A_log: torch.Tensor
    a: torch.Tensor
    dt_bias: torch.Tensor
    softplus_beta: float
    softplus_threshold: float
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    b: torch.Tensor
    scale: float
    use_qk_l2norm: bool
    pool: torch.Tensor | None
    read_slots: torch.Tensor | None
    write_slots: torch.Tensor | None
    state_layout: StateLayout
    cu_seqlens: torch.Tensor | None
    layout: SequenceLayout | None
    max_seqlen: int | None
    is_kda: bool
    lower_bound: float | None
    allow_neg_eigval: bool
    intermediates: torch.Tensor | None
    intermediate_rows: torch.Tensor | None
    parents: torch.Tensor | None
    out: torch.Tensor | None

    @property
    def h(self) -> int:
        """Query/key heads."""
        return self.q.shape[2]

    @property
    def hv(self) -> int:
        """Value heads."""
        return self.v.shape[2]

    @property
    def key_dim(self) -> int:
        """K."""
        return self.q.shape[3]

    @property
    def value_dim(self) -> int:
        """V."""
        return self.v.shape[3]

    @property
    def tokens(self) -> int:
        """Tokens in the batch, padding rows beyond the last offset included."""
        return self.q.shape[0] * self.q.shape[1]

    @property
    def n(self) -> int:
        """Number of sequences."""
        return self.q.shape[0] if self.cu_seqlens is None else self.cu_seqlens.shape[0] - 1

    @property
    def lengths_on_host(self) -> bool:
        """Whether :attr:`offsets` can be read without waiting for a device."""
        return self.cu_seqlens is None or self.layout is not None or not self.cu_seqlens.is_cuda

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """``N + 1`` row offsets of the sequences into the flattened ``B * T`` tokens, on the host.

        Raises RuntimeError where that would need a device-to-host copy: a backend that needs host lengths
        declines such problems (``Problem.lengths_on_host``).
        """
        if self.cu_seqlens is None:
            length = self.q.shape[1]
            return tuple(range(0, self.tokens + 1, length)) if length else (0,) * (self.n + 1)
        if self.layout is not None:
            return self.layout.offsets
        if self.cu_seqlens.is_cuda:
            raise RuntimeError("the lengths are on the device only; pass a SequenceLayout")
        return tuple(self.cu_seqlens.tolist())

    @cached_property
    def longest(self) -> int | None:
        """Longest length if the host knows it (from the lengths, or as the caller's ``max_seqlen``)."""
        if self.layout is not None:
            return self.layout.longest
        if self.lengths_on_host:
            offsets = self.offsets
            return max((y - x for x, y in pairwise(offsets)), default=0)
        return self.max_seqlen

    @property
    def update(self) -> Update:
        if self.pool is None:
            return "none"
        if self.write_slots is None:
            return "disabled"
        return "in_place" if self.write_slots is self.read_slots else "separate"

    @property
    def verify(self) -> Intermediates:
        if self.intermediates is None:
            return "none"
        return "chain" if self.parents is None else "tree"

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors present, by name."""
        return {name: t for name in TENSORS if (t := getattr(self, name)) is not None}

    def replace(self, **changes: Any) -> Call:
        """A copy with some fields changed; keeps "in place" in place when ``read_slots`` changes."""
        if "read_slots" in changes and "write_slots" not in changes and self.update == "in_place":
            changes["write_slots"] = changes["read_slots"]
        return replace(self, **changes)

    def requires_grad(self) -> bool:
        """Whether autograd must see this call."""
        import torch

        if not torch.is_grad_enabled():
            return False
        return any(t is not None and t.requires_grad for t in _tensors_of(self))

    def strides(self) -> Strides:
        """How packed the floating-point tensors are; see :data:`Strides`."""
        big = [t for t in (self.q, self.k, self.v, self.pool, self.intermediates, self.out) if t is not None]
        gates = [self.a, self.b]
        if all(t.is_contiguous() for t in (*big, *gates, self.A_log, self.dt_bias)):
            return "dense"
        inner_packed = all(t.shape[-1] == 1 or t.stride(-1) == 1 for t in (*big, *gates, self.dt_bias))
        heads_packed = all(t.shape[-2] == 1 or t.stride(-2) == t.shape[-1] for t in (self.q, self.k, self.v)) and all(
            _heads_packed(t, self.is_kda) for t in gates[:1]
        )
        states_packed = all(
            t[(0,) * (t.dim() - 3)].is_contiguous() if t.numel() else True
            for t in (self.pool, self.intermediates)
            if t is not None
        )
        vectors_packed = self.A_log.is_contiguous() and self.dt_bias.is_contiguous()
        return "rows" if inner_packed and heads_packed and states_packed and vectors_packed else "any"

    def problem(self, mode: str | None = None) -> Problem:
        """Describe this call. ``mode`` overrides the launch mode (else: capturing a CUDA graph or not)."""
        import torch

        from ...varlen.profile import VarlenProfile
        from .dtypes import dtype_name

        q = self.q
        arch = 0
        if q.is_cuda:
            major, minor = torch.cuda.get_device_capability(q.device)
            arch = 10 * major + minor
        if mode is None:
            mode = "graph" if q.is_cuda and torch.cuda.is_current_stream_capturing() else "eager"
        tokens = self.tokens
        if self.cu_seqlens is not None and self.lengths_on_host:
            tokens = self.offsets[-1]
        return Problem(
            device=q.device.type,
            arch=arch,
            mode="graph" if mode == "graph" else "eager",
            h=self.h,
            hv=self.hv,
            k=self.key_dim,
            v=self.value_dim,
            io_dtype=dtype_name(q.dtype),
            a_dtype=dtype_name(self.a.dtype),
            b_dtype=dtype_name(self.b.dtype),
            A_log_dtype=dtype_name(self.A_log.dtype),
            dt_bias_dtype=dtype_name(self.dt_bias.dtype),
            state_dtype=None if self.pool is None else dtype_name(self.pool.dtype),
            state_layout=self.state_layout,
            is_kda=self.is_kda,
            lower_bound=self.lower_bound is not None,
            l2norm=self.use_qk_l2norm,
            neg_eigval=self.allow_neg_eigval,
            custom_scale=self.scale != self.key_dim**-0.5,
            custom_softplus=(self.softplus_beta, self.softplus_threshold) != (1.0, 20.0),
            update=self.update,
            intermediates=self.verify,
            intermediate_dtype=None if self.intermediates is None else dtype_name(self.intermediates.dtype),
            index_dtype=None if self.read_slots is None else dtype_name(self.read_slots.dtype),
            row_dtype=None if self.intermediate_rows is None else dtype_name(self.intermediate_rows.dtype),
            parent_dtype=None if self.parents is None else dtype_name(self.parents.dtype),
            varlen=self.cu_seqlens is not None,
            cu_dtype=None if self.cu_seqlens is None else dtype_name(self.cu_seqlens.dtype),
            lengths_on_host=self.lengths_on_host,
            strides=self.strides(),
            grad=self.requires_grad(),
            profile=VarlenProfile.of(self.n, tokens, self.longest) if self.layout is None else self.layout.profile,
        )


_tensors_of: Callable[[Call], tuple[torch.Tensor | None, ...]] = attrgetter(*TENSORS)


def _heads_packed(a: torch.Tensor, is_kda: bool) -> bool:
    if not is_kda:
        return True
    return a.shape[-2] == 1 or a.stride(-2) == a.shape[-1]
