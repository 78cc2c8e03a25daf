"""The op as torch operators: schemas that say what is written, fake kernels, gradients or an error, dispatch modes."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from isokern import registry
from isokern.errors import ArgumentValueError, BackendDeclinedError, BackendFailedError
from isokern.registry import FunctionBackend, Registry
from isokern.registry.conformance.check import Status
from isokern.registry.conformance.runner import run_checks
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.mutants import mutant
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.ops.fused_sigmoid_gating.torch_op import OPERATORS, serving
from isokern.registry.ops.fused_sigmoid_gating.torch_settings import Settings, parse_settings, settings_of
from isokern.registry.varlen.layout import SequenceLayout

OP = "fused_sigmoid_gating"
BASE = CaseSpec("base", (3, 0, 5), h=1, hv=2, k=16, v=12)
TRAINING = BASE.but(io_dtype="float32", gate_dtype="float32", state_dtype="float32", update="disabled")
LEAVES = ("A_log", "a", "dt_bias", "q", "k", "v", "b", "initial_state_source")


@pytest.fixture
def op():
    return registry.get(OP)


class Noted(TorchDispatchMode):
    """The isokern operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "isokern":
            self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def positional(kwargs):
    names = "A_log a dt_bias softplus_beta softplus_threshold q k v b".split()
    return tuple(kwargs[n] for n in names), {n: v for n, v in kwargs.items() if n not in names}


def step_arguments(kwargs):
    """What the operator of decode and prompt steps takes for such a call."""
    names = "A_log a dt_bias q k v b initial_state_source initial_state_indices cu_seqlens".split()
    return (*(kwargs.get(n) for n in names), settings_of(*(kwargs.get(n) for n in Settings._fields)))


CASES = {
    "isokern::fused_sigmoid_gating_step": [
        BASE,
        BASE.but(varlen=False, lengths=(1, 1, 1), state_layout="vk"),
        BASE.but(is_kda=True, lower_bound=-5.0, l2norm=False, neg_eigval=True),
    ],
    "isokern::fused_sigmoid_gating": [BASE.but(update="separate"), BASE.but(verify="tree")],
    "isokern::fused_sigmoid_gating.out": [BASE, BASE.but(state_dtype=None)],
    "isokern::fused_sigmoid_gating_read_only": [BASE.but(state_dtype=None), TRAINING],
}


