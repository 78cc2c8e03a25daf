"""The guard: torch's compiled one and the plain Python one accept and refuse the same tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from isokern.registry.ops.fused_sigmoid_gating import guards
from isokern.registry.ops.fused_sigmoid_gating.guards import PythonGuard, compiled_guards, guard


class Marked(torch.Tensor):
    pass


@st.composite
def tensors(draw):
    """Small tensors of few kinds, so that equal ones are drawn often."""
    dims = draw(st.lists(st.integers(0, 2), min_size=1, max_size=2))
    kind = draw(st.sampled_from([torch.float32, torch.int32]))
    t = torch.zeros(*dims, 2, dtype=kind)[..., draw(st.integers(0, 1)) :]
    if draw(st.booleans()):
        t = t.transpose(0, -1)
    if draw(st.integers(0, 4)) == 0:
        t = t.to("meta")
    if kind is torch.float32:
        change = draw(st.integers(0, 9))
        if change == 0:
            t = t.clone().requires_grad_()
        elif change == 1:
            t = torch.nn.Parameter(t, requires_grad=draw(st.booleans()))
        elif change == 2:
            t = t.as_subclass(Marked)
    return t


def test_torch_s_own_guard_is_available_here():
    assert compiled_guards() is not None, "calls would be recognised in plain Python, some microseconds slower"


@settings(max_examples=300, deadline=None)
@given(st.tuples(tensors(), tensors()), st.tuples(tensors(), tensors()))
def test_both_guards_agree_and_mean_equal_properties(first, second):
    fast, plain = guard(first), PythonGuard(first)
    alike = all(
        (type(x), x.shape, x.stride(), x.dtype, x.device, x.requires_grad)
        == (type(y), y.shape, y.stride(), y.dtype, y.device, y.requires_grad)
        for x, y in zip(first, second, strict=True)
    )
    assert fast(*second) == plain(*second) == alike
    assert fast(*first)
    assert plain(*first)


STRANGE = {
    "None": lambda t: None,
    "a number": lambda t: 1.0,
    "a list": lambda t: t.tolist(),
    "another rank": lambda t: t[None],
    "another stride of a single row": lambda t: torch.zeros(1, 8).as_strided((1, 3), (9, 1)),
    "sparse": lambda t: t.to_sparse(),
    "complex": lambda t: t.to(torch.complex64),
    "a numpy array": lambda t: t.numpy(),
    "fake": lambda t: FakeTensorMode().from_tensor(t),
    "made in inference mode": torch.inference_mode()(lambda t: t.clone()),
    "negated view": lambda t: torch._neg_view(t),
}


@pytest.fixture(params=["compiled", "python"])
def made(request):
    return guard if request.param == "compiled" else PythonGuard


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_no_such_tensor_is_refused_without_an_error(made, name):
    t, other = torch.zeros(1, 3), torch.zeros(2)
    assert not made((t, other))(STRANGE[name](torch.zeros(1, 3)), other)


def test_other_states_of_the_thread_are_seen(made):
    t = torch.zeros(2)
    check = made((t,))
    with torch.inference_mode():
        assert not check(t)
    with torch.autocast("cpu"):
        assert not check(t)
    seen = []
    torch.vmap(lambda x: (seen.append(check(x[0])), x)[1])(torch.zeros(3, 1, 2))
    assert seen == [False]
    with torch.no_grad():
        assert check(t), "nothing here requires grad"
    assert check(t)


def test_addresses_and_contents_are_free(made):
    t = torch.zeros(3)
    assert made((t,))(torch.arange(4.0)[1:])


def test_a_tensor_that_is_given_twice_is_no_hindrance():
    t = torch.zeros(3)
    check = guard((t, t))
    assert check(t, t)
    assert check(t, torch.ones(3))
    assert not check(t, torch.ones(4))


def test_without_torch_s_guards_there_is_the_plain_one(monkeypatch):
    monkeypatch.setattr(guards, "compiled_guards", lambda: None)
    assert isinstance(guard((torch.zeros(1),)), PythonGuard)


def test_guards_that_behave_otherwise_are_not_used(monkeypatch):
    class Careless:
        def __init__(self, *tensors, **dims):
            pass

        def check(self, *tensors):
            return True

    monkeypatch.setattr("torch._C._dynamo.guards.TensorGuards", Careless)
    assert compiled_guards.__wrapped__() is None
