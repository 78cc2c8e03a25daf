"""FlashQLA: chunked kernels in TileLang for Hopper and Blackwell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .adapter import Adapter, Run
from .library import Library
from .limits import GDN, HEADS_128, HOST_LENGTHS, NO_CHAIN, NO_FLOAT64, NO_GRAD, NO_TREE, arch, io_dtypes

if TYPE_CHECKING:
    import torch

    from ...registry.ops.fused_sigmoid_gating.call import Call

__all__ = ["FlashQla"]


class FlashQla(Adapter):
    """``chunk_gated_delta_rule``: 64 tokens at a time, one long sequence split over the chip.

    Takes g and beta, and float32 states gathered; both state layouts. It reads lengths back to the host whenever the
    tensor of offsets is new to it, and numbers sequences by their chunks, so empty ones are left out.
    """

    name: ClassVar[str] = "flashqla"
    requires: ClassVar[tuple[str, ...]] = ("flash_qla",)
    accuracy: ClassVar[str] = "chunked"
    library: ClassVar[Library] = Library(
        "FlashQLA", "flash_qla", "flash-qla", "0.1.3", "0.2", "flash_qla", "chunk_gated_delta_rule"
    )
    limits = (
        NO_GRAD,
        NO_FLOAT64,
        io_dtypes(("bfloat16", "float16"), "q, k and v in bfloat16 or float16"),
        GDN,
        HEADS_128,
        NO_CHAIN,
        NO_TREE,
        HOST_LENGTHS,
        arch(90, "has kernels for compute capability 9.0, 10.0, 10.3 and 12.x, of which 9.0 was tried", most=90),
    )
    note: ClassVar[str] = "compiles for every head count; states are gathered and scattered, the output is copied"

    def configs(self, problem: Problem) -> Sequence[Config]:
        return (Config.of(chunk=64),)

    def runner(self, function: Callable[..., Any], problem: Problem, config: Config) -> Run:
        import torch

        from .around import gates
        from .batch import Batch, SpansOf, deliver
        from .states import start_states, store_states

        spans_of = SpansOf()
        v_first = problem.state_layout == "vk"

        def run(call: Call) -> torch.Tensor:
            spans = spans_of(call)
            batch = Batch.spanned(call, spans)
            g, beta = gates(call, batch.a, batch.b)
            rows, states = function(
                batch.q,
                batch.k,
                batch.v,
                g,
                beta,
                scale=call.scale,
                initial_state=start_states(call, batch, torch.float32, v_first),
                output_final_state=True,
                use_qk_l2norm_in_kernel=call.use_qk_l2norm,
                cu_seqlens=spans.cu64,
                state_v_first=v_first,
                enable_fwd_cp_cache=False,
            )
            store_states(call, batch, states)
            return deliver(call, rows)

        return run