class TestOperators:
    @pytest.mark.parametrize("name", CASES)
    def test_a_call_under_a_dispatch_mode_is_one_operator_with_the_same_result(self, op, name):
        for spec in CASES[name]:
            one, two = make_inputs(spec), make_inputs(spec)
            if name.endswith(".out"):
                one.kwargs["out"], two.kwargs["out"] = (torch.zeros_like(one.kwargs["v"]) for _ in range(2))
            with Noted() as noted:
                o = op(**one.kwargs)
            assert noted.names == [name]
            assert torch.equal(o, op(**two.kwargs))
            assert (o is one.kwargs.get("out")) == name.endswith(".out")
            for x, y in ((one.pool_storage, two.pool_storage), (one.intermediate_storage, two.intermediate_storage)):
                assert x is None or torch.equal(x, y)

    def test_all_operators_are_listed(self):
        assert {f"isokern::{n}" for n in OPERATORS} == set(CASES)

    def test_trailing_defaults_may_be_left_out(self):
        kwargs = make_inputs(BASE.but(state_dtype=None, l2norm=False, varlen=False, lengths=(3, 3))).kwargs
        args, _ = positional(kwargs)
        for operator in (torch.ops.isokern.fused_sigmoid_gating, torch.ops.isokern.fused_sigmoid_gating_read_only):
            assert torch.equal(operator(*args), registry.get(OP)(*args))

    def test_the_general_operator_takes_steps_too(self):
        one, two = make_inputs(BASE), make_inputs(BASE)
        args, options = positional(one.kwargs)
        o = torch.ops.isokern.fused_sigmoid_gating(*args, **options)
        assert torch.equal(o, registry.get(OP)(**two.kwargs))
        assert torch.equal(one.pool_storage, two.pool_storage)

    def test_gradients_pass_opcheck(self):
        kwargs = make_inputs(TRAINING).kwargs
        for name in LEAVES:
            kwargs[name].requires_grad_()
        del kwargs["disable_state_update"]
        args, options = positional(kwargs)
        torch.library.opcheck(torch.ops.isokern.fused_sigmoid_gating_read_only.default, args, options)

    def test_a_layout_goes_in_as_its_tensor(self, op):
        kwargs = make_inputs(BASE.but(as_layout=True)).kwargs
        with Noted() as noted:
            op(**kwargs)
        assert noted.names == ["isokern::fused_sigmoid_gating_step"]

    def test_fake_tensors_have_the_output_s_shape_and_run_nothing(self, op):
        spec = BASE.but(strides="any")
        with FakeTensorMode() as mode:
            kwargs = make_inputs(spec).kwargs
            kwargs = {n: mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for n, t in kwargs.items()}
            o = op(**kwargs)
        real = op(**make_inputs(spec).kwargs)
        assert (o.shape, o.dtype, o.stride(), o.device) == (real.shape, real.dtype, real.stride(), real.device)

    @pytest.mark.parametrize(("update", "operator"), [("in_place", f"{OP}_step"), ("separate", OP)])
    def test_make_fx_records_it(self, op, update, operator):
        kwargs = make_inputs(BASE.but(update=update)).kwargs
        q = kwargs.pop("q")
        graph = make_fx(lambda q: op(q=q, **kwargs), tracing_mode="fake", _allow_non_fake_inputs=True)(q)
        assert getattr(torch.ops.isokern, operator).default in {n.target for n in graph.graph.nodes}


class TestStep:
    """The operator of decode and prompt steps."""

    def test_it_passes_opcheck(self):
        for spec in CASES["isokern::fused_sigmoid_gating_step"]:
            args = step_arguments(make_inputs(spec).kwargs)
            torch.library.opcheck(torch.ops.isokern.fused_sigmoid_gating_step.default, args)

    @pytest.mark.parametrize("leaf", [0, 3, 6, 7])
    def test_what_requires_grad_is_refused_and_nothing_written(self, leaf):
        inputs = make_inputs(BASE)
        before = inputs.pool_storage.clone()
        args = step_arguments(inputs.kwargs)
        args[leaf].requires_grad_()
        with pytest.raises(ArgumentValueError, match="disable_state_update=True") as caught:
            torch.ops.isokern.fused_sigmoid_gating_step(*args)
        assert inputs.kwargs[caught.value.argument] is args[leaf]
        assert torch.equal(inputs.pool_storage, before)
        with torch.no_grad():
            torch.ops.isokern.fused_sigmoid_gating_step(*args)

    def test_it_runs_the_op_that_is_served(self):
        seen = []
        own = Registry({}, load_plugins=False)
        own.register_op(SPEC)
        own.register_backend(FunctionBackend(lambda call: seen.append(call) or call.out, OP, "mine", priority=1))
        kwargs = {**make_inputs(BASE).kwargs, "max_seqlen": 5, "backend": "mine", "scale": 0.25}
        with serving(own.get(OP)), torch.no_grad():
            torch.ops.isokern.fused_sigmoid_gating_step(*step_arguments(kwargs))
        [call] = seen
        assert (call.max_seqlen, call.scale, call.state_layout) == (5, 0.25, "kv")
        assert call.pool is kwargs["initial_state_source"]

    def test_a_setting_that_is_no_constant_of_python_takes_the_general_operator(self, op):
        for odd in ({"softplus_beta": 1}, {"scale": 1}):
            with Noted() as noted:
                op(**{**make_inputs(BASE).kwargs, **odd})
            assert noted.names == ["isokern::fused_sigmoid_gating"]


PLAIN = Settings(1.0, 20.0, None, False, "kv", False, None, False, None, None)


