"""Whether the kernel is right on a GPU: the suite, every config, graph replay, far pools, many sequences."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch

from ...registry.conformance.check import Status, Tier
from ...registry.conformance.runner import run_checks
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.checks import CHECKS
from ...registry.ops.fused_sigmoid_gating.inputs import make_inputs
from ...registry.ops.fused_sigmoid_gating.judge import judge
from ...registry.ops.fused_sigmoid_gating.reference import reference
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call
from .backend import NumbaCuda

__all__ = ["check"]

_BASE = CaseSpec("gdn kv", (9, 0, 20, 1, 5), k=128, v=128, padded=(4,))
_CASES = (
    _BASE,
    _BASE.but(name="gdn vk, bfloat16 pool", state_layout="vk", state_dtype="bfloat16"),
    _BASE.but(name="kda vk", is_kda=True, state_layout="vk"),
    _BASE.but(name="kda kv, K=96 V=192", is_kda=True, k=96, v=192),
    _BASE.but(name="tree", lengths=(3, 0, 7, 1), padded=(3,), verify="tree", intermediate_dtype="bfloat16"),
    _BASE.but(name="chain, float16", lengths=(3, 2), padded=(), verify="chain", io_dtype="float16"),
    _BASE.but(name="strided, K=100 V=5", strides="any", k=100, v=5),
    _BASE.but(name="K=V=256", k=256, v=256, hv=2),
    _BASE.but(name="decode", lengths=(1,) * 6, padded=(2,)),
)


def check(jobs: int) -> dict[str, Any]:
    """Everything; ``{"ok": ..., "faults": [...], "suite": {check: counts}, "seconds": ...}``."""
    began = time.time()
    faults: list[str] = []
    suite: dict[str, dict[str, int]] = {}
    ids = [c.id for c in CHECKS if c.tier is Tier.FAST]
    parts: list[tuple[str, Callable[[], Iterator[str]]]] = [
        (f"configs: {c.name}", partial(_configs, c)) for c in _CASES
    ]
    parts += [("graph replay", _replayed), ("far pool", _far_pool), ("many sequences", _many)]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
        suites = {check_id: workers.submit(_suite, check_id) for check_id in ids}
        others = {name: workers.submit(_listed, examine) for name, examine in parts}
        for check_id, running in suites.items():
            suite[check_id], bad = running.result()
            faults += bad
            print(check_id, suite[check_id], *bad[:3], flush=True)
        for name, waiting in others.items():
            bad = waiting.result()
            faults += bad
            print(name, "ok" if not bad else bad[:3], flush=True)
    return {"ok": not faults, "faults": faults, "suite": suite, "seconds": round(time.time() - began)}


def _listed(examine: Callable[[], Iterator[str]]) -> list[str]:
    return list(examine())


def _suite(check_id: str) -> tuple[dict[str, int], list[str]]:
    report = run_checks(NumbaCuda.op, NumbaCuda(), only=[check_id], device="cuda", peers=())
    counts = {status.value: sum(f.status is status for f in report.findings) for status in Status}
    bad = [f for f in report.findings if f.status in (Status.FAIL, Status.ERROR)]
    return counts, [f"{f.check} {f.case}: {f.message}" for f in bad]


def _call(spec: CaseSpec) -> Call:
    call = canonical_call(**make_inputs(spec, device="cuda").kwargs)
    call.out = torch.full(call.v.shape, float("nan"), dtype=call.q.dtype, device="cuda")
    return call


def _bits(call: Call) -> list[torch.Tensor]:
    """Everything a call may have written, as integers: NaN equals NaN."""
    written = [t.contiguous() for t in (call.out, call.pool, call.intermediates) if t is not None]
    return [t.view(torch.int16 if t.element_size() == 2 else torch.int32).clone() for t in written]


def _configs(spec: CaseSpec) -> Iterator[str]:
    """Every config within the bound, all of them with the same bits; what is wrong."""
    backend = NumbaCuda()
    ref = reference(canonical_call(**make_inputs(spec).kwargs))
    first: list[torch.Tensor] = []
    for config in backend.configs(_call(spec).problem()):
        call = _call(spec)
        out = backend.bind(call.problem(), config)(call)
        torch.cuda.synchronize()
        yield from (f"{spec.name} [{config.label}]: {fault}" for fault in judge(call, out, ref).faults)
        first = first or _bits(call)
        if not all(torch.equal(x, y) for x, y in zip(_bits(call), first, strict=True)):
            yield f"{spec.name} [{config.label}]: other bits than the default config"


def _replayed() -> Iterator[str]:
    """A captured launch, replayed on new contents of the same tensors, gives what an eager one gives."""
    backend = NumbaCuda()
    for spec in _CASES[:3]:
        eager, captured = _call(spec), _call(spec)
        run = backend.bind(eager.problem(), backend.configs(eager.problem())[0])
        before = {name: t.clone() for name, t in captured.tensors().items()}
        run(captured)  # loaded before capture
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run(captured)
        for name, t in captured.tensors().items():
            t.copy_(before[name])
        graph.replay()
        run(eager)
        torch.cuda.synchronize()
        if not all(torch.equal(x, y) for x, y in zip(_bits(captured), _bits(eager), strict=True)):
            yield f"{spec.name}: a replayed graph gives other bits"


def _far_pool() -> Iterator[str]:
    """The last slots of a pool of more than 2**31 elements: the bits of the same states in a small pool."""
    backend = NumbaCuda()
    near, far = _call(_BASE.but(padded=())), _call(_BASE.but(padded=()))
    assert near.pool is not None
    assert near.read_slots is not None
    count = 2**31 // near.pool[0].numel() + 64
    pool = torch.empty(count, *near.pool.shape[1:], device="cuda")
    slots = torch.arange(count - near.n, count, device="cuda", dtype=near.read_slots.dtype)
    pool[slots.long()] = near.pool[near.read_slots.long()]
    far = far.replace(pool=pool, read_slots=slots)
    run = backend.bind(near.problem(), backend.configs(near.problem())[0])
    run(near)
    run(far)
    torch.cuda.synchronize()
    if not torch.equal(pool[slots.long()], near.pool[near.read_slots.long()]):
        yield "slots beyond 2**31 elements: other states than in a small pool"
    if not torch.equal(_bits(far)[0], _bits(near)[0]):
        yield "slots beyond 2**31 elements: another output than with a small pool"


def _many() -> Iterator[str]:
    """70000 sequences of 4 heads, some of them compared with the same sequence alone."""
    backend = NumbaCuda()
    call = _call(CaseSpec("many", (1,) * 70000, h=1, hv=4, k=16, v=8, extra_slots=0))
    assert call.pool is not None
    assert call.read_slots is not None
    assert call.out is not None
    start = call.pool.clone()
    run = backend.bind(call.problem(), backend.configs(call.problem())[0])
    run(call)
    for n in (0, 1, 65534, 65535, 65536, 69999):
        row = {name: getattr(call, name)[:, n : n + 1] for name in ("q", "k", "v", "a", "b")}
        cu = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
        slot = call.read_slots[n : n + 1].clone()
        alone = call.replace(**row, pool=start, read_slots=slot, cu_seqlens=cu, out=torch.empty_like(row["v"]))
        if not torch.equal(run(alone), call.out[:, n : n + 1]):
            yield f"sequence {n} of 70000: another output than alone"
    if bool(torch.isnan(call.out).any()):
        yield "some of 70000 sequences were not computed"
