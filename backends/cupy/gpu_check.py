"""Is the kernel right on a GPU: the suite, every config, graph replay, far pools, many sequences."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from ...registry.conformance.runner import run_checks
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.checks import CHECKS
from ...registry.ops.fused_sigmoid_gating.inputs import make_inputs
from ...registry.ops.fused_sigmoid_gating.judge import judge
from ...registry.ops.fused_sigmoid_gating.reference import reference
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call
from .backend import Cupy

__all__ = ["check_cases", "check_suite"]

_SHAPE = CaseSpec("gdn kv", (9, 0, 20, 1, 5), k=128, v=128, hv=4, padded=(4,))
_CONFIG_CASES = (
    _SHAPE,
    _SHAPE.but(name="gdn vk bf16 pool", state_layout="vk", state_dtype="bfloat16"),
    _SHAPE.but(name="kda vk", is_kda=True, state_layout="vk"),
    _SHAPE.but(name="kda kv, K=96 V=192", is_kda=True, k=96, v=192),
    _SHAPE.but(
        name="tree bf16 buffer", lengths=(3, 0, 7, 1), padded=(3,), verify="tree", intermediate_dtype="bfloat16"
    ),
    _SHAPE.but(name="chain, float16", lengths=(3, 2), padded=(), verify="chain", io_dtype="float16"),
    _SHAPE.but(name="strided, K=100 V=5", strides="any", k=100, v=5),
    _SHAPE.but(name="K=V=256", k=256, v=256, hv=2),
    _SHAPE.but(name="decode", lengths=(1,) * 6, padded=(2,)),
)


def _suite(check_id: str) -> tuple[str, dict[str, int], list[str]]:
    """One check of the suite, in a process of its own: findings counted by status, and what failed."""
    report = run_checks("fused_sigmoid_gating", Cupy(), only=[check_id], device="cuda", peers=())
    counted: dict[str, int] = {}
    for finding in report.findings:
        counted[finding.status.value] = counted.get(finding.status.value, 0) + 1
    bad = [f"{f.check} {f.case}: {f.message}" for f in report.findings if f.status.value in ("fail", "error")]
    return check_id, counted, bad


def _call(spec: CaseSpec) -> Call:
    call = canonical_call(**make_inputs(spec, device="cuda").kwargs)
    call.out = torch.full(call.v.shape, float("nan"), dtype=call.q.dtype, device="cuda")
    return call


def _left(call: Call) -> list[torch.Tensor]:
    """Bits of everything a call may have written."""
    written = [t for t in (call.out, call.pool, call.intermediates) if t is not None]
    return [t.contiguous().view(torch.int16 if t.element_size() == 2 else torch.int32).clone() for t in written]


def _configs(spec: CaseSpec) -> Iterator[str]:
    """Every config within the bound, and all with the same bits. Yields what is wrong."""
    backend = Cupy()
    first: list[torch.Tensor] | None = None
    for config in backend.configs(_call(spec).problem()):
        call = _call(spec)
        ref = reference(canonical_call(**make_inputs(spec).kwargs))
        out = backend.bind(call.problem(), config)(call)
        torch.cuda.synchronize()
        yield from (f"{spec.name} [{config.label}]: {fault}" for fault in judge(call, out, ref).faults)
        bits = _left(call)
        first = first or bits
        if not all(torch.equal(x, y) for x, y in zip(bits, first, strict=True)):
            yield f"{spec.name} [{config.label}]: other bits than the default config"


def _replayed() -> Iterator[str]:
    """A captured launch, replayed on new contents of the same tensors, gives what an eager one gives."""
    backend = Cupy()
    for spec in _CONFIG_CASES[:3]:
        eager, captured = _call(spec), _call(spec)
        run = backend.bind(eager.problem(), backend.configs(eager.problem())[0])
        run(_call(spec))  # loaded before capture
        run(eager)
        graph = torch.cuda.CUDAGraph()
        names = [n for n in captured.tensors() if n not in ("out", "pool", "intermediates")]
        before = {name: t.clone() for name, t in captured.tensors().items()}
        with torch.cuda.graph(graph):
            run(captured)
        for name in names:
            if getattr(captured, name).is_floating_point():
                getattr(captured, name).zero_()
        for name, t in captured.tensors().items():
            t.copy_(before[name])
        graph.replay()
        torch.cuda.synchronize()
        if not all(torch.equal(x, y) for x, y in zip(_left(captured), _left(eager), strict=True)):
            yield f"{spec.name}: a replayed graph gives other bits"


def _far_pool() -> Iterator[str]:
    """The last slots of a pool of 2**31 elements and more: the bits of the same states in a small pool."""
    backend = Cupy()
    near = _call(_SHAPE.but(name="far", padded=()))
    assert near.pool is not None and near.read_slots is not None  # noqa: PT018
    size = near.pool[0].numel()
    count = 2**31 // size + 64
    pool = torch.empty(count, *near.pool.shape[1:], device="cuda")
    slots = torch.arange(count - near.n, count, device="cuda", dtype=near.read_slots.dtype)
    pool[slots.long()] = near.pool[near.read_slots.long()]
    far = _call(_SHAPE.but(name="far", padded=())).replace(pool=pool, read_slots=slots)
    far.out = torch.empty_like(near.out) if near.out is not None else None
    run = backend.bind(near.problem(), backend.configs(near.problem())[0])
    run(near)
    run(far)
    torch.cuda.synchronize()
    same = torch.equal(pool[slots.long()], near.pool[near.read_slots.long()])
    if not same or not torch.equal(_left(far)[0], _left(near)[0]):
        yield "slots beyond 2**31 elements: other results than in a small pool"


def _many_sequences() -> Iterator[str]:
    """70000 sequences of 4 heads: beyond what one grid axis holds. Sampled against one sequence alone."""
    spec = CaseSpec("many", (1,) * 70000, h=1, hv=4, k=16, v=8, extra_slots=0)
    backend = Cupy()
    call = _call(spec)
    assert call.pool is not None and call.read_slots is not None and call.out is not None  # noqa: PT018
    start = call.pool.clone()
    run = backend.bind(call.problem(), backend.configs(call.problem())[0])
    run(call)
    for n in (0, 1, 65534, 65535, 65536, 69999):
        cu = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        row = {name: getattr(call, name)[:, n : n + 1] for name in ("q", "k", "v", "a", "b")}
        alone = call.replace(**row, pool=start, read_slots=call.read_slots[n : n + 1].clone(), cu_seqlens=cu, out=None)
        alone = alone.replace(out=torch.empty_like(row["v"]))
        run(alone)
        if alone.out is None or not torch.equal(alone.out, call.out[:, n : n + 1]):
            yield f"sequence {n} of 70000: other output than alone"
    if bool(torch.isnan(call.out).any()):
        yield "some of 70000 sequences were not computed"


def check_suite(jobs: int = 8) -> dict[str, Any]:
    """The conformance suite with default configs, its checks in ``jobs`` processes that share the GPU.

    Returns ``{"ok": bool, "faults": [...], "suite": {check: counts by status}, "seconds": int}``.
    """
    began = time.time()
    faults: list[str] = []
    suite: dict[str, dict[str, int]] = {}
    # X1 and the numerics take longest: first, so that no process works on one of them alone at the end.
    ids = sorted(
        (c.id for c in CHECKS if c.tier.value == "fast"), key=lambda i: (i not in ("X1", "C11", "C12"), i[0] != "N")
    )
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
        for check_id, counted, bad in workers.map(_suite, ids):
            suite[check_id] = counted
            faults += bad
            print(check_id, counted, *bad[:3], flush=True)
    return {"ok": not faults, "faults": faults, "suite": suite, "seconds": round(time.time() - began)}


def check_cases() -> dict[str, Any]:
    """Every config on a few cases, graph replay, far pools and many sequences, in this process: also what to run under
    compute-sanitizer. Returns ``{"ok": bool, "faults": [...], "seconds": int}``.
    """
    began = time.time()
    faults: list[str] = []
    named: tuple[tuple[str, Callable[[], Iterator[str]]], ...] = (
        *((f"configs: {spec.name}", partial(_configs, spec)) for spec in _CONFIG_CASES),
        ("graph replay", _replayed),
        ("far pool", _far_pool),
        ("many sequences", _many_sequences),
    )
    for name, examine in named:
        bad = list(examine())
        faults += bad
        print(name, "ok" if not bad else bad[:3], flush=True)
    return {"ok": not faults, "faults": faults, "seconds": round(time.time() - began)}
