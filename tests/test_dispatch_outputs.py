"""Outputs made without torch's dispatcher are the tensors that torch itself would have made."""

from __future__ import annotations

import pytest
import torch

from isokern import registry
from isokern.registry.ops.fused_sigmoid_gating import outputs
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.outputs import output_maker

OP = "fused_sigmoid_gating"


def properties(t):
    return t.shape, t.stride(), t.dtype, t.device, t.requires_grad, t.is_inference(), t.storage_offset()


@pytest.fixture(params=["direct", "by torch.empty"])
def way(request, monkeypatch):
    if request.param != "direct":
        monkeypatch.setattr(outputs, "_direct", lambda device_type: None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 4, 2, 8), (3, 1, 1, 5), (1, 0, 2, 8)])
def test_it_is_what_torch_empty_makes(way, shape, dtype):
    packed = torch.zeros(shape, dtype=dtype)
    wide = torch.zeros(*shape[:-1], 2 * shape[-1], dtype=dtype)[..., : shape[-1]]
    for v in (packed, wide):
        make = output_maker(v, dtype)
        assert properties(make(v)) == properties(torch.empty(shape, dtype=dtype))
        with torch.inference_mode():
            assert properties(make(v)) == properties(torch.empty(shape, dtype=dtype))
        assert make(v).data_ptr() not in {v.data_ptr(), 0} or not v.numel()


def test_each_output_is_memory_of_its_own():
    v = torch.zeros(1, 4, 2, 8)
    make = output_maker(v, v.dtype)
    one, two = make(v), make(v)
    assert one.data_ptr() != two.data_ptr()


def test_autograd_takes_it_for_any_tensor():
    v = torch.zeros(1, 4, 2, 8)
    made = output_maker(v, v.dtype)(v).zero_()
    x = torch.ones_like(v, requires_grad=True)
    (made + x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(v))


def test_torch_has_it_here():
    assert outputs._direct("cpu") is not None, "every call would wait for torch.empty_like"


@pytest.mark.parametrize(
    "makes",
    [
        lambda *a: torch.empty(1),
        lambda *a: torch.empty(a[0], dtype=torch.float64),
        lambda *a: torch.empty(*a[:1], device="meta"),
    ],
)
def test_an_allocation_that_behaves_otherwise_is_not_used(monkeypatch, makes):
    monkeypatch.setattr(outputs, "_direct", lambda device_type: makes)
    v = torch.zeros(1, 4, 2, 8)
    assert properties(output_maker(v, v.dtype)(v)) == properties(v)


def test_calls_under_deterministic_algorithms_return_the_same():
    spec = CaseSpec("decode", (1, 1), k=8, v=8)
    op = registry.get(OP)
    expected = op(**make_inputs(spec).kwargs)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.equal(op(**make_inputs(spec).kwargs), expected)
    finally:
        torch.use_deterministic_algorithms(False)