class TestSettings:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"softplus_beta": 0.1 + 0.2, "softplus_threshold": math.inf, "scale": 128**-0.5},
            {"scale": 5e-324, "lower_bound": -0.0, "softplus_beta": 1e300},
            {"use_qk_l2norm_in_kernel": True, "state_layout": "vk", "is_kda": True, "allow_neg_eigval": True},
            {"max_seqlen": 0},
            {"max_seqlen": 8192, "backend": "triton"},
            {"backend": ""},
            {"backend": "mine is_kda backend=x\nand more"},
        ],
    )
    def test_they_come_back_exactly(self, changes):
        settings = PLAIN._replace(**changes)
        word = settings_of(*settings)
        assert [repr(x) for x in parse_settings(word)] == [repr(x) for x in settings]
        assert parse_settings(word) is parse_settings("".join(list(word)))

    def test_the_word_stays_what_saved_graphs_have(self):
        full = Settings(1.0, 20.0, 0.5, True, "vk", True, -5.0, True, 8, "triton")
        assert settings_of(*full) == (
            "softplus_beta=1.0 softplus_threshold=20.0 scale=0.5 use_qk_l2norm_in_kernel state_layout=vk is_kda "
            "lower_bound=-5.0 allow_neg_eigval max_seqlen=8 backend=triton"
        )
        assert settings_of(*PLAIN) == "softplus_beta=1.0 softplus_threshold=20.0 state_layout=kv"

    @pytest.mark.parametrize(
        "word",
        [
            "",
            "softplus_beta=1.0 softplus_threshold=20.0",
            "softplus_beta=1 softplus_threshold=20.0 state_layout=kv",
            "softplus_beta=1.0 softplus_threshold=2_0.0 state_layout=kv",
            "softplus_beta=1.0 softplus_threshold=1e999 state_layout=kv",
            "softplus_beta=one softplus_threshold=20.0 state_layout=kv",
            "softplus_beta=1.0 softplus_threshold=20.0 state_layout=vv",
            "softplus_beta=1.0 softplus_threshold=20.0 scale=None state_layout=kv",
            "softplus_beta=1.0 softplus_threshold=20.0 state_layout=kv max_seqlen=08",
            "softplus_beta=1.0 softplus_threshold=20.0 state_layout=kv is_kda is_kda",
            "softplus_beta=1.0 softplus_threshold=20.0 is_kda state_layout=kv",
            "softplus_beta=1.0 softplus_threshold=20.0 state_layout=kv\n",
        ],
    )
    def test_no_other_word_is_read(self, word):
        with pytest.raises(ArgumentValueError) as caught:
            parse_settings(word)
        assert caught.value.argument == "settings"

    @pytest.mark.parametrize(
        "changes",
        [
            {"softplus_beta": 1},
            {"softplus_threshold": None},
            {"scale": True},
            {"scale": torch.tensor(1.0)},
            {"lower_bound": "-5"},
            {"is_kda": 1},
            {"use_qk_l2norm_in_kernel": None},
            {"state_layout": "vv"},
            {"max_seqlen": 3.0},
            {"max_seqlen": True},
            {"backend": 1},
        ],
    )
    def test_of_anything_else_there_are_none(self, changes):
        assert settings_of(*PLAIN._replace(**changes)) is None


