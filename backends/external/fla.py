"""flash-linear-attention: its recurrent and its chunked kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .adapter import Adapter, Run
from .library import Library
from .limits import (
    GDN,
    HOST_LENGTHS,
    KEY_LIMIT,
    NO_BOUND,
    NO_CHAIN,
    NO_FLOAT64,
    NO_GRAD,
    NO_TREE,
    SOFTPLUS,
    io_dtypes,
)

if TYPE_CHECKING:
    import torch

    from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = ["FlaChunk", "FlaRecurrent"]

_COPIES = "compiles at its first call; states are gathered and scattered, the output is copied"


class FlaRecurrent(Adapter):
    """``fused_recurrent_gated_delta_rule``: token by token in float32, a program per 8 columns of a head's state.

    Both state layouts, KDA through its ``gk``. States are gathered and scattered around it, since it has no pool.
    Config ``gates``: ``separate`` computes g and beta in a kernel of their own; ``library`` in the library's, whose
    softplus is made of approximate instructions that lose very small decays.
    """

    name: ClassVar[str] = "fla_recurrent"
    requires: ClassVar[tuple[str, ...]] = ("fla",)
    library: ClassVar[Library] = Library(
        "flash-linear-attention",
        "fla",
        "fla-core",
        "0.6.0",
        "0.7",
        "fla.ops.gated_delta_rule",
        "fused_recurrent_gated_delta_rule",
    )
    limits = (NO_GRAD, NO_FLOAT64, NO_CHAIN, NO_TREE, KEY_LIMIT)
    note: ClassVar[str] = _COPIES

    def configs(self, problem: Problem) -> Sequence[Config]:
        separate = Config.of(gates="separate")
        fused = problem.is_kda or problem.lower_bound or problem.custom_softplus
        return (separate,) if fused else (separate, Config.of(gates="library"))

    def runner(self, function: Callable[..., Any], problem: Problem, config: Config) -> Run:
        from .around import gates
        from .batch import Batch, SpansOf, deliver
        from .states import start_states, store_states

        in_kernel, spans_of = config["gates"] == "library", SpansOf()
        v_first = problem.state_layout == "vk"

        def run(call: Call) -> torch.Tensor:
            batch = Batch.whole(call, spans_of)
            if in_kernel:
                gating = {
                    "g": batch.a,
                    "beta": batch.b,
                    "use_gate_in_kernel": True,
                    "A_log": call.A_log,
                    "dt_bias": call.dt_bias,
                    "use_beta_sigmoid_in_kernel": True,
                    "allow_neg_eigval": call.allow_neg_eigval,
                }
            else:
                decay, beta = gates(call, batch.a, batch.b)
                gating = {"gk" if call.is_kda else "g": decay, "beta": beta}
            rows, states = function(
                batch.q,
                batch.k,
                batch.v,
                scale=call.scale,
                initial_state=None if call.pool is None else start_states(call, batch),
                output_final_state=batch.write is not None,
                use_qk_l2norm_in_kernel=call.use_qk_l2norm,
                state_v_first=v_first,
                cu_seqlens=batch.cu,
                **gating,
            )
            if states is not None:
                store_states(call, batch, states)
            return deliver(call, rows)

        return run


class FlaChunk(Adapter):
    """``chunk_gated_delta_rule``: 64 tokens at a time on tensor cores, with its own fused gates.

    Empty sequences are left out of what it is given: it numbers sequences by their chunks, and they have none. The
    sigmoid is left to it as well, which keeps the library from handing the call on to FlashQLA.
    """

    name: ClassVar[str] = "fla_chunk"
    requires: ClassVar[tuple[str, ...]] = ("fla",)
    accuracy: ClassVar[str] = "chunked"
    library: ClassVar[Library] = Library(
        "flash-linear-attention",
        "fla",
        "fla-core",
        "0.6.0",
        "0.7",
        "fla.ops.gated_delta_rule",
        "chunk_gated_delta_rule",
    )
    limits = (
        NO_GRAD,
        NO_FLOAT64,
        io_dtypes(("bfloat16", "float16"), "its products take 16-bit operands: float32 would be cut to TF32"),
        GDN,
        NO_BOUND,
        SOFTPLUS,
        NO_CHAIN,
        NO_TREE,
        KEY_LIMIT,
        HOST_LENGTHS,
    )
    note: ClassVar[str] = _COPIES

    def configs(self, problem: Problem) -> Sequence[Config]:
        return (Config.of(chunk=64),)

    def runner(self, function: Callable[..., Any], problem: Problem, config: Config) -> Run:
        from .batch import Batch, SpansOf, deliver
        from .states import start_states, store_states

        spans_of, chunk = SpansOf(), int(config["chunk"])
        v_first = problem.state_layout == "vk"

        def run(call: Call) -> torch.Tensor:
            spans = spans_of(call)
            batch = Batch.spanned(call, spans)
            rows, states = function(
                batch.q,
                batch.k,
                batch.v,
                g=batch.a,
                beta=batch.b,
                scale=call.scale,
                initial_state=None if call.pool is None else start_states(call, batch),
                output_final_state=batch.write is not None,
                use_qk_l2norm_in_kernel=call.use_qk_l2norm,
                use_gate_in_kernel=True,
                A_log=call.A_log,
                dt_bias=call.dt_bias,
                use_beta_sigmoid_in_kernel=True,
                allow_neg_eigval=call.allow_neg_eigval,
                state_v_first=v_first,
                cu_seqlens=spans.cu64,
                cu_seqlens_cpu=spans.cu_cpu,
                chunk_size=chunk,
            )
            if states is not None:
                store_states(call, batch, states)
            return deliver(call, rows)

        return run
