"""SGLang: its fused recurrent kernel in Triton and in CuTe DSL, and its chunked kernels."""

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
    KEY_LIMIT,
    L2NORM,
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

__all__ = ["SglangChunk", "SglangCuteDsl", "SglangTriton"]

_SINCE, _BEFORE = "0.5.23", "0.5.24"


class SglangTriton(Adapter):
    """``fused_sigmoid_gating_delta_rule_update``: the op's own signature, token by token in float32, on its pool.

    Config ``gates``: ``library`` leaves the gates to its kernel, whose ``log(1 + exp(x))`` loses very small decays;
    ``separate`` computes them before, and passes ``a = -g`` with a softplus threshold that every x is beyond.
    """

    name: ClassVar[str] = "sglang_triton"
    requires: ClassVar[tuple[str, ...]] = ("sglang",)
    library: ClassVar[Library] = Library(
        "SGLang",
        "sglang",
        "sglang",
        _SINCE,
        _BEFORE,
        "sglang.kernels.ops.attention.linear.fused_sigmoid_gating_recurrent",
        "fused_sigmoid_gating_delta_rule_update",
    )
    limits = (
        NO_GRAD,
        NO_FLOAT64,
        VK,
        NO_NEG_EIGVAL,
        Limit(RejectCode.FEATURE, "writes the slot it reads: no separate slots", lambda p: p.update == "separate"),
        Limit(
            RejectCode.FEATURE,
            "a token's parent of -1 is read from in front of the buffer, not from the starting state: no token tree",
            lambda p: p.intermediates == "tree",
        ),
        Limit(RejectCode.LAYOUT, "heads and their values must be packed", lambda p: p.strides == "any"),
        Limit(
            RejectCode.LAYOUT,
            "steps must be packed in the buffer of intermediate states",
            lambda p: p.intermediates == "chain" and p.strides != "dense",
        ),
        Limit(RejectCode.SHAPE, "launches a grid row per sequence, at most 65535", lambda p: p.profile.n > 1 << 15),
        KEY_LIMIT,
    )

    def configs(self, problem: Problem) -> Sequence[Config]:
        return Config.of(gates="separate"), Config.of(gates="library")

    def runner(self, function: Callable[..., Any], problem: Problem, config: Config) -> Run:
        import torch

        from .around import gates
        from .batch import Batch, SpansOf, deliver, refuse_in_capture

        separate, spans_of = config["gates"] == "separate", SpansOf()
        zeros: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = {}

        def gating(call: Call, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float | None]:
            """A_log, a, dt_bias, threshold, lower bound."""
            if not separate:
                return call.A_log, batch.a, call.dt_bias, call.softplus_threshold, call.lower_bound
            g, _ = gates(call, batch.a, batch.b)
            device = g.device
            if device not in zeros:
                refuse_in_capture(device, "once")
                zeros[device] = torch.zeros(call.hv, device=device), torch.zeros(call.dt_bias.shape, device=device)
            A_log, dt_bias = zeros[device]
            return A_log, g.neg_(), dt_bias, -torch.inf, None

        def run(call: Call) -> torch.Tensor:
            batch = Batch.whole(call, spans_of)
            A_log, a, dt_bias, threshold, lower_bound = gating(call, batch)
            rows = function(
                A_log,
                a,
                dt_bias,
                call.softplus_beta,
                threshold,
                batch.q,
                batch.k,
                batch.v,
                batch.b,
                call.pool,
                batch.read,
                scale=call.scale,
                use_qk_l2norm_in_kernel=call.use_qk_l2norm,
                cu_seqlens=batch.cu,
                is_kda=call.is_kda,
                lower_bound=lower_bound,
                disable_state_update=batch.write is None,
                intermediate_states_buffer=call.intermediates,
                intermediate_state_indices=call.intermediate_rows,
            )
            return deliver(call, rows)

        return run


