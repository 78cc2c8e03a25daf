"""Bad input: a typed error that names the argument, what was expected and what was given, and nothing is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from isokern import registry
from isokern.errors import ArgumentError
from isokern.registry.ops.fused_sigmoid_gating import validate
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.error_inputs import ERROR_INPUTS, ErrorInput
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call
from isokern.registry.ops.fused_sigmoid_gating.validate_values import check_values
from isokern.registry.varlen.layout import SequenceLayout


def _tensors(kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The readable dense tensors of a call; a SequenceLayout counts as its offsets."""
    found = {name: v.cu_seqlens if isinstance(v, SequenceLayout) else v for name, v in kwargs.items()}
    return {
        name: t
        for name, t in found.items()
        if isinstance(t, torch.Tensor) and t.device.type != "meta" and t.layout is torch.strided
    }


def _bits(tensors: dict[str, torch.Tensor]) -> dict[str, bytes]:
    return {name: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, t in tensors.items()}


def _call(kwargs: dict[str, Any]) -> None:
    check_values(canonical_call(**kwargs))


def test_names_are_unique():
    names = [case.name for case in ERROR_INPUTS]
    assert len(set(names)) == len(names)


def test_every_argument_has_a_refused_call():
    arguments = set(canonical_call.__annotations__) - {"return"}
    assert {case.argument for case in ERROR_INPUTS} == arguments


@pytest.mark.parametrize(
    "base",
    dict.fromkeys(case.base for case in ERROR_INPUTS if case.base.hv % case.base.h == 0),
    ids=lambda spec: spec.name,
)
def test_the_unchanged_call_is_accepted(base):
    if base.n:
        _call(make_inputs(base).kwargs)


@pytest.mark.parametrize("case", ERROR_INPUTS, ids=lambda case: case.name)
def test_refused(case: ErrorInput):
    inputs = make_inputs(case.base)
    kwargs = case.apply(inputs.kwargs)
    watched = {**_tensors(inputs.kwargs), **{f"changed {n}": t for n, t in _tensors(kwargs).items()}}
    watched |= {"pool storage": inputs.pool_storage} if inputs.pool_storage is not None else {}
    watched |= {"steps storage": inputs.intermediate_storage} if inputs.intermediate_storage is not None else {}
    before = _bits(watched)

    only_full = case.needs_full and not case.seen_on_host
    if only_full:  # and only then: a check that can be made without reading values must be made always
        canonical_call(**kwargs)
    with pytest.raises(ArgumentError) as caught:
        _call(kwargs) if only_full else canonical_call(**kwargs)

    error = caught.value
    assert type(error) is case.error
    assert error.argument == case.argument
    assert case.argument in str(error)
    assert error.expected
    assert error.expected in str(error)
    assert error.given
    assert error.given in str(error)
    assert len(str(error)) < 400, "a message for people, not a dump of the argument"
    assert _bits(watched) == before


@pytest.mark.parametrize("case", ERROR_INPUTS, ids=lambda case: case.name)
def test_refused_by_the_op_after_a_valid_call(case: ErrorInput):
    """What an earlier call taught the op must not let a bad one through."""
    op = registry.get("fused_sigmoid_gating")
    inputs = make_inputs(case.base)
    if case.base.hv % case.base.h == 0:
        op(**inputs.clone().kwargs, backend="torch_reference")
    kwargs = case.apply(inputs.kwargs)
    watched = {**_tensors(inputs.kwargs), **{f"changed {n}": t for n, t in _tensors(kwargs).items()}}
    before = _bits(watched)

    with pytest.raises(ArgumentError) as caught:
        op(**kwargs, backend="torch_reference", validate="full" if case.needs_full else "fast")

    assert type(caught.value) is case.error
    assert caught.value.argument == case.argument
    assert _bits(watched) == before


def test_an_output_that_requires_grad_is_refused_after_one_that_did_not():
    op = registry.get("fused_sigmoid_gating")
    kwargs = make_inputs(CaseSpec("out", (3,), k=8, v=6)).kwargs
    out = torch.zeros_like(kwargs["v"])
    op(**kwargs, out=out)
    with pytest.raises(ArgumentError) as caught:
        op(**kwargs, out=out.clone().requires_grad_())
    assert caught.value.argument == "out"


def test_no_sequence_and_no_token_are_valid():
    for lengths, varlen in (((), True), ((0, 0), True), ((), False), ((0, 0), False)):
        _call(make_inputs(CaseSpec("empty", lengths, k=8, v=6, varlen=varlen)).kwargs)


def test_a_pool_without_slots_serves_sequences_without_state():
    kwargs = make_inputs(CaseSpec("padded", (2, 1), k=8, v=6, padded=(0, 1))).kwargs
    _call(kwargs | {"initial_state_source": kwargs["initial_state_source"][:0]})


@pytest.mark.parametrize("case", [case for case in ERROR_INPUTS if case.seen_on_host], ids=lambda case: case.name)
def test_what_only_the_contents_of_indices_say_is_refused_by_known_calls_too(case: ErrorInput):
    """Their shapes are those of a call that was served: nothing but the hot path looks."""
    op, inputs = registry.get("fused_sigmoid_gating"), make_inputs(case.base)
    op(**inputs.kwargs)
    before = op.stats()["misses"]
    kwargs = case.apply(make_inputs(case.base).kwargs)
    pool = kwargs["initial_state_source"].clone()
    with pytest.raises(ArgumentError) as caught:
        op(**kwargs)
    assert caught.value.argument == case.argument
    assert torch.equal(kwargs["initial_state_source"], pool)
    if kwargs["initial_state_source"].shape == inputs.kwargs["initial_state_source"].shape:
        assert op.stats()["misses"] == before


def test_check_values_finds_them_wherever_they_are(monkeypatch):
    """On a GPU nobody else does."""
    monkeypatch.setattr(validate, "check_host_indices", lambda *_: None)
    for case in ERROR_INPUTS:
        if case.seen_on_host:
            with pytest.raises(ArgumentError) as caught:
                _call(case.apply(make_inputs(case.base).kwargs))
            assert caught.value.argument == case.argument
