"""The op inside torch.compile: one graph, the same bits as eager, static and dynamic shapes, and training."""

from __future__ import annotations

import shutil

import pytest
import torch

from isokern import registry
from isokern.errors import RegistrationError
from isokern.registry import Registry
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.varlen.layout import SequenceLayout

BASE = CaseSpec("base", (3, 0, 5), h=1, hv=2, k=16, v=12)
op = registry.get("fused_sigmoid_gating")

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor's CPU code needs a C++ compiler")
BACKENDS = ["aot_eager", pytest.param("inductor", marks=needs_compiler)]


@pytest.fixture(autouse=True)
def _fresh():
    torch.compiler.reset()


def layer(kwargs):
    """The op between other operators, as in a model."""
    o = op(**{**kwargs, "q": kwargs["q"] * 1, "a": kwargs["a"] + 0})
    return o * 2


def agree(compiled, spec):
    eager, traced = make_inputs(spec), make_inputs(spec)
    assert torch.equal(compiled(traced.kwargs), layer(eager.kwargs))
    for x, y in (
        (eager.pool_storage, traced.pool_storage),
        (eager.intermediate_storage, traced.intermediate_storage),
    ):
        assert x is None or torch.equal(x, y)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_the_same_bits_as_eager_whatever_the_call(backend, dynamic):
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend=backend)
    agree(compiled, BASE)
    agree(compiled, BASE.but(lengths=(4, 1)))
    if backend == "aot_eager":
        agree(compiled, BASE.but(update="disabled"))
        agree(compiled, BASE.but(verify="tree", update="separate", is_kda=True, lower_bound=-5.0))
        agree(compiled, BASE.but(strides="rows"))
        agree(compiled, BASE.but(state_dtype=None, varlen=False, lengths=(4, 4)))


def test_dynamic_shapes_are_compiled_once():
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    spec = BASE.but(extra_slots=20)  # no two sizes are equal by chance, which would be assumed to last
    agree(compiled, spec)
    with torch.compiler.set_stance("fail_on_recompile"):
        for lengths in ((4, 2, 3), (5, 5, 5, 5), (2, 30, 0, 1, 7)):
            agree(compiled, spec.but(lengths=lengths))


class Targets:
    """A compiler that notes the isokern operators of its graphs."""

    def __init__(self):
        self.names = []

    def __call__(self, graph, inputs):
        self.names += [n.target.name() for n in graph.graph.nodes if getattr(n.target, "namespace", "") == "isokern"]
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)


def test_steps_with_constant_settings_are_the_operator_of_few_arguments():
    targets = Targets()

    def decode(kwargs):
        return op(**{**kwargs, "softplus_beta": 1.0, "softplus_threshold": 20.0, "scale": 16**-0.5})

    for dynamic in (False, True):
        compiled = torch.compile(decode, fullgraph=True, dynamic=dynamic, backend=targets)
        for spec in (BASE, BASE.but(lengths=(1,) * 4, varlen=False), BASE.but(state_layout="vk", is_kda=True)):
            one, two = make_inputs(spec), make_inputs(spec)
            assert torch.equal(compiled(one.kwargs), decode(two.kwargs))
            assert torch.equal(one.pool_storage, two.pool_storage)
    assert set(targets.names) == {"isokern::fused_sigmoid_gating_step"}


@pytest.mark.parametrize(("name", "values"), [("scale", (0.25, 0.5, 0.7)), ("max_seqlen", (5, 6, 7))])
def test_a_setting_that_varies_is_an_argument_of_the_general_operator(name, values):
    targets = Targets()
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=targets)
    for value in values:
        kwargs = {**make_inputs(BASE).kwargs, name: value}
        assert torch.equal(compiled(kwargs), layer({**make_inputs(BASE).kwargs, name: value}))
    assert set(targets.names) == {"isokern::fused_sigmoid_gating"}


def test_layouts_are_traced_by_their_tensor():
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for lengths in ((3, 0, 5), (4, 4, 0), (1, 6, 1)):
        agree(compiled, BASE.but(lengths=lengths, as_layout=True))
    padded = SequenceLayout.padded(4, max_length=8)
    padded.update((3, 0, 5), (0, 2, 1))
    one, two = make_inputs(BASE), make_inputs(BASE)
    slots = {"cu_seqlens": padded, "initial_state_indices": padded.slots}
    assert torch.equal(compiled({**one.kwargs, **slots}), layer({**two.kwargs, **slots}))
    assert torch.equal(one.pool_storage, two.pool_storage)


def test_out_is_written():
    def into(kwargs, out):
        op(**kwargs, out=out)
        return out + 1

    one, two = make_inputs(BASE), make_inputs(BASE)
    out = torch.zeros_like(one.kwargs["v"])
    result = torch.compile(into, fullgraph=True, backend="aot_eager")(one.kwargs, out)
    expected = op(**two.kwargs)
    assert torch.equal(out, expected)
    assert torch.equal(result, expected + 1)


def test_the_backend_is_chosen_when_the_graph_runs():
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    seen = []
    spy = registry.FunctionBackend(lambda call: (seen.append(call), call.out.zero_())[1], op.name, "spy", priority=-1)
    registry.register_backend(spy)
    try:
        compiled(make_inputs(BASE).kwargs)
        assert not seen
        with registry.use(op.name, "spy"):
            assert not compiled(make_inputs(BASE).kwargs).any()
        assert len(seen) == 1
    finally:
        registry.unregister_backend(op.name, "spy")


def test_training_through_a_compiled_graph():
    spec = BASE.but(io_dtype="float32", gate_dtype="float32", update="disabled")
    names = ("A_log", "a", "dt_bias", "q", "k", "v", "b")

    def loss(kwargs):
        return layer(kwargs).square().sum()

    found = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        kwargs = make_inputs(spec).kwargs
        leaves = [kwargs[n].requires_grad_() for n in names]
        found.append(torch.autograd.grad(run(kwargs), leaves))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_training_with_a_pool_that_is_written_raises_and_never_detaches():
    kwargs = make_inputs(BASE).kwargs
    kwargs["q"].requires_grad_()
    with pytest.raises(Exception, match="disable_state_update=True"):  # wrapped by the compiler in its own error
        torch.compile(layer, fullgraph=True, backend="aot_eager")(kwargs)


def test_an_op_of_a_registry_of_its_own_is_not_traced_as_the_process_s():
    own = Registry({}, load_plugins=False)
    own.register_op(SPEC)
    private = own.get(SPEC.name)
    with pytest.raises(Exception, match=r"process-wide registry only|RegistrationError") as caught:
        torch.compile(lambda kwargs: private(**kwargs), fullgraph=True, backend="aot_eager")(make_inputs(BASE).kwargs)
    assert isinstance(caught.value, RegistrationError) or "RegistrationError" in str(caught.value)


def test_export():
    class Layer(torch.nn.Module):
        def forward(self, kwargs):
            return layer(kwargs)

    spec = BASE.but(state_dtype=None, varlen=False, lengths=(3, 3))
    for strict in (True, False):
        program = torch.export.export(Layer(), (make_inputs(spec).kwargs,), strict=strict)
        assert torch.equal(program.module()(make_inputs(spec).kwargs), layer(make_inputs(spec).kwargs))
