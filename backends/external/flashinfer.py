"""FlashInfer: its decode and multi-token kernels, and its chunked prefill."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...registry.backend import Config
from ...registry.decision import RejectCode
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .adapter import Adapter, Run
from .library import Library
from .limits import (
    DENSE,
    GDN,
    HEADS_128,
    HOST_LENGTHS,
    NO_BOUND,
    NO_CHAIN,
    NO_FLOAT64,
    NO_GRAD,
    NO_NEG_EIGVAL,
    NO_TREE,
    ONE_TOKEN,
    SOFTPLUS,
    VK,
    Limit,
    arch,
    dtypes,
    gate_dtypes,
    io_dtypes,
    pool_dtypes,
)

if TYPE_CHECKING:
    import torch

    from ...registry.ops.fused_sigmoid_gating.call import Call
    from .batch import Batch, Spans

__all__ = ["FlashInferDecode", "FlashInferMtp", "FlashInferPrefill"]

_SINCE, _BEFORE = "0.7.2", "0.8"
#: Tokens per sequence that multi-token calls are meant for: a draft of up to 7 and the token before it.
_MOST_STEPS = 8


def _library(module: str, function: str) -> Library:
    return Library("FlashInfer", "flashinfer", "flashinfer-python", _SINCE, _BEFORE, module, function)


class _Steps(Adapter):
    """``gated_delta_rule_decode_pretranspose``: as many tokens of each sequence in one batch ``[B, T, ...]``.

    What it does at a slot of -1 depends on the kernel (a float32 pool: output zero; bfloat16: slot 0 is read and
    overwritten), so states are gathered and scattered around it; on slots that are all valid it may work on the pool
    itself (shortcut ``states=pool``). Lengths that differ are padded with tokens that change nothing.
    """

    requires: ClassVar[tuple[str, ...]] = ("flashinfer",)
    library: ClassVar[Library] = _library("flashinfer.gdn_decode", "gated_delta_rule_decode_pretranspose")
    note: ClassVar[str] = "compiles at its first call; states are gathered and scattered, the output is copied"

    def configs(self, problem: Problem) -> Sequence[Config]:
        return (Config.of(states="gathered"),)

    def shortcuts(self, problem: Problem) -> Sequence[Config]:
        return (Config.of(states="pool"),) if problem.update == "in_place" else ()

    def runner(self, function: Callable[..., Any], problem: Problem, config: Config) -> Run:
        from .batch import Batch, SpansOf, deliver
        from .states import start_states, store_states

        on_pool, spans_of = config["states"] == "pool", SpansOf()

        def run(call: Call) -> torch.Tensor:
            spans = spans_of(call)
            batch = Batch.spanned(call, spans)
            states, slots = (call.pool, batch.read) if on_pool else (start_states(call, batch), spans.order)
            q, k, v, a, b = _steps(batch, spans)
            rows, _ = function(
                q,
                k,
                v,
                None,
                call.A_log,
                a,
                call.dt_bias,
                b,
                scale=call.scale,
                use_qk_l2norm=call.use_qk_l2norm,
                initial_state=states,
                initial_state_indices=slots,
            )
            if not on_pool and states is not None:
                store_states(call, batch, states)
            rows = rows.reshape(1, -1, *rows.shape[2:])
            return deliver(call, rows if spans.equal else rows.index_select(1, spans.padding()[2]))

        return run


def _steps(batch: Batch, spans: Spans) -> tuple[torch.Tensor, ...]:
    """q, k, v, a, b as ``[n, longest, ...]``; tokens beyond a sequence's end neither decay nor add."""
    from .batch import NOTHING

    tensors, shape = (batch.q, batch.k, batch.v, batch.a, batch.b), (spans.n, spans.longest)
    if spans.equal:
        return tuple(t.reshape(*shape, *t.shape[2:]) for t in tensors)
    rows, inside, _ = spans.padding()
    padded = [t.index_select(1, rows) for t in tensors]
    padded[3:] = [t.masked_fill_(~inside[:, None], NOTHING) for t in padded[3:]]
    return tuple(t.view(*shape, *t.shape[2:]) for t in padded)


