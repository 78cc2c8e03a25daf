"""Problem: one call of the op, described by what the host knows without reading the device."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal

from ...accuracy import DEFAULT, Accuracy
from ...varlen.profile import VarlenProfile

__all__ = ["Intermediates", "Problem", "StateLayout", "Strides", "Update"]

StateLayout = Literal["kv", "vk"]
#: What happens to the pool: no pool at all; updated in place; read one slot and write another; read only.
Update = Literal["none", "in_place", "separate", "disabled"]
#: Per-step states stored for verification: none; every step; every step, each starting from its parent.
Intermediates = Literal["none", "chain", "tree"]
#: ``dense``: every tensor contiguous; ``rows``: heads and their values packed, token or slot stride free;
#: ``any``: some innermost dimension is strided too.
Strides = Literal["dense", "rows", "any"]

_NOT_TUNED = frozenset(
    "arch a_dtype b_dtype A_log_dtype dt_bias_dtype index_dtype row_dtype parent_dtype cu_dtype "
    "custom_scale custom_softplus lengths_on_host".split()
)


@dataclass(frozen=True, slots=True)
class Problem:
    """Frozen, hashable description of one call. Two calls with equal problems may share a tuned choice.

    Attributes:
        device: ``"cpu"`` or ``"cuda"``; arch: compute capability times ten (90 for sm_90), 0 on a CPU.
        mode: ``"eager"``, ``"graph"`` (inside a CUDA graph): they rank backends differently.
        h, hv: query/key heads and value heads; k, v: head dimensions of keys and values.
        io_dtype: dtype of q, k, v and the output.
        a_dtype, b_dtype, A_log_dtype, dt_bias_dtype: dtypes of the gate inputs.
        state_dtype: dtype of the pool, None without one; state_layout: order of its last two dimensions.
        is_kda: gates carry K per head; lower_bound: the bounded KDA gate; l2norm: q and k are normalised inside.
        neg_eigval: beta in (0, 2); custom_scale: scale is not K**-0.5; custom_softplus: not (1, 20).
        update, intermediates, intermediate_dtype: what is done with the states.
        index_dtype: dtype of slot indices; row_dtype: of the buffer's rows; parent_dtype: of the token tree.
        varlen: packed by cu_seqlens (else B equal lengths), of cu_dtype.
        lengths_on_host: the lengths can be read without waiting for a device.
        strides: see :data:`Strides`; grad: some input requires grad and grad mode is on.
        profile: buckets of N, tokens and longest length, and the length class.
        accuracy: the policy that the choice is made under; no part of the call, which is described without it.
    """

    device: str
    arch: int
    mode: Literal["eager", "graph"]
    h: int
    hv: int
    k: int
    v: int
    io_dtype: str
    a_dtype: str
    b_dtype: str
    A_log_dtype: str
    dt_bias_dtype: str
    state_dtype: str | None
    state_layout: StateLayout
    is_kda: bool
    lower_bound: bool
    l2norm: bool
    neg_eigval: bool
    custom_scale: bool
    custom_softplus: bool
    update: Update
    intermediates: Intermediates
    intermediate_dtype: str | None
    index_dtype: str | None
    row_dtype: str | None
    parent_dtype: str | None
    varlen: bool
    cu_dtype: str | None
    lengths_on_host: bool
    strides: Strides
    grad: bool
    profile: VarlenProfile
    accuracy: Accuracy = DEFAULT

    def key(self) -> dict[str, int | str | bool | None]:
        """The problem as a flat mapping of scalars: what the store hashes and explain prints.

        The default policy is left out: keys that were stored before there was another one are as good.
        """
        flat = {name: value for name, value in asdict(self).items() if name != "profile"}
        if self.accuracy == DEFAULT:
            del flat["accuracy"]
        flat["n"] = self.profile.n
        flat["tokens"] = self.profile.tokens
        flat["longest"] = self.profile.longest
        flat["length_class"] = self.profile.length_class.value
        return flat

    def tuning_key(self) -> dict[str, int | str | bool]:
        """The part of :meth:`key` that tuned choices are stored under.

        Index and gate dtypes, the values of scale and softplus, and whether the host knows the lengths are left out:
        they decide whether a backend may run (its predicate sees them) but hardly how fast, and every field here
        multiplies what must be tuned.
        A field that does not apply (the pool's dtype without a pool) is absent: the store holds scalars only.
        """
        return {name: value for name, value in self.key().items() if name not in _NOT_TUNED and value is not None}

    @property
    def sizes(self) -> tuple[str, ...]:
        """The fields of :meth:`tuning_key` that only say how much there is: of batches like this one, but larger."""
        return ("n", "tokens", "longest", "length_class")

    def with_mode(self, mode: Literal["eager", "graph"]) -> Problem:
        """The same problem in another launch mode."""
        return replace(self, mode=mode)

    def with_accuracy(self, accuracy: Accuracy) -> Problem:
        """The same problem under another policy."""
        return replace(self, accuracy=accuracy)

    @property
    def label(self) -> str:
        """One line for humans: shape, dtypes, what is special, profile."""
        gate = "KDA" if self.is_kda else "GDN"
        parts = [f"{gate} H={self.h} HV={self.hv} K={self.k} V={self.v} {self.io_dtype}"]
        parts.append(f"state {self.state_dtype} {self.state_layout}" if self.state_dtype else "no pool")
        if self.update not in ("none", "in_place"):
            parts.append(f"update {self.update}")
        if self.intermediates != "none":
            parts.append(f"verify {self.intermediates}")
        parts += [n for n in ("lower_bound", "neg_eigval", "grad") if getattr(self, n)]
        if self.strides != "dense":
            parts.append(f"strides {self.strides}")
        if self.accuracy != DEFAULT:
            parts.append(f"accuracy {self.accuracy}")
        return f"{', '.join(parts)}, {self.profile.label}, {self.device} {self.mode}"
