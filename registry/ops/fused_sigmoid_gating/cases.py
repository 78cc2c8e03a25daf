"""THE list of cases: concrete calls by tag, shared by tests, gate and benchmarks.

``CASES["smoke"]`` is enough to see that something works, ``core`` spans the contract, ``extended`` adds sizes and
combinations; each tag holds what the one before it holds. ``scenarios`` are single calls with a name of their own.
Shapes are small, K differs from V (equal ones hide a transposed state), HV is a multiple of H, and wherever a
sequence is empty or has no slot, another one of the batch is ordinary.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from types import MappingProxyType

from .case import DISTRIBUTIONS, CaseSpec

__all__ = ["BASE", "CASES", "DECODE", "FLOAT32", "SCENARIOS", "adversarial", "case"]

#: An empty sequence with a slot (it must stay), one without a slot, one token, many: bfloat16 in, float32 states.
BASE = CaseSpec("mixed", (9, 0, 20, 1, 5), padded=(4,))
#: The same in float32 throughout: no rounding of inputs or outputs hides an error.
FLOAT32 = BASE.but(name="mixed float32", io_dtype="float32", gate_dtype="float32", dt_bias_dtype="float32")

SCENARIOS: Mapping[str, CaseSpec] = MappingProxyType(
    {
        # Packing changes nothing: each of three sequences as if it were alone.
        "packed 5,7,6": CaseSpec("packed 5,7,6", (5, 7, 6), extra_slots=2),
        # Three of five states change, in this order; see ``checks.kwargs.with_slots``.
        "slots 0,2,1 of 5": CaseSpec("slots 0,2,1 of 5", (4, 6, 5), extra_slots=2),
        "decode": CaseSpec("decode", (1, 1, 0, 1, 1), padded=(4,)),
        "one long, many short": CaseSpec("one long, many short", (1, 1, 40, 1, 2, 1, 1, 3)),
        "all empty": CaseSpec("all empty", (0, 0, 0)),
        "chunk edges": CaseSpec("chunk edges", (63, 64, 65, 1), h=1, hv=2),
    }
)


def _core() -> tuple[CaseSpec, ...]:
    cases = [BASE, FLOAT32, *SCENARIOS.values()]
    cases += [FLOAT32.but(name=f"{d} float32", distribution=d) for d in DISTRIBUTIONS[1:]]
    cases += [BASE.but(name=f"{d} kda", distribution=d, is_kda=True) for d in ("typical", "long_memory", "extreme")]
    cases += [
        BASE.but(name="vk", state_layout="vk"),
        BASE.but(name="vk kda", state_layout="vk", is_kda=True),
        BASE.but(name="kda bounded", is_kda=True, lower_bound=-5.0),
        BASE.but(name="negative eigenvalues", neg_eigval=True),
        BASE.but(name="no l2 norm", l2norm=False),
        BASE.but(name="bfloat16 pool", state_dtype="bfloat16"),
        BASE.but(name="float16", io_dtype="float16", state_dtype="float16"),
        BASE.but(name="stateless", state_dtype=None, padded=()),
        BASE.but(name="batch", varlen=False, lengths=(6, 6, 6), padded=(1,)),
        BASE.but(name="separate slots", update="separate", fresh=(0,)),
        BASE.but(name="read only", update="disabled"),
        BASE.but(name="verify chain", lengths=(3, 0, 5, 1), padded=(3,), verify="chain", update="disabled"),
        BASE.but(name="verify tree", lengths=(3, 0, 7, 1), padded=(3,), verify="tree", update="disabled"),
        BASE.but(name="strided rows", strides="rows", extra_rows=3),
        BASE.but(name="strided", strides="any", extra_rows=2),
        BASE.but(name="int64, layout", index_dtype="int64", cu_dtype="int64", as_layout=True),
        BASE.but(name="scalars", scale=0.3, softplus_beta=0.7, softplus_threshold=5.0),
    ]
    return tuple(cases)


def _extended() -> tuple[CaseSpec, ...]:
    cases = []
    for h, ratio in product((1, 3), (1, 2, 3, 4, 8)):
        name = f"H={h} HV={h * ratio}"
        cases.append(FLOAT32.but(name=name, lengths=(5, 0, 3), padded=(), h=h, hv=h * ratio, k=16, v=24))
    for k, v in ((1, 5), (5, 1), (31, 17), (96, 192), (100, 128), (256, 128), (128, 256)):
        cases.append(FLOAT32.but(name=f"K={k} V={v}", lengths=(6, 0, 3), padded=(), h=1, hv=2, k=k, v=v))
    for io, state in product(("bfloat16", "float16", "float32"), ("float32", "bfloat16", "float16")):
        gate = "float32" if state == "float32" else "bfloat16"
        cases.append(
            BASE.but(name=f"{io} in, {gate} gates, {state} pool", io_dtype=io, gate_dtype=gate, state_dtype=state)
        )
    cases += [
        BASE.but(name="bfloat16 vectors", A_log_dtype="bfloat16", dt_bias_dtype="bfloat16"),
        BASE.but(name="float32 gates in a bfloat16 call", gate_dtype="float32"),
        BASE.but(
            name="tree, bfloat16 buffer",
            lengths=(4, 7, 2),
            padded=(),
            update="disabled",
            verify="tree",
            intermediate_dtype="bfloat16",
        ),
        BASE.but(name="chain in place", lengths=(4, 7, 0), padded=(), verify="chain"),
        BASE.but(name="strided kda vk", strides="any", is_kda=True, state_layout="vk", gate_dtype="float32"),
    ]
    return tuple(cases)


#: Decode in float32: what a backend specialised on it can show.
DECODE = SCENARIOS["decode"].but(name="decode float32", io_dtype="float32", gate_dtype="float32")

_SMOKE = (BASE, FLOAT32, SCENARIOS["decode"], DECODE, BASE.but(name="kda", is_kda=True))

CASES: Mapping[str, tuple[CaseSpec, ...]] = MappingProxyType(
    {
        "smoke": _SMOKE,
        "core": tuple(dict.fromkeys((*_SMOKE, *_core()))),
        "extended": tuple(dict.fromkeys((*_SMOKE, *_core(), *_extended()))),
        "scenarios": tuple(SCENARIOS.values()),
    }
)


def case(name: str) -> CaseSpec:
    """The case called ``name`` in the list. Raises KeyError."""
    for spec in CASES["extended"]:
        if spec.name == name:
            return spec
    raise KeyError(name)


def adversarial(spec: CaseSpec) -> CaseSpec:
    """The same problem, its tokens dealt out as badly as its profile allows, one sequence without a slot.

    Keeps N, the number of tokens and the longest length, so that the very same problem is dispatched: the longest
    sequence first, then empty ones, what is left at the end.
    """
    padded = spec.padded or ((spec.n // 2,) if spec.n > 2 else ())
    lengths = list(spec.lengths)
    if spec.varlen and spec.n > 1:
        longest, left = max(lengths), spec.tokens
        lengths = []
        for n in range(spec.n):
            room = longest * (spec.n - n - 1)  # what the sequences after this one can hold
            give = longest if n == 0 else max(0, left - room)
            lengths.append(give)
            left -= give
    return spec.but(name=f"{spec.name}, adversarial", lengths=tuple(lengths), padded=padded)
