"""S6: offsets beyond 2**31 elements, on memory that is mapped but hardly touched."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ....conformance.check import Examination, Needs, check
from ....conformance.subject import Subject
from ..case import CaseSpec
from ..dtypes import dtype_of
from ..validate import canonical_call
from .compare import same
from .kwargs import Kwargs, fresh, with_slots
from .trial import Results, Trial

__all__ = ["CHECKS"]


#: A storage of so many 16-bit elements is 5 GB of addresses, of which only the touched pages become memory.
_FAR = 5 * 2**29


@check("S6", "offsets beyond 2**31 elements", needs=Needs.HOST)
def wide_offsets(subject: Subject) -> Iterator[Examination]:
    spec = CaseSpec("far", (3, 2), h=1, hv=2, k=32, v=24, state_dtype="bfloat16")
    for index in ("int32", "int64"):
        yield f"slots beyond 2**31, {index}", partial(_far_slots, subject, spec.but(index_dtype=index))
    yield "slot stride beyond 2**31, vk", partial(_far_slot_stride, subject, spec.but(state_layout="vk"))
    for name in ("q", "k", "v", "a", "b", "out"):
        yield f"token stride of {name}", partial(_far_tokens, subject, spec, name)


def _far_slots(subject: Subject, spec: CaseSpec) -> float | None:
    """The last slots of a pool of more than 2**31 elements."""
    kwargs = fresh(spec, device=subject.device)
    want = Trial(fresh(spec, device=subject.device)).run(subject)
    pool, slots = kwargs["initial_state_source"], kwargs["initial_state_indices"]
    size = pool[0].numel()
    count = _FAR // size
    far = torch.empty(_FAR, dtype=pool.dtype)[: count * size].view(count, *pool.shape[1:])
    moved = [count - 1 - n for n in range(len(slots))]
    for n, slot in enumerate(moved):
        far[slot] = pool[int(slots[n])]
    return _far_run(subject, {**with_slots(kwargs, moved), "initial_state_source": far}, want)


def _far_slot_stride(subject: Subject, spec: CaseSpec) -> float | None:
    """Few slots, far apart: the slot stride, and not the slot number, makes the offset large."""
    kwargs = fresh(spec, device=subject.device)
    want = Trial(fresh(spec, device=subject.device)).run(subject)
    pool, slots = kwargs["initial_state_source"], kwargs["initial_state_indices"]
    stride = 2**30 + 64
    inner = pool[0].stride()
    far = torch.empty(_FAR, dtype=pool.dtype).as_strided((3, *pool.shape[1:]), (stride, *inner))
    for n, slot in enumerate((2, 1)):
        far[slot] = pool[int(slots[n])]
    return _far_run(subject, {**with_slots(kwargs, (2, 1)), "initial_state_source": far}, want)


def _far_tokens(subject: Subject, spec: CaseSpec, name: str) -> float | None:
    """A token stride that puts the last tokens beyond 2**31 elements."""
    kwargs = fresh(spec, device=subject.device)
    want = Trial(fresh(spec, device=subject.device)).run(subject)
    near = kwargs["v"] if name == "out" else kwargs[name]
    stride = 2**29 + 64
    inner = near[0, 0].stride()
    span = stride * (near.shape[1] - 1) + near[0, 0].numel()
    far = torch.empty(span, dtype=dtype_of(spec.io_dtype)).as_strided(near.shape, (span, stride, *inner))
    if name != "out":
        far.copy_(near)
    return _far_run(subject, {**kwargs, name: far}, want)


def _far_run(subject: Subject, kwargs: Kwargs, want: Results) -> float | None:
    """Run on storages too large to be remembered, so only values are compared."""
    call = canonical_call(**kwargs)
    if call.out is None:
        call.out = torch.empty(call.v.shape, dtype=call.q.dtype)
    subject.run(call)
    assert call.pool is not None
    assert call.write_slots is not None
    states = [call.pool[slot] for slot in call.write_slots.tolist()]
    if call.state_layout == "vk":
        states = [state.transpose(-1, -2) for state in states]
    got = Results(call.out.flatten(0, 1).clone(), tuple(s.clone() for s in states), (None,) * call.n)
    return same(subject, "S6", got, want)


CHECKS = (wide_offsets,)
