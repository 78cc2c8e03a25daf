"""Properties of single launches: odd sizes, CUDA graphs, pinned runners. Each yields a sentence per violation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ...registry import spec as registered_op
from ...registry.backend import Backend, Pinnable
from ...registry.core import Registry
from ...registry.ops.fused_sigmoid_gating.call import TENSORS
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.varlen.layout import SequenceLayout
from .calls import (
    NotApplicableError,
    able,
    bind,
    call_of,
    copy_contents,
    exact,
    inputs_of,
    same_bits,
    wait,
    written,
    wrong,
)
from .cases import REPRESENTATIVE

__all__ = ["capture", "layers", "odd_size", "pinned", "replayed"]

_LAYERS = 8


def _needs_capture(backend: Backend) -> None:
    if "capture_safe" not in backend.tags:
        raise NotApplicableError("not tagged capture_safe")


def odd_size(backend: Backend, k: int, v: int) -> Iterator[str]:
    """Both gates and both layouts at this K and V, against the reference."""
    base = CaseSpec("", (9, 0, 20, 1, 5), hv=4, k=k, v=v, padded=(4,))
    kinds = ((False, "kv"), (False, "vk"), (True, "kv"), (True, "vk"))
    for spec in able(backend, [base.but(is_kda=is_kda, state_layout=layout) for is_kda, layout in kinds], call_of):
        call = call_of(spec)
        config = backend.configs(call.problem())[0]
        bind(backend, call, config)(call)
        wait(call)
        kind = f"{'kda' if spec.is_kda else 'gdn'} {spec.state_layout}"
        yield from (f"{kind}: {fault}" for fault in wrong(call, exact(spec, backend, config)))


def capture(launch: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of what ``launch`` launches; it is not run."""
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        launch()
    return graph


def _changed(spec: CaseSpec) -> CaseSpec:
    """Tensors of the same shapes for other lengths, padding, slots and values."""
    return spec.but(lengths=spec.lengths[::-1], padded=tuple(spec.n - 1 - i for i in spec.padded))


def replayed(backend: Backend) -> Iterator[str]:
    """A captured launch replayed on other contents of its tensors leaves what an eager one leaves there."""
    _needs_capture(backend)
    for spec in able(backend, REPRESENTATIVE, call_of):
        captured, after = call_of(spec, seed=1), call_of(_changed(spec), seed=2)
        run = bind(backend, captured, mode="graph")
        run(call_of(spec, seed=3))  # whatever is compiled or loaded lazily
        graph = capture(lambda call=captured, run=run: run(call))  # type: ignore[misc]
        copy_contents(captured, after)
        graph.replay()
        run(after)
        wait(after)
        if not same_bits(written(captured), written(after)):
            yield f"{spec.name}: a replayed graph leaves other bits than an eager call"
        copy_contents(captured, call_of(spec, seed=1))
        again = call_of(spec, seed=1)
        graph.replay()
        run(again)
        wait(again)
        if not same_bits(written(captured), written(again)):
            yield f"{spec.name}: replayed on its first contents again, the graph leaves other bits"


def layers(backend: Backend) -> Iterator[str]:
    """Eight calls of the public op in one graph, sharing a GraphLayout whose lengths, slots and number of sequences
    change between replays, against eager calls on tensors of their own.
    """
    _needs_capture(backend)
    rows, batches = 24, (((1,) * 6, (5, 0, 3, -1, 7, 2)), ((4, 0, 2, 1, 3), (1, 6, 0, -1, 4)), ((2, 4), (3, 7)))
    spec = CaseSpec("layer", (4,) * 6, h=4, hv=8, k=128, v=128, state_layout="vk")
    op = _op(backend)
    captured, eager = ([inputs_of(spec, seed=layer) for layer in range(_LAYERS)] for _ in range(2))
    device = captured[0]["q"].device
    layout = SequenceLayout.padded(6, device, max_length=4, max_tokens=rows)
    shared = {"cu_seqlens": layout, "initial_state_indices": layout.slots, "backend": backend.name}
    for layer in captured:
        layer.update(shared, out=torch.zeros_like(layer["v"]))
    op.prepare(**captured[0])
    graph = capture(lambda: [op(**layer) for layer in captured])
    for step, (lengths, slots) in enumerate(batches):
        layout.update(lengths, slots)
        graph.replay()
        own = {
            "cu_seqlens": SequenceLayout.from_lengths(lengths, device).cu_seqlens,
            "initial_state_indices": torch.tensor(slots, dtype=torch.int32, device=device),
        }
        for number, (mine, theirs) in enumerate(zip(captured, eager, strict=True)):
            out = op(**theirs | own, backend=backend.name, max_seqlen=4)
            covered = sum(lengths)
            states = mine["initial_state_source"], theirs["initial_state_source"]
            if not (torch.equal(mine["out"][:, :covered], out[:, :covered]) and torch.equal(*states)):
                yield f"replay {step}, layer {number}: the graph leaves other results than an eager call"


def _op(backend: Backend) -> Any:
    """The public op in a registry that holds nothing but this backend."""
    own = Registry({}, load_plugins=False)
    own.register_op(registered_op(backend.op))
    own.register_backend(backend)
    return own.get(backend.op)


def pinned(backend: Backend) -> Iterator[str]:
    """A runner pinned to one call's shapes leaves on other tensors and contents what the bound one leaves."""
    for spec in able(backend, REPRESENTATIVE, call_of):
        first = call_of(spec, seed=1)
        run = bind(backend, first)
        pinnable: object = run
        if not isinstance(pinnable, Pinnable):
            raise NotApplicableError("its runners cannot be pinned")
        before = written(first)
        quick = pinnable.pin(first)
        wait(first)
        if not same_bits(written(first), before):
            yield f"{spec.name}: pinning wrote something"
        if quick is None:
            yield f"{spec.name}: calls on device tensors alone are not pinned"
            continue
        for seed in (2, 3):
            mine, theirs = call_of(_changed(spec), seed=seed), call_of(_changed(spec), seed=seed)
            quick(tuple(getattr(mine, name) for name in TENSORS))
            run(theirs)
            wait(theirs)
            if not same_bits(written(mine), written(theirs)):
                yield f"{spec.name}, seed {seed}: the pinned runner leaves other bits"
