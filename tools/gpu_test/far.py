"""Properties of large calls: 64-bit offsets, more sequences than a grid axis holds. Each yields its violations."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ...registry.backend import Backend
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from .calls import bind, call_of, wait

__all__ = ["intermediates", "many_sequences", "pool", "rows"]

_BEYOND = 2**31
_SPEC = CaseSpec("far", (9, 0, 20, 1, 5), k=128, v=128, state_dtype="bfloat16", state_layout="vk")


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor


def _same_output(x: Call, y: Call) -> bool:
    """Bit for bit; rows that nothing writes are NaN in both."""
    return torch.equal(_present(x.out).contiguous().view(torch.int16), _present(y.out).view(torch.int16))


def pool(backend: Backend) -> Iterator[str]:
    """The last slots of a pool of more than 2**31 elements: results as in a small one, and nothing else touched."""
    near, far = call_of(_SPEC), call_of(_SPEC)
    states, slots = _present(near.pool), _present(near.read_slots).long()
    count = _BEYOND // states[0].numel() + 64
    large = torch.zeros(count, *states.shape[1:], dtype=states.dtype, device=states.device)
    there = torch.arange(count - near.n, count, device=states.device, dtype=_present(near.read_slots).dtype)
    large[there.long()] = states[slots]
    far = far.replace(pool=large, read_slots=there)
    run = bind(backend, near)
    run(near)
    run(far)
    wait(far)
    if not torch.equal(large[there.long()], states[slots]):
        yield "slots beyond 2**31 elements: other states than in a small pool"
    if not _same_output(far, near):
        yield "slots beyond 2**31 elements: another output than with a small pool"
    if bool(large[: count - near.n].any()):
        yield "a slot that no sequence names has changed"


def intermediates(backend: Backend) -> Iterator[str]:
    """The last rows of a buffer of more than 2**31 elements, read back by a token tree."""
    spec = _SPEC.but(verify="tree", intermediate_dtype="bfloat16")
    near, far = call_of(spec), call_of(spec)
    steps = _present(near.intermediates)
    which = _present(near.intermediate_rows).long()
    count = _BEYOND // steps[0].numel() + 8
    large = torch.zeros(count, *steps.shape[1:], dtype=steps.dtype, device=steps.device)
    there = torch.arange(count - near.n, count, device=steps.device, dtype=_present(near.intermediate_rows).dtype)
    large[there.long()] = steps[which]
    far = far.replace(intermediates=large, intermediate_rows=there)
    run = bind(backend, near)
    run(near)
    run(far)
    wait(far)
    if not torch.equal(large[there.long()], steps[which]):
        yield "rows beyond 2**31 elements: other intermediate states than in a small buffer"
    if not _same_output(far, near):
        yield "rows beyond 2**31 elements: another output than with a small buffer"
    if bool(large[: count - near.n].any()):
        yield "a row that no sequence names has changed"


def rows(backend: Backend) -> Iterator[str]:
    """q, k, v, a, b and the output as views into rows so long that the last tokens lie beyond 2**31 elements."""
    near = call_of(_SPEC)
    run_near = bind(backend, near)
    stride = -(-_BEYOND // (near.tokens - 8) // 64) * 64
    wide = torch.zeros(near.tokens, stride, dtype=near.q.dtype, device=near.q.device)
    views: dict[str, torch.Tensor] = {}
    at = 0
    for name in ("q", "k", "v", "a", "b", "out"):
        own = _present(getattr(near, name))
        inner = own[0, 0].numel()
        views[name] = wide[:, at : at + inner].unflatten(1, own.shape[2:])[None]  # type: ignore[no-untyped-call]
        views[name].copy_(own)
        at += -(-inner // 64) * 64
    far = call_of(_SPEC).replace(**views)
    run_far = bind(backend, far)
    run_near(near)
    run_far(far)
    wait(far)
    if not _same_output(far, near):
        yield "token rows beyond 2**31 elements: another output than from packed ones"
    if not torch.equal(_present(far.pool), _present(near.pool)):
        yield "token rows beyond 2**31 elements: other states than from packed ones"


def many_sequences(backend: Backend) -> Iterator[str]:
    """70000 sequences of 4 heads, more than one grid axis holds; some of them against the same sequence alone."""
    call = call_of(CaseSpec("many", (1,) * 70000, h=1, hv=4, k=16, v=8, extra_slots=0))
    out, slots = _present(call.out), _present(call.read_slots)
    start = _present(call.pool).clone()
    bind(backend, call)(call)
    offsets = torch.tensor([0, 1], dtype=torch.int32, device=out.device)
    for n in (0, 1, 16383, 16384, 65534, 65535, 65536, 69999):
        row = {name: getattr(call, name)[:, n : n + 1] for name in ("q", "k", "v", "a", "b")}
        alone = call.replace(
            **row, pool=start, read_slots=slots[n : n + 1].clone(), cu_seqlens=offsets, out=torch.empty_like(row["v"])
        )
        bind(backend, alone)(alone)
        wait(alone)
        slot = int(slots[n])
        if not torch.equal(_present(alone.out), out[:, n : n + 1]):
            yield f"sequence {n} of 70000: another output than alone"
        if not torch.equal(start[slot], _present(call.pool)[slot]):
            yield f"sequence {n} of 70000: another state than alone"
    if bool(torch.isnan(out).any()):
        yield "some of 70000 sequences were not computed"
