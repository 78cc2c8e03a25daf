"""CaseSpec: one concrete call described by scalars, so that tests, gate, tuner and benchmarks share one list."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from .problem import Intermediates, StateLayout, Strides, Update

__all__ = ["DISTRIBUTIONS", "CaseSpec", "Distribution"]

#: Value distributions, named after what they stress:
#: ``typical`` A_log = log U(1, 16), normal everything; ``long_memory`` decay close to 1; ``strong_decay`` decay
#: near 0; ``extreme`` gates from -6 to 6 in A_log and tens in a; ``tiny_keys`` keys and queries of 1e-3 and 1e-4;
#: ``uniform_gate`` A_log = 0 and a in (0, 1); ``narrow_gate`` A_log, a, dt_bias within 0.1;
#: ``equal_keys`` one key repeated, the worst case for chunked forms; ``large_values`` values and state of 1e3.
Distribution = Literal[
    "typical",
    "long_memory",
    "strong_decay",
    "extreme",
    "tiny_keys",
    "uniform_gate",
    "narrow_gate",
    "equal_keys",
    "large_values",
]
DISTRIBUTIONS: tuple[Distribution, ...] = (
    "typical",
    "long_memory",
    "strong_decay",
    "extreme",
    "tiny_keys",
    "uniform_gate",
    "narrow_gate",
    "equal_keys",
    "large_values",
)


@dataclass(frozen=True, slots=True)
class CaseSpec:
    """A call to make up: ``make_inputs(spec, seed)`` turns it into tensors. Torch-free; travels between processes.

    Attributes:
        name: what to call it in reports.
        lengths: tokens of each sequence; with ``varlen=False`` all equal (they become the rows of the batch).
        padded: sequences whose slot index is -1; fresh: sequences (update ``separate``) that read -1 and write a slot.
        extra_slots: slots of the pool no sequence names; extra_rows: token rows beyond the last offset.
        as_layout: pass a SequenceLayout instead of a bare ``cu_seqlens``.
        seed: seed of the values, unless ``make_inputs`` is given another.
    """

    name: str
    lengths: tuple[int, ...]
    h: int = 2
    hv: int = 4
    k: int = 64
    v: int = 40
    varlen: bool = True
    distribution: Distribution = "typical"
    io_dtype: str = "bfloat16"
    gate_dtype: str = "bfloat16"
    A_log_dtype: str = "float32"
    dt_bias_dtype: str = "float32"
    state_dtype: str | None = "float32"
    state_layout: StateLayout = "kv"
    is_kda: bool = False
    lower_bound: float | None = None
    l2norm: bool = True
    neg_eigval: bool = False
    scale: float | None = None
    softplus_beta: float = 1.0
    softplus_threshold: float = 20.0
    update: Update = "in_place"
    verify: Intermediates = "none"
    intermediate_dtype: str = "float32"
    index_dtype: str = "int32"
    cu_dtype: str = "int32"
    padded: tuple[int, ...] = ()
    fresh: tuple[int, ...] = ()
    extra_slots: int = 3
    extra_rows: int = 0
    strides: Strides = "dense"
    as_layout: bool = False
    seed: int = 0

    @property
    def n(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    def but(self, **changes: Any) -> CaseSpec:
        """The same case with some fields changed."""
        return replace(self, **changes)