_STEP_LIMITS = (
    NO_GRAD,
    io_dtypes(("bfloat16",), "computes outputs in bfloat16, and converts them to float16 afterwards"),
    gate_dtypes(("bfloat16",), "a and b in bfloat16"),
    dtypes("A_log_dtype", ("float32",), "A_log in float32"),
    dtypes("dt_bias_dtype", ("float32", "bfloat16"), "dt_bias in float32 or bfloat16"),
    pool_dtypes(("float32", "bfloat16"), "states in float32 or bfloat16"),
    VK,
    GDN,
    NO_BOUND,
    NO_NEG_EIGVAL,
    SOFTPLUS,
    NO_TREE,
    HEADS_128,
    DENSE,
    HOST_LENGTHS,
    arch(90, "needs compute capability 9.0"),
)


class FlashInferDecode(_Steps):
    """One token per sequence; see the base class."""

    name: ClassVar[str] = "flashinfer_decode"
    limits = (*_STEP_LIMITS, NO_CHAIN, ONE_TOKEN)


class FlashInferMtp(_Steps):
    """Two to eight tokens per sequence, in turn; see the base class."""

    name: ClassVar[str] = "flashinfer_mtp"
    limits = (
        *_STEP_LIMITS,
        Limit(
            RejectCode.FEATURE,
            "keeps the state after each token by the sequence's place in the batch, not in a row of one's choice",
            lambda p: p.intermediates == "chain",
        ),
        Limit(
            RejectCode.FEATURE,
            f"meant for 2 to {_MOST_STEPS} tokens per sequence",
            lambda p: p.profile.longest is None or not 1 < p.profile.longest <= _MOST_STEPS,
        ),
    )


class FlashInferPrefill(Adapter):
    """``chunk_gated_delta_rule``: 64 tokens at a time on tensor cores, in CuTe DSL.

    It takes exp(g) and beta, and may not be given a slot of -1, so states are gathered and scattered around it; on
    slots that are all valid it may work on the pool itself (shortcut ``states=pool``).
    """

    name: ClassVar[str] = "flashinfer_prefill"
    requires: ClassVar[tuple[str, ...]] = ("flashinfer",)
    accuracy: ClassVar[str] = "chunked"
    library: ClassVar[Library] = _library("flashinfer.gdn_prefill", "chunk_gated_delta_rule")
    limits = (
        NO_GRAD,
        NO_FLOAT64,
        io_dtypes(("bfloat16", "float16"), "q, k and v in bfloat16 or float16"),
        VK,
        GDN,
        NO_CHAIN,
        NO_TREE,
        HEADS_128,
        DENSE,
        arch(90, "the kernels of compute capability 9.0 were tried", most=90),
    )
    note: ClassVar[str] = "compiles at its first call; states are gathered and scattered, the output is copied"

    def configs(self, problem: Problem) -> Sequence[Config]:
        return (Config.of(chunk=64, states="gathered"),)

    def shortcuts(self, problem: Problem) -> Sequence[Config]:
        return (Config.of(chunk=64, states="pool"),) if problem.update == "in_place" else ()

    def runner(self, function: Callable[..., Any], problem: Problem, config: Config) -> Run:
        from .around import gates
        from .batch import Batch, SpansOf, deliver, order_of
        from .states import start_states, store_states

        on_pool, spans_of, known = config["states"] == "pool", SpansOf(), problem.lengths_on_host
        orders: dict[tuple[int, torch.device], torch.Tensor] = {}

        def run(call: Call) -> torch.Tensor:
            if known:
                spans = spans_of(call)
                batch, order, cu = Batch.spanned(call, spans), spans.order, spans.cu64
            else:
                batch = Batch.whole(call, spans_of)
                order, cu = order_of(batch, orders), batch.cu
            decay, beta = gates(call, batch.a, batch.b, linear=True)
            states, slots = (call.pool, batch.read) if on_pool else (start_states(call, batch), order)
            rows, _ = function(
                batch.q[0],
                batch.k[0],
                batch.v[0],
                decay[0],
                beta[0],
                scale=call.scale or 1.0,  # it takes a scale of 0 for none given
                initial_state=states,
                output_final_state=True,
                output_state=states,
                cu_seqlens=cu,
                use_qk_l2norm_in_kernel=call.use_qk_l2norm,
                state_indices=slots,
            )
            if not on_pool and states is not None:
                store_states(call, batch, states)
            return deliver(call, rows[None] if call.scale else rows[None].zero_())

        return run
