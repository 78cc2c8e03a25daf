"""Whether the kernel is right on a GPU: the suite, every config, graph replay, far pools, many sequences."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from ...registry.backend import Config
from ...registry.conformance.check import Status, Tier
from ...registry.conformance.runner import run_checks
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.checks import CHECKS
from ...registry.ops.fused_sigmoid_gating.inputs import make_inputs
from ...registry.ops.fused_sigmoid_gating.judge import judge
from ...registry.ops.fused_sigmoid_gating.reference import reference
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call
from .backend import Triton

__all__ = ["CASES", "check_all"]

_SHAPE = CaseSpec("gdn kv", (9, 0, 20, 1, 5), k=128, v=128, padded=(4,))
#: Calls that every config must compute with the same bits, and both layouts too.
CASES = (
    _SHAPE,
    _SHAPE.but(name="gdn, bfloat16 pool", state_dtype="bfloat16"),
    _SHAPE.but(name="kda, float32", is_kda=True, io_dtype="float32"),
    _SHAPE.but(name="K=96 V=192, strided rows", k=96, v=192, strides="rows", extra_rows=2),
    _SHAPE.but(name="K=100 V=5, strided", k=100, v=5, strides="any"),
    _SHAPE.but(
        name="tree, bfloat16 buffer", lengths=(3, 0, 7), padded=(), verify="tree", intermediate_dtype="bfloat16"
    ),
    _SHAPE.but(name="chain, float16", lengths=(3, 2), padded=(), verify="chain", io_dtype="float16"),
    _SHAPE.but(name="K=V=256", k=256, v=256, hv=2),
    _SHAPE.but(name="decode", lengths=(1,) * 6, padded=(2,)),
)


def _suite(check_id: str) -> tuple[str, dict[str, int], list[str]]:
    """One check of the suite in a process of its own: findings by status, and what failed."""
    report = run_checks("fused_sigmoid_gating", Triton(), only=[check_id], device="cuda", peers=())
    counted: dict[str, int] = {}
    for finding in report.findings:
        counted[finding.status.value] = counted.get(finding.status.value, 0) + 1
    bad = [f"{f.check} {f.case}: {f.message}" for f in report.findings if f.status in (Status.FAIL, Status.ERROR)]
    return check_id, counted, bad


def _call(spec: CaseSpec, layout: str = "kv") -> Call:
    """The case on the GPU, its states stored in ``layout``; values do not depend on it."""
    call = canonical_call(**make_inputs(spec, device="cuda").kwargs)
    call.out = torch.full(call.v.shape, float("nan"), dtype=call.q.dtype, device="cuda")
    if layout == "kv":
        return call
    turned = {name: getattr(call, name) for name in ("pool", "intermediates")}
    changed = {name: t.transpose(-1, -2).contiguous() for name, t in turned.items() if t is not None}
    return call.replace(**changed, state_layout="vk")


def _written(call: Call) -> list[torch.Tensor]:
    """Everything a call may have written, states as ``[..., K, V]``."""
    states = [t for t in (call.pool, call.intermediates) if t is not None]
    if call.state_layout == "vk":
        states = [t.transpose(-1, -2) for t in states]
    assert call.out is not None
    return [call.out.nan_to_num(7.0), *(t.contiguous() for t in states)]


def _run(call: Call, config: Config | None = None) -> Call:
    backend, problem = Triton(), call.problem("eager")
    backend.bind(problem, backend.configs(problem)[0] if config is None else config)(call)
    torch.cuda.synchronize()
    return call


def _equal(x: Call, y: Call) -> bool:
    return all(torch.equal(a, b) for a, b in zip(_written(x), _written(y), strict=True))


def _configs(spec: CaseSpec) -> list[str]:
    """Every config, in both layouts, within the bound and with the bits of the first. Returns what is wrong."""
    ref = reference(canonical_call(**make_inputs(spec).kwargs))
    first: Call | None = None
    faults = []
    for layout in ("kv", "vk"):
        for config in Triton().configs(_call(spec, layout).problem("eager")):
            call = _run(_call(spec, layout), config)
            assert call.out is not None
            faults += [f"{spec.name} {layout} [{config.label}]: {f}" for f in judge(call, call.out, ref).faults]
            first = call if first is None else first
            if not _equal(call, first):
                faults.append(f"{spec.name} {layout} [{config.label}]: other bits than the first config")
    return faults


def _replayed() -> Iterator[str]:
    """A captured launch, replayed, leaves what an eager one leaves; replayed on other slots too."""
    for spec in (_SHAPE, CASES[2], CASES[-1]):
        eager, captured = _run(_call(spec)), _call(spec)
        backend, problem = Triton(), captured.problem("graph")
        run = backend.bind(problem, backend.configs(eager.problem("eager"))[0])
        assert captured.read_slots is not None
        slots = captured.read_slots.clone()
        graph = torch.cuda.CUDAGraph()
        captured.read_slots.fill_(-1)  # what is captured must not be what is replayed
        with torch.cuda.graph(graph):
            run(captured)
        captured.read_slots.copy_(slots)
        graph.replay()
        torch.cuda.synchronize()
        if not _equal(captured, eager):
            yield f"{spec.name}: a replayed graph leaves other bits"


def _far_pool() -> Iterator[str]:
    """The last slots of a pool of more than 2**31 elements."""
    spec = _SHAPE.but(name="far", padded=(), state_dtype="bfloat16")
    near, far = _call(spec), _call(spec)
    assert near.pool is not None
    assert near.read_slots is not None
    count = 2**31 // near.pool[0].numel() + 64
    pool = torch.zeros(count, *near.pool.shape[1:], dtype=near.pool.dtype, device="cuda")
    slots = torch.arange(count - near.n, count, device="cuda", dtype=near.read_slots.dtype)
    pool[slots.long()] = near.pool[near.read_slots.long()]
    far = far.replace(pool=pool, read_slots=slots)
    _run(near)
    _run(far)
    same = torch.equal(pool[slots.long()], near.pool[near.read_slots.long()])
    if not same or not torch.equal(_written(far)[0], _written(near)[0]):
        yield "slots beyond 2**31 elements: other results than in a small pool"
    if bool(pool[: count - near.n].any()):
        yield "a slot that was not named has changed"


def _many_sequences() -> Iterator[str]:
    """280000 (sequence, head) pairs; some against the same sequence alone."""
    call = _call(CaseSpec("many", (1,) * 70000, h=1, hv=4, k=16, v=8, extra_slots=0))
    assert call.pool is not None
    assert call.read_slots is not None
    assert call.out is not None
    start = call.pool.clone()
    _run(call)
    offsets = torch.tensor([0, 1], dtype=torch.int32, device="cuda")
    for n in (0, 1, 16383, 16384, 65535, 65536, 69999):
        row = {name: getattr(call, name)[:, n : n + 1] for name in ("q", "k", "v", "a", "b")}
        slots = call.read_slots[n : n + 1].clone()
        alone = call.replace(**row, pool=start, read_slots=slots, cu_seqlens=offsets, out=torch.empty_like(row["v"]))
        _run(alone)
        assert alone.out is not None
        if not torch.equal(alone.out, call.out[:, n : n + 1]):
            yield f"sequence {n} of 70000: other output than alone"


def check_all(jobs: int, only: list[str] | None) -> dict[str, Any]:
    """Everything; ``{"ok", "faults", "suite": {check: counts}, "seconds"}``."""
    began = time.monotonic()
    faults: list[str] = []
    suite: dict[str, dict[str, int]] = {}
    ids = [c.id for c in CHECKS if (c.tier is Tier.FAST if only is None else c.id in only)]
    ids.sort(key=lambda i: i not in ("X1", "C11", "C12", "N5", "M12"))  # the longest first
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as workers:
        cases = [(spec.name, workers.submit(_configs, spec)) for spec in CASES]
        for check_id, counted, bad in workers.map(_suite, ids):
            suite[check_id] = counted
            faults += bad
            print(check_id, counted, *bad[:3], flush=True)
        for name, future in cases:
            bad = future.result()
            faults += bad
            print(f"every config: {name}", "ok" if not bad else bad[:3], flush=True)
    named: dict[str, Callable[[], Iterator[str]]] = {
        "graph replay": _replayed,
        "pool beyond 2**31 elements": _far_pool,
        "70000 sequences": _many_sequences,
    }
    for name, examine in named.items():
        bad = list(examine())
        faults += bad
        print(name, "ok" if not bad else bad[:3], flush=True)
    return {"ok": not faults, "faults": faults, "suite": suite, "seconds": round(time.monotonic() - began)}
