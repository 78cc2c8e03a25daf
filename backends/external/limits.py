"""What libraries do not do: limits shared by adapters. Each is a code, a reason, and the problems it applies to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ...registry.decision import RejectCode
from ...registry.ops.fused_sigmoid_gating.problem import Problem

__all__ = [
    "DENSE",
    "GDN",
    "HEADS_128",
    "HOST_LENGTHS",
    "KEY_LIMIT",
    "L2NORM",
    "NO_BOUND",
    "NO_CHAIN",
    "NO_FLOAT64",
    "NO_GRAD",
    "NO_NEG_EIGVAL",
    "NO_TREE",
    "ONE_TOKEN",
    "SOFTPLUS",
    "VK",
    "Limit",
    "arch",
    "dtypes",
    "gate_dtypes",
    "io_dtypes",
    "pool_dtypes",
]

FLOATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class Limit:
    """One reason to decline, and which problems it declines."""

    code: RejectCode
    reason: str
    applies: Callable[[Problem], bool]


def _any_outside(names: tuple[str | None, ...], allowed: tuple[str, ...]) -> bool:
    return any(name is not None and name not in allowed for name in names)


def io_dtypes(allowed: tuple[str, ...], reason: str) -> Limit:
    """q, k, v and the output are of one of ``allowed``."""
    return Limit(RejectCode.DTYPE, reason, lambda p: p.io_dtype not in allowed)


def gate_dtypes(allowed: tuple[str, ...], reason: str) -> Limit:
    """a and b are of one of ``allowed``."""
    return Limit(RejectCode.DTYPE, reason, lambda p: _any_outside((p.a_dtype, p.b_dtype), allowed))


def dtypes(field: str, allowed: tuple[str, ...], reason: str) -> Limit:
    """The problem's ``field`` is one of ``allowed``, or does not apply."""
    return Limit(RejectCode.DTYPE, reason, lambda p: _any_outside((getattr(p, field),), allowed))


def pool_dtypes(allowed: tuple[str, ...], reason: str) -> Limit:
    """The pool is of one of ``allowed``."""
    return dtypes("state_dtype", allowed, reason)


def arch(least: int, reason: str, most: int | None = None) -> Limit:
    """Compute capability (times ten) of at least ``least``, and at most ``most``."""
    return Limit(RejectCode.ARCH, reason, lambda p: p.arch < least or (most is not None and p.arch > most))


NO_GRAD = Limit(RejectCode.GRAD, "not differentiable here", lambda p: p.grad)
NO_FLOAT64 = Limit(
    RejectCode.DTYPE,
    "computes in float32: float64 inputs or states would lose precision",
    lambda p: _any_outside(
        (
            p.io_dtype,
            p.a_dtype,
            p.b_dtype,
            p.A_log_dtype,
            p.dt_bias_dtype,
            p.state_dtype,
            p.intermediate_dtype,
        ),
        FLOATS,
    ),
)
GDN = Limit(RejectCode.FEATURE, "one decay per head: no KDA gates", lambda p: p.is_kda)
NO_BOUND = Limit(RejectCode.FEATURE, "no lower bound of the decay", lambda p: p.lower_bound)
NO_NEG_EIGVAL = Limit(RejectCode.FEATURE, "beta is sigmoid(b): no negative eigenvalues", lambda p: p.neg_eigval)
SOFTPLUS = Limit(RejectCode.FEATURE, "softplus is compiled with beta 1 and threshold 20", lambda p: p.custom_softplus)
L2NORM = Limit(
    RejectCode.FEATURE, "always normalises q and k, whatever use_qk_l2norm_in_kernel says", lambda p: not p.l2norm
)
NO_CHAIN = Limit(RejectCode.FEATURE, "does not keep the state after each token", lambda p: p.intermediates == "chain")
NO_TREE = Limit(RejectCode.FEATURE, "no token tree", lambda p: p.intermediates == "tree")
VK = Limit(
    RejectCode.LAYOUT,
    "states are V by K (layout vk): kv would be read transposed",
    lambda p: p.state_dtype is not None and p.state_layout != "vk",
)
DENSE = Limit(RejectCode.LAYOUT, "takes contiguous tensors only", lambda p: p.strides != "dense")
KEY_LIMIT = Limit(RejectCode.SHAPE, "heads of up to 256", lambda p: max(p.k, p.v) > 256)
HEADS_128 = Limit(RejectCode.SHAPE, "K = V = 128 only", lambda p: (p.k, p.v) != (128, 128))
HOST_LENGTHS = Limit(
    RejectCode.FEATURE,
    "needs the lengths on the host: pass cu_seqlens as a SequenceLayout",
    lambda p: not p.lengths_on_host,
)
ONE_TOKEN = Limit(
    RejectCode.FEATURE,
    "decode only: one token per sequence",
    lambda p: p.profile.longest is None or p.profile.longest > 1,
)
