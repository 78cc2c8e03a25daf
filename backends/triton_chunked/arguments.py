"""From a problem and a config to the kernels' compile-time constants, and from a call to their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ..triton.arguments import INTEGERS, REALS, grid, integers, reals

if TYPE_CHECKING:
    import torch

    from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = [
    "CHUNK",
    "numbers",
    "prepare_constants",
    "prepare_grid",
    "prepare_options",
    "record_words",
    "scan_constants",
    "scan_grid",
    "scan_options",
    "slots",
    "workspace",
]

#: Tokens of a chunk.
CHUNK = 64
#: Keys that the kernels hold together, at most: for the sums of ``prepare``, and for the state of ``scan``.
_SPAN, _STATE_SPAN = 32, 64
#: bfloat16 that add up to an element of q, k and v; three to a float32.
_EXACT = {"bfloat16": 1, "float16": 2, "float32": 3}
_WORD = 4


def _span(problem: Problem) -> int:
    """Keys of a piece in ``prepare``: a power of two from 16 on, no more than K needs."""
    return max(16, min(_SPAN, 1 << (problem.k - 1).bit_length()))


def _padded(problem: Problem) -> int:
    """Keys of a vector in the workspace: whole pieces."""
    return -(-problem.k // _span(problem)) * _span(problem)


def _state_span(problem: Problem) -> int:
    """The same in ``scan``: twice as many, if they come out even."""
    return _STATE_SPAN if _padded(problem) % _STATE_SPAN == 0 else _span(problem)


def record_words(k: int, is_kda: bool) -> int:
    """32-bit words that ``prepare`` leaves of a chunk and value head; ``k`` is padded."""
    return 2 * CHUNK * CHUNK + (3 * CHUNK * k + k if is_kda else 3 * CHUNK + 16)


def slots(call: Call) -> int:
    """Chunks there is room for: no fewer than there are, known without the lengths."""
    length = call.q.shape[1]
    return length // CHUNK + call.n if call.cu_seqlens is not None else call.n * -(-length // CHUNK)


def workspace(call: Call, problem: Problem) -> int:
    """Bytes that the kernels leave each other of a call."""
    return _WORD * slots(call) * call.hv * record_words(_padded(problem), problem.is_kda)


def numbers(call: Call, out: torch.Tensor) -> dict[str, int | float]:
    """All scalars and strides that a kernel may name."""
    named = dict(zip((*REALS, *INTEGERS), (*reals(call), *integers(call, out)), strict=True))
    return named | {"HV": call.hv}


def _shared(problem: Problem, pieces: int) -> dict[str, int | bool]:
    return {
        "GROUP": problem.hv // problem.h,
        "K": problem.k,
        "C": CHUNK,
        "RECORD": record_words(_padded(problem), problem.is_kda),
        "KEYS": _padded(problem),
        "IN": min(pieces, _EXACT[problem.io_dtype]),
        "PIECES": pieces,
        "KDA": problem.is_kda,
        "VARLEN": problem.varlen,
    }


def prepare_constants(problem: Problem, pieces: int) -> dict[str, int | bool]:
    return _shared(problem, pieces) | {
        "SPAN": _span(problem),
        "BOUNDED": problem.lower_bound,
        "L2NORM": problem.l2norm,
        "NEG_EIGVAL": problem.neg_eigval,
    }


def scan_constants(problem: Problem, config: Config, pieces: int) -> dict[str, int | bool]:
    return _shared(problem, pieces) | {
        "V": problem.v,
        "BV": int(config["v_tile"]),
        "SPAN": _state_span(problem),
        "READ": problem.state_dtype is not None,
        "WRITE": problem.update in ("in_place", "separate"),
    }


def prepare_options(config: Config) -> Mapping[str, int | bool]:
    """What the compiler is told. Products and sums are fused where the source says ``tl.fma`` and nowhere else."""
    return {"num_warps": int(config["prepare"]), "num_stages": 1, "enable_fp_fusion": False}


def scan_options(config: Config) -> Mapping[str, int | bool]:
    return {"num_warps": int(config["warps"]), "num_stages": int(config["stages"]), "enable_fp_fusion": False}


def prepare_grid(call: Call) -> tuple[int, int, int]:
    return slots(call) * call.hv, 1, 1


def scan_grid(problem: Problem, config: Config, call: Call) -> tuple[int, int, int]:
    return grid(-(-problem.v // int(config["v_tile"])), call.n, call.hv)