class SglangCuteDsl(Adapter):
    """``cutedsl_fused_sigmoid_gating_delta_rule_update``: decode, compiled anew for every batch and pool size.

    A slot of -1 leaves its output unwritten, so states are gathered and scattered around it; on slots that are all
    valid it may work on the pool itself (shortcut ``states=pool``).
    """

    name: ClassVar[str] = "sglang_cutedsl"
    requires: ClassVar[tuple[str, ...]] = ("cutlass", "sglang")
    library: ClassVar[Library] = Library(
        "SGLang",
        "sglang",
        "sglang",
        _SINCE,
        _BEFORE,
        "sglang.kernels.ops.attention.cutedsl_gdn",
        "cutedsl_fused_sigmoid_gating_delta_rule_update",
    )
    limits = (
        NO_GRAD,
        io_dtypes(("bfloat16",), "reads q, k and v as bfloat16 and writes bfloat16"),
        gate_dtypes(("bfloat16",), "reads a and b as bfloat16"),
        dtypes("A_log_dtype", ("float32",), "reads A_log as float32"),
        dtypes(
            "dt_bias_dtype", ("bfloat16",), "reads dt_bias as bfloat16, whatever it is: a float32 one gives wrong gates"
        ),
        pool_dtypes(("float32",), "float32 states only: a bfloat16 pool makes it access memory out of bounds"),
        VK,
        GDN,
        NO_BOUND,
        NO_NEG_EIGVAL,
        SOFTPLUS,
        Limit(RejectCode.FEATURE, "compiled with scale = K**-0.5, whatever scale says", lambda p: p.custom_scale),
        L2NORM,
        NO_CHAIN,
        NO_TREE,
        HEADS_128,
        DENSE,
        HOST_LENGTHS,
        ONE_TOKEN,
        arch(90, "tried on compute capability 9.0 and later only"),
    )
    note: ClassVar[str] = "compiles for every batch size; states are gathered and scattered, the output is copied"

    def configs(self, problem: Problem) -> Sequence[Config]:
        return (Config.of(states="gathered"),)

    def shortcuts(self, problem: Problem) -> Sequence[Config]:
        direct = problem.update == "in_place" and problem.index_dtype == "int32"
        return (Config.of(states="pool"),) if direct else ()

    def runner(self, function: Callable[..., Any], problem: Problem, config: Config) -> Run:
        from .batch import Batch, SpansOf, deliver
        from .states import start_states, store_states

        on_pool, spans_of = config["states"] == "pool", SpansOf()

        def run(call: Call) -> torch.Tensor:
            spans = spans_of(call)
            batch = Batch.spanned(call, spans)
            states, slots = (call.pool, batch.read) if on_pool else (start_states(call, batch), spans.order)
            rows = function(
                call.A_log,
                call.dt_bias,
                batch.q,
                batch.k,
                batch.v,
                batch.a,
                batch.b,
                states,
                slots,
                cu_seqlens=spans.cu,
            )
            if not on_pool and states is not None:
                store_states(call, batch, states)
            return deliver(call, rows.reshape(batch.v.shape))

        return run


class SglangChunk(Adapter):
    """``chunk_gated_delta_rule`` of SGLang: 64 tokens at a time on tensor cores, in place on the pool.

    It skips slots of -1 by itself. Empty sequences are left out of what it is given: it numbers sequences by their
    chunks, and they have none.
    """

    name: ClassVar[str] = "sglang_chunk"
    requires: ClassVar[tuple[str, ...]] = ("sglang",)
    accuracy: ClassVar[str] = "chunked"
    library: ClassVar[Library] = Library(
        "SGLang",
        "sglang",
        "sglang",
        _SINCE,
        _BEFORE,
        "sglang.kernels.ops.attention.fla.chunk",
        "chunk_gated_delta_rule",
    )
    limits = (
        NO_GRAD,
        NO_FLOAT64,
        io_dtypes(("bfloat16", "float16"), "refuses float32 q, k and v"),
        GDN,
        VK,
        Limit(
            RejectCode.LAYOUT,
            "copies what is not contiguous, the pool too, and then updates the copy",
            lambda p: p.strides != "dense",
        ),
        NO_CHAIN,
        NO_TREE,
        KEY_LIMIT,
        HOST_LENGTHS,
    )
    note: ClassVar[str] = "compiles at its first call; gates in a kernel of their own, the output is copied"

    def configs(self, problem: Problem) -> Sequence[Config]:
        return (Config.of(chunk=64),)

    def runner(self, function: Callable[..., Any], problem: Problem, config: Config) -> Run:
        from .around import gates
        from .batch import Batch, SpansOf, deliver
        from .states import start_states, store_states

        spans_of = SpansOf()
        on_pool = problem.update in ("in_place", "disabled")

        def run(call: Call) -> torch.Tensor:
            spans = spans_of(call)
            batch = Batch.spanned(call, spans)
            g, beta = gates(call, batch.a, batch.b)
            states, slots = (call.pool, batch.read) if on_pool else (start_states(call, batch), spans.order)
            rows, _, _ = function(
                batch.q,
                batch.k,
                batch.v,
                g,
                beta,
                scale=call.scale,
                initial_state=states,
                initial_state_indices=slots,
                cu_seqlens=spans.cu64,
                head_first=False,
                use_qk_l2norm_in_kernel=call.use_qk_l2norm,
                inplace_update=batch.write is not None,
            )
            if not on_pool and states is not None:
                store_states(call, batch, states)
            return deliver(call, rows)

        return run
