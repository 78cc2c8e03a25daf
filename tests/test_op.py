"""The op as users call it: dispatch by call, overrides, explanations, errors, gradients."""

from __future__ import annotations

import copy
import inspect
import sys

import pytest
import torch

from isokern import registry
from isokern.engines import ENGINES
from isokern.errors import (
    ArgumentError,
    ArgumentTypeError,
    ArgumentValueError,
    BackendDeclinedError,
    BackendFailedError,
    UnknownNameError,
)
from isokern.registry import Accepted, FunctionBackend, RejectCode, Rejected, Rule
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call
from isokern.registry.varlen.layout import SequenceLayout

OP = "fused_sigmoid_gating"
BASE = CaseSpec("base", (3, 0, 9), k=16, v=12)


@pytest.fixture
def op():
    return registry.get(OP)


@pytest.fixture
def spy():
    """A backend that takes everything, counts its calls and writes 7."""
    calls = []

    def run(call):
        calls.append(call)
        call.out.fill_(7)
        return call.out

    registry.register_backend(FunctionBackend(run, OP, "spy", priority=-1))
    yield calls
    registry.unregister_backend(OP, "spy")


def conforms(inputs, out, ref):
    verdict = judge(canonical_call(**inputs.kwargs), out, ref)
    assert verdict.ok, verdict.faults


def run_and_judge(spec, **more):
    inputs = make_inputs(spec)
    ref = reference(canonical_call(**inputs.kwargs))
    conforms(inputs, registry.get(OP)(**inputs.kwargs, **more), ref)


class TestCalls:
    def test_positional_order_is_the_fields(self, op):
        k = make_inputs(BASE).kwargs
        names = "A_log a dt_bias softplus_beta softplus_threshold q k v b initial_state_source initial_state_indices"
        o = op(*(k[n] for n in names.split()), None, True, k["cu_seqlens"])
        assert torch.equal(o, op(**make_inputs(BASE).kwargs))

    @pytest.mark.skipif(sys.version_info < (3, 12), reason="classes made in Python have no vectorcall")
    def test_calling_the_object_takes_arguments_as_they_come(self, op):
        vectorcall = 1 << 11  # Py_TPFLAGS_HAVE_VECTORCALL: no tuple and no dictionary is made for a call
        assert type(op).__flags__ & vectorcall

    def test_the_method_that_an_engine_keeps_is_python_s_own_and_knows_the_same_calls(self, op):
        assert inspect.ismethod(op.__call__)
        op(**make_inputs(BASE).kwargs)
        before = op.stats()
        op.__call__(**make_inputs(BASE).kwargs)
        assert op.stats() == {**before, "hits": before["hits"] + 1}

    def test_the_object_tells_its_parameters(self, op):
        told = inspect.signature(op)
        assert told == inspect.signature(op.__call__)
        assert list(told.parameters)[:2] == ["A_log", "a"]
        assert told.parameters["validate"].default == "fast"

    def test_a_copy_is_the_op_itself(self, op):
        model = torch.nn.Module()
        model.op = op
        assert copy.copy(op) is copy.deepcopy(op) is copy.deepcopy(model).op is op

    def test_the_result_is_right_the_first_time_and_every_time(self, op):
        for seed in range(3):  # the same shapes take the remembered path from the second call on
            inputs = make_inputs(BASE, seed)
            ref = reference(canonical_call(**inputs.kwargs))
            conforms(inputs, op(**inputs.kwargs), ref)

    def test_a_bare_tensor_with_other_lengths_is_seen(self, op):
        for lengths in [(3, 0, 9), (4, 4, 4), (0, 0, 12), (12, 0, 0)]:
            run_and_judge(BASE.but(lengths=lengths))

    def test_a_layout_and_a_tensor_give_the_same_bits(self, op):
        a, b = make_inputs(BASE), make_inputs(BASE.but(as_layout=True))
        assert torch.equal(op(**a.kwargs), op(**b.kwargs))
        assert torch.equal(a.pool_storage, b.pool_storage)

    def test_out_is_written_and_returned(self, op):
        kwargs = make_inputs(BASE).kwargs
        out = torch.full_like(kwargs["v"], float("nan"))
        assert op(**kwargs, out=out) is out
        assert not out.isnan().any()

    def test_gates_may_lack_the_batch_axis_and_kda_gates_may_be_flat(self, op):
        for spec in (BASE, BASE.but(is_kda=True)):
            whole = make_inputs(spec)
            expected = op(**whole.kwargs)
            flat = make_inputs(spec)
            for name in ("a", "b"):
                flat.kwargs[name] = flat.kwargs[name][0]
            if spec.is_kda:
                flat.kwargs["a"] = flat.kwargs["a"].flatten(-2)
                flat.kwargs["dt_bias"] = flat.kwargs["dt_bias"].flatten()
            for _ in range(2):
                again = flat.clone()
                assert torch.equal(op(**again.kwargs), expected)
                assert torch.equal(again.pool_storage, whole.pool_storage)

    @pytest.mark.parametrize("lengths", [(), (0, 0)])
    def test_nothing_to_do_launches_nothing(self, op, spy, lengths):
        inputs = make_inputs(BASE.but(lengths=lengths))
        before = inputs.pool_storage.clone()
        out = op(**inputs.kwargs, backend="spy")
        assert out.shape == inputs.kwargs["v"].shape
        assert not spy
        assert torch.equal(inputs.pool_storage, before)

    def test_whatever_changes_between_calls_takes_effect(self, op):
        """Each change in turn, after a call that is remembered: never the arguments of the earlier one."""
        changes = [
            {"io_dtype": "float32"}, {"gate_dtype": "float32"}, {"state_dtype": "bfloat16"}, {"state_layout": "vk"},
            {"index_dtype": "int64"}, {"cu_dtype": "int64"}, {"A_log_dtype": "bfloat16"}, {"dt_bias_dtype": "bfloat16"},
            {"strides": "rows"}, {"strides": "any"}, {"l2norm": False}, {"neg_eigval": True}, {"scale": 0.5},
            {"softplus_beta": 2.0}, {"softplus_threshold": 1.0}, {"is_kda": True}, {"update": "separate"},
            {"update": "disabled"}, {"verify": "chain"}, {"verify": "tree"}, {"state_dtype": None}, {"hv": 2}, {"h": 1},
            {"k": 12, "v": 16}, {"is_kda": True, "lower_bound": -5.0}, {"padded": (0,)}, {"extra_rows": 2},
        ]  # fmt: skip
        for change in changes:
            run_and_judge(BASE)
            run_and_judge(BASE.but(**change))

    def test_a_separate_slot_tensor_is_not_in_place(self, op):
        kwargs = make_inputs(BASE).kwargs
        op(**kwargs)
        before = kwargs["initial_state_source"].clone()
        moved = torch.tensor([5, 4, 3], dtype=torch.int32)
        free = [s for s in range(6) if s not in kwargs["initial_state_indices"].tolist()]
        moved = torch.tensor(free, dtype=torch.int32)
        op(**kwargs, output_state_indices=moved)
        for slot in kwargs["initial_state_indices"].tolist():
            assert torch.equal(kwargs["initial_state_source"][slot], before[slot])


