"""The chunked CUDA C++ backend with rounded operands: the suite, and bit relations on inputs that are rounded first.

Most cases of the suite have float32 inputs, which this backend declines. What they compare bit for bit must hold just
as well for the same inputs rounded to bfloat16.
"""

from dataclasses import replace

import pytest
import torch

from isokern.engines import load_engine
from isokern.registry.backend import Backend
from isokern.registry.conformance.check import Status
from isokern.registry.conformance.exceptions import load_exceptions
from isokern.registry.conformance.runner import run_checks

pytestmark = pytest.mark.engine("cuda_on_cpu")
NAME = "cupy_chunked_bf16"
#: Checks that compare bits and hold nothing against the reference.
RELATIONS = ("M1", "M2", "M4", "M5", "M6", "M8", "M12", "S1", "S5E", "C5", "C6", "C8")


def test_conforms(conforms, engine_check):
    conforms(NAME, engine_check)


class Rounding(Backend):
    """The backend inside the engine, for float32 inputs: rounds them, and hands the output back in float32."""

    def __init__(self, inner):
        self.inner = inner
        for attribute in ("op", "name", "provenance", "tags", "priority", "exceptions_file"):
            setattr(self, attribute, getattr(inner, attribute))

    def check(self, problem):
        return self.inner.check(_rounded(problem))

    def configs(self, problem):
        return self.inner.configs(_rounded(problem))

    def bind(self, problem, config):
        run = self.inner.bind(_rounded(problem), config)

        def rounding(call):
            given = call.out
            tensors = {name: getattr(call, name) for name in ("q", "k", "v", "out")}
            result = run(call.replace(**{name: _like(t) for name, t in tensors.items() if t is not None}))
            if given is None:
                return result.to(call.q.dtype)
            covered = torch.zeros(call.tokens, dtype=torch.bool)
            covered[: call.offsets[-1]] = True
            covered = covered.view(call.q.shape[:2])
            given[covered] = result[covered].to(given.dtype)
            return given

        return rounding


def _rounded(problem):
    return replace(problem, io_dtype="bfloat16")


def _like(t):
    """``t`` in bfloat16, with the same strides."""
    span = 1 + sum(stride * (size - 1) for stride, size in zip(t.stride(), t.shape, strict=True)) if t.numel() else 0
    return torch.zeros(span, dtype=torch.bfloat16).as_strided(t.shape, t.stride()).copy_(t)


@pytest.mark.parametrize("check", RELATIONS)
def test_relations_hold_bit_for_bit(check):
    backend, engine = load_engine(NAME)
    report = run_checks(backend.op, Rounding(backend), only=[check], engine=engine)
    assert not [f for f in report.findings if f.status is Status.FAIL], report.describe_failures()
    assert any(f.status is Status.PASS for f in report.findings)


def test_every_check_that_it_declines_is_passed_by_the_same_kernels_in_float32():
    declined = load_exceptions("fused_sigmoid_gating", load_engine(NAME)[0]).entries
    elsewhere = load_exceptions("fused_sigmoid_gating", load_engine("cupy_chunked")[0])
    for check, entry in declined.items():
        assert not elsewhere.declines(check) or entry.reason == elsewhere.entries[check].reason
