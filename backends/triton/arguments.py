"""From a problem and a config to the kernel's compile-time constants, and from a call to its arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem

if TYPE_CHECKING:
    import torch

    from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = [
    "CHAINS",
    "INTEGERS",
    "POINTERS",
    "REALS",
    "TENSOR_OF",
    "constants",
    "grid",
    "integers",
    "options",
    "order_of_sums",
    "pointers",
    "reals",
    "tiles",
]

#: Names of the kernel's tensors, in order.
POINTERS = tuple("q k v a b out A_log dt_bias pool read_slots write_slots offsets steps step_rows parents".split())
#: The tensors of a Call that they are.
TENSOR_OF = {name: name for name in POINTERS} | {
    "offsets": "cu_seqlens",
    "steps": "intermediates",
    "step_rows": "intermediate_rows",
}
REALS = ("scale", "softplus_beta", "softplus_threshold", "lower_bound")
#: Names of its integers: sequences, tokens per row of a batch, then strides in elements.
INTEGERS = tuple(
    (
        "N T q_b q_t q_h q_d k_b k_t k_h k_d v_b v_t v_h v_d a_b a_t a_h a_d g_t b_b b_t b_h "
        "o_b o_t o_h o_d A_h dt_h dt_d pool_s pool_h pool_k pool_v step_r step_t step_h step_k step_v parent_n parent_t"
    ).split()
)
#: Programs along the grid's y axis at most.
_MOST_Y = 65535
_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_WARP = 32
#: Chains of products a sum over K is made of, and the bits of a chain's number in the order they are added over.
CHAINS = 32
_STEPS = (0, 1, 4, 2, 3)
#: Bytes a lane loads at once.
_VECTOR = 16


def tiles(problem: Problem, config: Config) -> int:
    """Programs per sequence and value head."""
    return -(-problem.v // int(config["v_tile"]))


def grid(tiles: int, n: int, hv: int) -> tuple[int, int, int]:
    """Programs for ``n`` sequences of ``hv`` value heads: (tile, head) along x, sequences along y, the rest along z.

    The last ones on z may have no sequence. No number of heads is divided by, and none is compiled in.
    """
    return tiles * hv, min(n, _MOST_Y), -(-n // _MOST_Y)


def options(config: Config) -> dict[str, int | bool]:
    """What the compiler is told. Products and sums are fused where the source says ``tl.fma`` and nowhere else."""
    told: dict[str, int | bool] = {"num_warps": int(config["warps"]), "num_stages": 1, "enable_fp_fusion": False}
    if most := int(config["registers"]):
        told["maxnreg"] = most
    return told


def constants(problem: Problem, config: Config) -> dict[str, int | bool]:
    """The kernel's ``constexpr`` arguments: shapes, flags and tiles, nothing that changes from batch to batch."""
    v_tile, span = int(config["v_tile"]), int(config["k_span"])
    lanes = _lanes(problem, v_tile, span)
    return {
        "GROUP": problem.hv // problem.h,
        "K": problem.k,
        "V": problem.v,
        "BV": v_tile,
        "SPAN": span,
        "LANES": lanes,
        "ORDER": order_of_sums(span, lanes),
        "LEVELS": span.bit_length() - 1,
        "TWO": span == CHAINS // 2 and problem.k > span,
        "WINDOW": int(config["window"]),
        "NEXT": problem.profile.longest is None or problem.profile.longest > int(config["window"]),
        "KDA": problem.is_kda,
        "BOUNDED": problem.lower_bound,
        "L2NORM": problem.l2norm,
        "NEG_EIGVAL": problem.neg_eigval,
        "VARLEN": problem.varlen,
        "READ": problem.state_dtype is not None,
        "WRITE": problem.update in ("in_place", "separate"),
        "STEPS": problem.intermediates != "none",
        "TREE": problem.intermediates == "tree",
        "STREAM": bool(config["stream"]),
    }


def _lanes(problem: Problem, v_tile: int, span: int) -> int:
    """Lanes along the keys of a piece, as the compiler will lay the state's tile out (see ``tiles``)."""
    if problem.state_dtype is None or problem.state_layout == "vk":
        return span
    along_v = max(1, min(_WARP, v_tile * _BYTES[problem.state_dtype] // _VECTOR))
    return min(span, _WARP // along_v)


def order_of_sums(span: int, lanes: int) -> int:
    """The kernel's ORDER: for each step of a sum over a span, three bits: which bit of what is left it adds over.

    Keys are added by bit 0, 1, 4, 2, 3 of their place in the span (see ``tiles``); key ``i`` is at position
    ``i // (span / lanes) + lanes * (i % (span / lanes))``.
    """
    in_lane = (span // lanes).bit_length() - 1
    along = lanes.bit_length() - 1
    left = list(range(span.bit_length() - 1))  # bits of the position not yet added over
    order = 0
    steps = [bit for bit in _STEPS if bit < len(left)]
    for step, bit in enumerate(steps):
        position = bit + along if bit < in_lane else bit - in_lane
        order |= left.index(position) << (3 * step)
        left.remove(position)
    return order


def pointers(call: Call, out: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    """In the order of :data:`POINTERS`; None where the call has no such tensor."""
    return tuple(out if name == "out" else getattr(call, TENSOR_OF[name]) for name in POINTERS)


def reals(call: Call) -> tuple[float, ...]:
    """In the order of :data:`REALS`."""
    bound = 0.0 if call.lower_bound is None else call.lower_bound
    return call.scale, call.softplus_beta, call.softplus_threshold, bound


def integers(call: Call, out: torch.Tensor) -> tuple[int, ...]:
    """In the order of :data:`INTEGERS`; zeros for what is not there."""
    rows, tokens, heads, *inner = call.a.stride()
    gate = (rows, tokens, heads, *inner, 0) if call.is_kda else (rows, 0, heads, 0, tokens)
    bias = call.dt_bias.stride() if call.is_kda else (*call.dt_bias.stride(), 0)
    return (
        call.n,
        call.q.shape[1],
        *call.q.stride(),
        *call.k.stride(),
        *call.v.stride(),
        *gate,
        *call.b.stride(),
        *out.stride(),
        *call.A_log.stride(),
        *bias,
        *_state_strides(call, call.pool, 4),
        *_state_strides(call, call.intermediates, 5),
        *((0, 0) if call.parents is None else call.parents.stride()),
    )


def _state_strides(call: Call, states: torch.Tensor | None, rank: int) -> tuple[int, ...]:
    """Strides with the last two as (key, value), whatever the layout."""
    if states is None:
        return (0,) * rank
    *outer, x, y = states.stride()
    return (*outer, x, y) if call.state_layout == "kv" else (*outer, y, x)