class TestChoice:
    def test_every_builtin_backend_of_this_device_can_be_forced(self, op):
        external = {name for name, b in registry.backends(OP).items() if b.provenance == "external"}
        for name in set(registry.backends(OP)) - set(ENGINES) - external:
            decision = op.decide(**make_inputs(BASE).kwargs, backend=name)
            assert (decision.backend, decision.rule) == (name, Rule.ARGUMENT)
            run_and_judge_with(name)

    @pytest.mark.parametrize("name", ENGINES)
    def test_a_gpu_backend_is_never_given_cpu_tensors(self, op, name):
        inputs = make_inputs(BASE)
        before = inputs.pool_storage.clone()
        with pytest.raises(BackendDeclinedError) as raised:
            op(**inputs.kwargs, backend=name)
        assert raised.value.code == RejectCode.DEVICE
        assert torch.equal(inputs.pool_storage, before)

    def test_argument_beats_context(self, op, spy):
        kwargs = make_inputs(BASE).kwargs
        with registry.use(OP, "spy"):
            op(**kwargs)
            assert len(spy) == 1
            op(**kwargs, backend="torch_reference")
            assert len(spy) == 1
        op(**kwargs)
        assert len(spy) == 1, "the context has ended"

    def test_use_refuses_unknown_names_on_entry(self):
        with pytest.raises(UnknownNameError, match="did you mean 'torch_chunked'"):
            registry.use(OP, "torch_chunkd")

    def test_explain_prints_the_stored_decision(self, op, capsys):
        decision = op.explain(**make_inputs(BASE).kwargs)
        text = capsys.readouterr().out
        assert decision.backend in text
        assert decision.rule in text
        for outcome in decision.outcomes:
            assert outcome.backend in text
            if isinstance(outcome.verdict, Rejected):
                assert outcome.verdict.reason.split()[0] in text

    def test_prepare_binds_and_runs_nothing(self, op):
        inputs = make_inputs(BASE)
        before = inputs.pool_storage.clone()
        assert op.prepare(**inputs.kwargs).backend in registry.backends(OP)
        assert torch.equal(inputs.pool_storage, before)


def run_and_judge_with(name):
    inputs = make_inputs(BASE)
    call = canonical_call(**inputs.kwargs)
    chunked = registry.backends(OP)[name].accuracy == "chunked"
    config = registry.get(OP).decide(**inputs.kwargs, backend=name).config
    ref = reference(call, chunk=config["chunk"] if chunked else None)
    conforms(inputs, registry.get(OP)(**inputs.kwargs, backend=name), ref)


