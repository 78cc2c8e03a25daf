"""Default serving workloads: the batches a server of one model runs this op on.

Modelled on what continuous batching makes of production traces: mostly pure decode, then one prompt of one to
eight thousand tokens beside 16 to 130 decode rows, and verification where drafting is on. ``core`` is what a
warm-up without a GPU runs unless told otherwise: every phase, in minutes. With a GPU it is ``wide``: what lies between
and beyond the tuned sizes is chosen by what is tuned near it, and every bucket of decode costs a second.
"""

from __future__ import annotations

from collections.abc import Iterable

from .catalogue import Model
from .lengths import CODE_TRACE, CONVERSATION_TRACE, LengthLayout
from .workload_case import Case, Phase, Policy, Tier, Verify, case_name, parse_case
from .workload_files import dump_workloads, load_workloads

__all__ = [
    "Case",
    "Phase",
    "Policy",
    "Tier",
    "Verify",
    "default_cases",
    "dump_workloads",
    "load_workloads",
    "of_tier",
    "serving_cases",
]

_SMOKE = ("decode N=1", "verify 4x4", "prefill short 1x64", "mixed 3x1+1x16")
_CORE = (
    "decode N=8",
    "decode N=64",
    "verify 16x4",
    "verify tree 4x8",
    "prefill short 16x8",
    "prefill 1x1024",
    "prefill 4x256",
    "mixed 15x1+1x256",
    "mixed 47x1+1x1024",
)
_WIDE = (
    "decode N=2",
    "decode N=4",
    "decode N=16",
    "decode N=32",
    "decode N=128",
    "decode N=256",
    "mixed 3x1+1x512",
    "mixed 30x1+1x30",
    "mixed 9x1+1x2048",
    "prefill 1x128",
)
_TIERS = {Tier.SMOKE: _SMOKE, Tier.CORE: _CORE, Tier.WIDE: _WIDE}
_DECODE_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_VERIFY_ROWS = (1, 4, 16, 64)
_DRAFT_TOKENS = (2, 4, 8, 16)
_PROMPTS = (
    "prefill short 1x16",
    "prefill short 4x64",
    "prefill short 64x16",
    "prefill 1x128",
    "prefill 1x256",
    "prefill 1x512",
    "prefill 1x2048",
    "prefill 1x4096",
    "prefill 1x8192",
    "prefill 8x1024",
    "prefill 64x128",
    "prefill skew 8192",
)
_MIXED = (
    "mixed 16x1+1x1024",  # conversation at its recorded load, and at 2.5 and 4 times it
    "mixed 47x1+1x1024",
    "mixed 84x1+1x1152",
    "mixed 63x1+1x2048",
    "mixed 48x1+16x256",
    "mixed 9x1+1x2048",  # code: few decode rows, longer prompts
    "mixed 25x1+8x1020",
    "mixed 130x1+1x8062",  # a step filled to its 8192 tokens
)
# The rows at which an overriding state dtype is tried: latency bound, in between, and bandwidth bound.
_OTHER_DTYPE_ROWS = (1, 16, 64, 256)


def default_cases(tier: Tier = Tier.FULL) -> tuple[Case, ...]:
    """The cases every model is served with, in its own state dtype, cheapest tiers first."""
    tiers = {case: tier for tier, cases in _TIERS.items() for case in cases}
    packed = (LengthLayout.prompts(trace, 7, 8192, seed=1) for trace in (CONVERSATION_TRACE, CODE_TRACE))
    names = (
        *(case for cases in _TIERS.values() for case in cases),
        *(f"decode N={n}" for n in _DECODE_ROWS),
        *(f"verify {n}x{draft}" for n in _VERIFY_ROWS for draft in _DRAFT_TOKENS),
        *_PROMPTS,
        *(case_name(Phase.PREFILL, lengths) for lengths in packed),
        *_MIXED,
    )
    # dict.fromkeys: the cases of the lower tiers come first and are not listed again by the grids.
    return of_tier((parse_case(name, tiers.get(name, Tier.FULL)) for name in dict.fromkeys(names)), tier)


def serving_cases(model: Model, tier: Tier = Tier.FULL) -> tuple[Case, ...]:
    """``default_cases`` and, in the full tier, decode in the other state dtypes ``model`` is served with."""
    names = (f"decode N={n} {dtype}" for dtype in model.dtypes.state_alternatives for n in _OTHER_DTYPE_ROWS)
    return of_tier((*default_cases(), *(parse_case(name) for name in names)), tier)


def of_tier(cases: Iterable[Case], tier: Tier) -> tuple[Case, ...]:
    """The ``cases`` that ``tier`` includes, in order."""
    order = list(Tier)
    return tuple(case for case in cases if order.index(case.tier) <= order.index(tier))