class TestGradients:
    def both(self, spec):
        """Gradients by the op itself and by its operator."""
        found = []
        for mode in (None, Noted()):
            kwargs = make_inputs(spec).kwargs
            leaves = [kwargs[n].requires_grad_() for n in LEAVES if kwargs.get(n) is not None]
            if mode is None:
                o = registry.get(OP)(**kwargs)
            else:
                with mode:
                    o = registry.get(OP)(**kwargs)
            assert o.requires_grad
            found.append(torch.autograd.grad(o.square().sum(), leaves))
        return found

    @pytest.mark.parametrize(
        "spec", [TRAINING, TRAINING.but(state_dtype=None), TRAINING.but(is_kda=True, state_layout="vk")]
    )
    def test_the_operator_s_are_the_op_s(self, spec):
        for x, y in zip(*self.both(spec), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)

    def test_only_what_requires_grad_gets_one(self):
        kwargs = make_inputs(TRAINING).kwargs
        kwargs["k"].requires_grad_()
        with Noted():
            o = registry.get(OP)(**kwargs)
        o.sum().backward()
        assert kwargs["k"].grad.abs().sum() > 0
        assert all(kwargs[n].grad is None for n in LEAVES if n != "k")

    @pytest.mark.parametrize("leaf", ["A_log", "q", "b"])
    def test_where_arguments_are_written_it_raises_and_writes_nothing(self, leaf):
        inputs = make_inputs(BASE)
        before = inputs.pool_storage.clone()
        inputs.kwargs[leaf].requires_grad_()
        with Noted(), pytest.raises(ArgumentValueError, match="disable_state_update=True") as caught:
            registry.get(OP)(**inputs.kwargs)
        assert caught.value.argument == leaf
        assert torch.equal(inputs.pool_storage, before)
        with Noted(), torch.no_grad():
            registry.get(OP)(**inputs.kwargs)

    def test_a_backend_without_gradients_declines(self):
        kwargs = make_inputs(TRAINING).kwargs
        kwargs["q"].requires_grad_()
        with Noted():
            o = registry.get(OP)(**kwargs, backend="torch_reference")
            with pytest.raises(BackendDeclinedError, match="not differentiable"):
                registry.get(OP)(**kwargs, backend="numba_cpu")
        assert o.requires_grad

    def test_second_derivatives_raise(self):
        kwargs = make_inputs(TRAINING).kwargs
        q = kwargs["q"].requires_grad_()
        with Noted():
            o = registry.get(OP)(**kwargs)
        (first,) = torch.autograd.grad(o.square().sum(), q, create_graph=True)
        with pytest.raises(ArgumentValueError, match="first derivatives"):
            first.sum().backward()


class TestConformance:
    """X1 sees through the operator what a backend does wrong."""

    def cases(self, backend):
        report = run_checks(OP, backend, only=["X1"], peers=())
        return {f.case: f for f in report.findings}

    def test_a_fault_free_backend_passes(self):
        found = self.cases(mutant(""))
        assert {"opcheck, in place", "torch.compile, dynamic shapes"} <= set(found)
        assert all(f.status is Status.PASS for f in found.values())

    def test_an_input_that_is_written_is_an_undeclared_mutation(self):
        found = self.cases(mutant("q_in_place"))
        assert "q is not defined as mutable but was mutated" in found["opcheck, in place"].message
        assert found["torch.compile, static shapes"].status is Status.FAIL

    def test_an_output_that_is_no_memory_of_its_own_is_an_undeclared_alias(self):
        def run(call):
            return call.v if call.v.shape == call.out.shape else call.out

        found = self.cases(FunctionBackend(run, OP, "aliases"))
        assert found["opcheck, in place"].status is Status.FAIL
        assert "alias" in found["opcheck, in place"].message


def test_a_failing_backend_is_the_same_error_through_the_operator(op):
    def fails(call):
        raise RuntimeError("launch failure")

    registry.register_backend(FunctionBackend(fails, OP, "fails", priority=-1))
    try:
        with Noted(), pytest.raises(BackendFailedError, match=r"backend 'fails'.*launch failure"):
            op(**make_inputs(BASE).kwargs, backend="fails")
    finally:
        registry.unregister_backend(OP, "fails")


def test_a_dispatch_mode_takes_layouts_of_every_kind(op):
    expected = op(**make_inputs(BASE).kwargs)
    layout = SequenceLayout.padded(3, max_length=8)
    layout.update(BASE.lengths)
    for cu in (layout, layout.cu_seqlens, SequenceLayout.from_lengths(BASE.lengths)):
        with Noted():
            assert torch.equal(op(**{**make_inputs(BASE).kwargs, "cu_seqlens": cu}), expected)