class TestErrors:
    def test_bad_values_are_found_under_full_validation_and_nothing_is_written(self, op):
        inputs = make_inputs(BASE)
        before = inputs.pool_storage.clone()
        twice = torch.zeros(3, dtype=torch.int32)
        with pytest.raises(ArgumentValueError, match="initial_state_indices"):
            op(**{**inputs.kwargs, "initial_state_indices": twice}, validate="full")
        assert torch.equal(inputs.pool_storage, before)

    def test_a_remembered_call_is_no_way_past_the_checks(self, op):
        kwargs = make_inputs(BASE).kwargs
        op(**kwargs)
        bad = {
            "cu_seqlens": torch.tensor([0, 5, 3, 12], dtype=torch.int32),
            "softplus_beta": float("nan"),
            "scale": -1.0,
            "lower_bound": -5.0,
            "state_layout": "kx",
            "k": kwargs["k"].to("meta"),
            "b": kwargs["b"].float().double().to(torch.complex64),
            "max_seqlen": 10_000,
        }
        for name, value in bad.items():
            with pytest.raises(ArgumentError) as caught:
                op(**{**kwargs, name: value})
            assert caught.value.argument == name

    def test_a_layout_longer_than_the_batch_is_refused_after_a_good_one(self, op):
        kwargs = make_inputs(BASE.but(as_layout=True)).kwargs
        op(**kwargs)
        with pytest.raises(ArgumentValueError, match="cu_seqlens"):
            op(**{**kwargs, "cu_seqlens": SequenceLayout.from_lengths([3, 0, 90])})

    @pytest.mark.parametrize("value", [None, 3, "q", [[1.0]]])
    def test_what_is_no_tensor_is_named(self, op, value):
        with pytest.raises(ArgumentTypeError, match=r"^q: expected a tensor"):
            op(**{**make_inputs(BASE).kwargs, "q": value})

    def test_validate_takes_two_words(self, op):
        with pytest.raises(ArgumentValueError, match="validate"):
            op(**make_inputs(BASE).kwargs, validate="ful")

    def test_unknown_backend(self, op):
        with pytest.raises(UnknownNameError, match="did you mean"):
            op(**make_inputs(BASE).kwargs, backend="numba_cpuu")

    def test_a_declining_backend_is_not_replaced(self, op, spy):
        refuse = FunctionBackend(
            lambda call: call.out, OP, "refuses", check=lambda p: Rejected(RejectCode.FEATURE, "not today"), priority=-1
        )
        registry.register_backend(refuse)
        try:
            with pytest.raises(BackendDeclinedError, match="not today"):
                op(**make_inputs(BASE).kwargs, backend="refuses")
        finally:
            registry.unregister_backend(OP, "refuses")
        assert not spy

    def test_a_backend_that_fails_names_everything(self, op):
        def fails(call):
            raise RuntimeError("launch failure")

        registry.register_backend(FunctionBackend(fails, OP, "fails", check=lambda p: Accepted(), priority=-1))
        try:
            with pytest.raises(BackendFailedError, match=r"run failed: op .* backend 'fails'.*GDN H=2.*launch failure"):
                op(**make_inputs(BASE).kwargs, backend="fails")
        finally:
            registry.unregister_backend(OP, "fails")


class TestGradients:
    def test_inputs_that_require_grad_go_to_a_differentiable_backend(self, op):
        kwargs = make_inputs(BASE.but(io_dtype="float32", gate_dtype="float32")).kwargs
        for name in ("q", "k", "v", "a", "b", "A_log", "dt_bias"):
            kwargs[name].requires_grad_()
        decision = op.decide(**kwargs)
        assert "differentiable" in registry.backends(OP)[decision.backend].tags
        op(**kwargs).square().sum().backward()
        for name in ("q", "k", "v", "a", "b", "A_log", "dt_bias"):
            assert kwargs[name].grad is not None
            assert kwargs[name].grad.abs().sum() > 0

    def test_a_backend_without_gradients_declines_rather_than_detach(self, op):
        kwargs = make_inputs(BASE).kwargs
        kwargs["q"].requires_grad_()
        with pytest.raises(BackendDeclinedError) as caught:
            op(**kwargs, backend="numba_cpu")
        assert caught.value.code == RejectCode.GRAD

    def test_no_grad_mode_takes_the_usual_path_after_a_call_with_grad(self, op):
        kwargs = make_inputs(BASE).kwargs
        kwargs["q"].requires_grad_()
        assert op(**kwargs).requires_grad
        with torch.no_grad():
            assert not op(**kwargs).requires_grad

    def test_a_pool_that_would_be_updated_in_place_must_not_require_grad(self, op):
        kwargs = make_inputs(BASE).kwargs
        kwargs["initial_state_source"] = kwargs["initial_state_source"].clone().requires_grad_()
        with pytest.raises(ArgumentValueError, match="initial_state_source"):
            op(**kwargs)
