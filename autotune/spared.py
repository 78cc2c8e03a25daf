"""Candidates that need not be tried, because an H100 has shown that they lose: each compiled kernel costs seconds.

It stands here and not with the kernels, since whom to try changes nothing of what they compute. Every setting stays
offered by its backend and runs where it is named; here it is only left out of a warm-up, with the reason.

Of settings this is data of one chip and one kind of problem, and says nothing of others: float32 states with V
contiguous, K = V = 128, a gate per head. In three warm-ups' entries (1 to 256 rows, 8 and 32 value heads) none of these
settings was chosen for a launch by graph (89 problems); of 83 launched eagerly two chose one, which was 0.7 % faster
than what is left, and 3.8 %, a tie in the other warm-up of that problem.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from enum import StrEnum
from typing import Any

from ..registry.backend import Backend, Config
from ..registry.ops.fused_sigmoid_gating.problem import Problem

__all__ = ["outclassed", "spared"]


class _Kind(StrEnum):
    DECODE = "rows of one token"
    SEVERAL = "several tokens"
    CHAIN = "verification of a chain"
    TREE = "verification of a tree"


#: Sequences times value heads up to which each kind was measured.
_MOST_PAIRS = {_Kind.DECODE: 8192, _Kind.SEVERAL: 8192, _Kind.CHAIN: 512, _Kind.TREE: 128}
#: How many of a backend's settings were ever worth trying, in its own order: the default, then those most like it.
_NEAREST: Mapping[str, Mapping[_Kind, int]] = {
    "numba_cuda": {_Kind.DECODE: 8, _Kind.SEVERAL: 8, _Kind.TREE: 4},
    "triton": {_Kind.DECODE: 8, _Kind.SEVERAL: 8, _Kind.CHAIN: 8, _Kind.TREE: 4},
}
#: Their calls take milliseconds to seconds: trying them took a tenth of a warm-up.
_TORCH = "on a GPU each of its operations is a launch: never less than 30 times as long as one kernel for all of them"
_OWN = __name__.partition(".autotune")[0] + ".backends."


def outclassed(backend: Backend, problem: Any) -> str | None:
    """Why ``backend`` need not be tried on ``problem`` where another one can do it; None if it may win."""
    if not isinstance(problem, Problem) or problem.device != "cuda" or not _own(backend):
        return None
    return _TORCH if backend.provenance == "torch" else None


def spared(backend: Backend, configs: Sequence[Config], problem: Any) -> Mapping[Config, str]:
    """Those of ``configs`` that need not be tried on ``problem``, with the reason; never the first, the default.

    Args:
        configs: as the backend lists them for ``problem``.
    """
    kind = _kind(problem) if _own(backend) else None
    if kind is None:
        return {}
    found: dict[Config, str] = {}
    most = _NEAREST.get(backend.name, {}).get(kind, len(configs))
    for place, config in enumerate(configs[1:], 2):
        if place > most:
            found[config] = f"{kind} on an H100: none but the first {most} settings were ever among the best"
        elif backend.name == "cupy" and (why := _of_cupy(config, kind)) is not None:
            found[config] = f"{kind} on an H100: {why}"
    return found


def _own(backend: Backend) -> bool:
    """Whether it is what was measured, and not another one of that name."""
    return type(backend).__module__.startswith(_OWN)


def _kind(problem: Any) -> _Kind | None:
    """None where nothing is known."""
    if not isinstance(problem, Problem) or problem.device != "cuda" or problem.arch != 90 or problem.is_kda:
        return None
    if (problem.k, problem.v, problem.state_dtype, problem.state_layout) != (128, 128, "float32", "kv"):
        return None
    match problem.intermediates:
        case "tree":
            kind = _Kind.TREE
        case "chain":
            kind = _Kind.CHAIN
        case _:
            kind = _Kind.DECODE if problem.profile.longest == 1 else _Kind.SEVERAL
    return kind if problem.profile.n * problem.hv <= _MOST_PAIRS[kind] else None


def _of_cupy(config: Config, kind: _Kind) -> str | None:
    """Why a setting of ``cupy`` need not be tried."""
    lanes, rows, staged = config["lanes"], config["rows"], config["staged"]
    if kind is _Kind.TREE and not (staged and lanes == 4):
        return "four lanes and staged tokens were a quarter faster or more"
    if kind is _Kind.CHAIN:
        if not staged:
            return "tokens that are not staged took 15 % longer or more"
        if lanes == 16 or (lanes == 8 and rows == 1):
            return "so few channels per lane took 70 % longer or more"
    return None
