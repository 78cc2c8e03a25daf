"""Calls on the GPU: made from a case, run, compared bit for bit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from ...registry.backend import Backend, Config, Runner
from ...registry.conformance.subject import chunk_of
from ...registry.decision import Rejected
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.inputs import make_inputs
from ...registry.ops.fused_sigmoid_gating.judge import judge
from ...registry.ops.fused_sigmoid_gating.reference import Reference, reference
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call

__all__ = [
    "NotApplicableError",
    "Written",
    "able",
    "bind",
    "call_of",
    "copy_contents",
    "exact",
    "inputs_of",
    "same_bits",
    "wait",
    "written",
    "wrong",
]


class NotApplicableError(Exception):
    """The backend does not claim what was to be examined; says why not."""


#: Everything a call may have written, as integers: a NaN equals itself.
Written = tuple[torch.Tensor, ...]

_OUTPUTS = ("out", "pool", "intermediates")
_BITS = {2: torch.int16, 4: torch.int32}


def call_of(
    spec: CaseSpec, seed: int | None = None, max_seqlen: int | None = None, device: torch.device | str = "cuda"
) -> Call:
    """The case on the GPU; its output is full of NaN."""
    call = canonical_call(**make_inputs(spec, seed, device).kwargs, max_seqlen=max_seqlen)
    call.out = torch.full(call.v.shape, float("nan"), dtype=call.q.dtype, device=device)
    return call


def inputs_of(spec: CaseSpec, seed: int | None = None, device: torch.device | str = "cuda") -> dict[str, Any]:
    """The public op's arguments for the case, on the GPU."""
    return make_inputs(spec, seed, device).kwargs


def wait(call: Call) -> None:
    """Until the device that holds the call is done."""
    if call.q.is_cuda:
        torch.cuda.synchronize(call.q.device)


def bind(backend: Backend, call: Call, config: Config | None = None, mode: str | None = None) -> Runner:
    """The backend's runner for such calls; its default config where none is named.

    Raises NotApplicableError, with the reason, if it declines them.
    """
    problem = call.problem(mode)
    verdict = backend.check(problem)
    if isinstance(verdict, Rejected):
        raise NotApplicableError(verdict.reason)
    return backend.bind(problem, backend.configs(problem)[0] if config is None else config)


def written(call: Call) -> Written:
    """A copy of what the call holds now."""
    tensors = [getattr(call, name) for name in _OUTPUTS]
    return tuple(t.contiguous().view(_BITS[t.element_size()]).clone() for t in tensors if t is not None)


def same_bits(x: Written, y: Written) -> bool:
    return len(x) == len(y) and all(torch.equal(a, b) for a, b in zip(x, y, strict=True))


def copy_contents(target: Call, source: Call) -> None:
    """Fill the tensors of one call with another's values; shapes are the same, addresses stay."""
    for name, tensor in target.tensors().items():
        tensor.copy_(getattr(source, name))


def able(backend: Backend, specs: Iterable[CaseSpec], made: Callable[[CaseSpec], Call]) -> Iterator[CaseSpec]:
    """Those of the cases whose calls the backend does not decline. Raises NotApplicableError if it declines all."""
    reason, some = "", False
    for spec in specs:
        verdict = backend.check(made(spec).problem())
        if isinstance(verdict, Rejected):
            reason = verdict.reason
        else:
            some = True
            yield spec
    if not some:
        raise NotApplicableError(reason)


def exact(spec: CaseSpec, backend: Backend, config: Config) -> Reference:
    """The float64 reference of the case, with the bound that the backend's results are held to."""
    return reference(canonical_call(**make_inputs(spec).kwargs), chunk=chunk_of(backend, config))


def wrong(call: Call, ref: Reference) -> tuple[str, ...]:
    """What is outside the error bound in what a finished call left."""
    assert call.out is not None
    return judge(call, call.out, ref).faults
