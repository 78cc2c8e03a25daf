"""The operator of decode and prompt steps knows the op's calls by a word: what it runs is what the op would run."""

from __future__ import annotations

import pytest
import torch

from isokern.errors import ArgumentValueError, BackendFailedError, IsokernError
from isokern.registry import Accepted, Backend, FunctionBackend, Registry
from isokern.registry.ops.fused_sigmoid_gating import torch_step
from isokern.registry.ops.fused_sigmoid_gating.call import TENSORS
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.ops.fused_sigmoid_gating.torch_op import serving
from isokern.registry.ops.fused_sigmoid_gating.torch_settings import Settings, settings_of
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call
from isokern.registry.overrides import use
from isokern.registry.varlen.layout import SequenceLayout

# Without offsets: those of the CPU are read in every call, which the op's own hot path does.
BASE = CaseSpec("base", (2, 2), h=1, hv=2, k=8, v=6, varlen=False)
NAMES = "A_log a dt_bias q k v b initial_state_source initial_state_indices cu_seqlens".split()


class Pinning(Backend):
    """Notes the calls it was given, by name the tensors and what is no tensor of the call that it was pinned to."""

    op, provenance, priority = SPEC.name, "external", 50

    def __init__(self, name="pinning"):
        self.name = name
        self.seen = []

    def check(self, problem):
        return Accepted()

    def bind(self, problem, config):
        return self

    def __call__(self, call):
        self.seen.append(call)
        return torch.zeros_like(call.v) if call.out is None else call.out

    def pin(self, call):
        return lambda tensors: self.seen.append(call.replace(**dict(zip(TENSORS, tensors, strict=True))))


@pytest.fixture
def backend():
    return Pinning()


@pytest.fixture
def op(backend):
    made = op_of(backend)
    with serving(made):
        yield made


def op_of(*backends):
    registry = Registry({}, load_plugins=False)
    registry.register_op(SPEC)
    for backend in backends:
        registry.register_backend(backend)
    return registry.get(SPEC.name)


def step(kwargs):
    settings = settings_of(*(kwargs.get(name) for name in Settings._fields))
    return torch.ops.isokern.fused_sigmoid_gating_step.default(*(kwargs.get(name) for name in NAMES), settings)


def seen(kwargs, backend, run=step):
    """What the backend was given, tensors by what lies where; or the kind of error, and the argument it names."""
    backend.seen.clear()
    try:
        made = run(kwargs)
    except IsokernError as error:
        return type(error), getattr(error, "argument", None)
    assert made is not None
    [call] = backend.seen
    assert (made.shape, made.dtype) == (call.v.shape, call.q.dtype)
    return described(call)


def described(call):
    return {
        name: (value.data_ptr(), value.shape, value.stride(), value.dtype) if isinstance(value, torch.Tensor) else value
        for name, value in vars(call.replace(out=None)).items()
    }


def validated(kwargs):
    """The same of a call that is validated from scratch."""
    given = {name: value for name, value in kwargs.items() if name != "backend"}
    if torch.is_grad_enabled() and any(getattr(value, "requires_grad", False) for value in given.values()):
        return ArgumentValueError, next(name for name, value in given.items() if getattr(value, "requires_grad", False))
    try:
        return described(canonical_call(**given))
    except IsokernError as error:
        return type(error), getattr(error, "argument", None)


@pytest.fixture
def knows(monkeypatch):
    """Within its own calls the operator must know every call: what it does not know, it reads the word of."""

    def unknown(settings):
        raise AssertionError("not known")

    return lambda: monkeypatch.setattr(torch_step, "parse_settings", unknown)


def test_a_call_like_an_earlier_one_is_known_by_its_word(op, backend, knows):
    kwargs = make_inputs(BASE).kwargs
    step(kwargs)
    knows()
    other = make_inputs(BASE, seed=1).kwargs  # other tensors, of the same kind
    assert seen(other, backend) == validated(other)
    assert op.stats()["hits"] == 1
    with pytest.raises(AssertionError, match="not known"):
        step({**other, "scale": 0.25})


def test_calls_of_the_op_itself_are_known_where_torch_is_in_the_same_state(op, knows):
    kwargs = make_inputs(BASE).kwargs
    with torch.inference_mode():
        op(**kwargs)
        knows()
        step(kwargs)


def variants(t):
    """Tensors that are unlike ``t`` in one thing."""
    yield torch.cat([t, t])
    yield t[:-1]
    yield t[None]
    yield t[..., :-1]
    yield t.transpose(0, -1).contiguous().transpose(0, -1)
    yield torch.stack([t, t], -1)[..., 0]
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64):
        if dtype is not t.dtype:
            yield t.to(dtype)
    yield torch.nn.Parameter(t, requires_grad=False)
    yield torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    if t.is_floating_point():
        yield t.clone().requires_grad_()


@pytest.mark.parametrize("spec", [BASE, BASE.but(is_kda=True, lower_bound=-5.0)], ids=["gdn", "kda"])
def test_each_tensor_changed_in_turn(op, backend, spec):
    kwargs = make_inputs(spec).kwargs
    for name in NAMES[:-1]:
        for value in variants(kwargs[name]):
            changed = {**kwargs, name: value}
            for given in (kwargs, changed, changed, kwargs):
                assert seen(given, backend) == validated(given), name


def test_each_setting_changed_in_turn(op, backend):
    kwargs = {**make_inputs(BASE.but(k=6)).kwargs, "scale": 0.5}
    changes = {
        "softplus_beta": 2.0,
        "softplus_threshold": 1.0,
        "scale": None,
        "use_qk_l2norm_in_kernel": not kwargs["use_qk_l2norm_in_kernel"],
        "state_layout": "vk",
        "is_kda": True,
        "lower_bound": -5.0,
        "allow_neg_eigval": not kwargs["allow_neg_eigval"],
        "max_seqlen": 2,
        "backend": "pinning",
    }
    assert set(changes) == set(Settings._fields)
    for name, value in changes.items():
        changed = {**kwargs, name: value}
        for given in (kwargs, changed, changed, kwargs):
            assert seen(given, backend) == validated(given), name


def test_what_was_served_without_autograd_is_refused_with_it(op, backend):
    kwargs = make_inputs(BASE).kwargs
    kwargs["q"].requires_grad_()
    with torch.no_grad():
        for _ in range(2):
            assert seen(kwargs, backend) == validated(kwargs)
    assert seen(kwargs, backend) == (ArgumentValueError, "q")


def test_gates_without_a_batch_axis_are_handed_on_with_it(op, backend, knows):
    kwargs = make_inputs(BASE.but(lengths=(4,))).kwargs
    flat = {**kwargs, "a": kwargs["a"][0], "b": kwargs["b"][0]}
    step(flat)
    knows()
    assert seen(flat, backend) == validated(flat)


def test_offsets_are_handed_on_and_not_taken_for_none(op, backend, knows):
    kwargs = make_inputs(BASE.but(varlen=True)).kwargs
    step(kwargs)
    [entry] = op.entries.recent
    assert entry.word is None, "the hot path compares offsets of the CPU"
    settings = settings_of(*(kwargs.get(name) for name in Settings._fields))
    entry.word = settings  # as for those of a GPU
    batch = {**kwargs, "cu_seqlens": None, "initial_state_indices": kwargs["initial_state_indices"][:1]}
    assert seen(batch, backend) == validated(batch)
    knows()
    backend.seen.clear()
    step(kwargs)
    assert backend.seen[0].cu_seqlens is kwargs["cu_seqlens"]


@pytest.mark.parametrize("more", ["disable_state_update", "out", "output_state_indices", "cu_seqlens"])
def test_other_calls_of_the_op_are_not_taken_for_steps(op, more):
    kwargs = make_inputs(BASE).kwargs
    values = {
        "disable_state_update": True,
        "out": torch.empty_like(kwargs["v"]),
        "output_state_indices": kwargs["initial_state_indices"].clone(),
        "cu_seqlens": SequenceLayout.from_lengths((2, 2)),
    }
    kwargs |= make_inputs(BASE.but(varlen=True)).kwargs if more == "cu_seqlens" else {}
    op(**{**kwargs, more: values[more]})
    [entry] = op.entries.recent
    assert entry.word is None


def test_a_backend_that_cannot_be_pinned_is_run_every_time():
    ran = []
    backend = FunctionBackend(lambda call: ran.append(call) or call.out, SPEC.name, "plain")
    kwargs = make_inputs(BASE).kwargs
    with serving(op_of(backend)):
        for _ in range(3):
            step(kwargs)
    assert [call.pool is kwargs["initial_state_source"] for call in ran] == [True] * 3


def test_a_backend_asked_for_around_the_call_is_the_one_that_runs():
    one, two = Pinning("one"), Pinning("two")
    kwargs = make_inputs(BASE).kwargs
    with serving(op_of(one, two)):
        for _ in range(2):
            for chosen, other in ((one, two), (two, one)):
                with use(SPEC.name, backend=chosen.name):
                    assert isinstance(seen(kwargs, chosen), dict)
                assert not other.seen
                chosen.seen.clear()


def test_a_capture_is_another_kind_of_call(op, monkeypatch):
    kwargs = make_inputs(BASE).kwargs
    step(kwargs)
    [entry] = op.entries.recent
    entry.on_cuda = True  # as far as the operator can tell
    capturing = True
    monkeypatch.setattr(torch_step, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(torch_step, "parse_settings", lambda settings: pytest.fail("not known"))
    with pytest.raises(pytest.fail.Exception, match="not known"):
        step(kwargs)
    capturing = False
    step(kwargs)


def test_calls_that_take_turns_are_all_known(op, backend, knows):
    turns = [make_inputs(BASE.but(k=k)).kwargs for k in (4, 8, 12)]
    for kwargs in turns:
        step(kwargs)
    knows()
    for kwargs in turns * 2:
        assert seen(kwargs, backend) == validated(kwargs)
    recent = op.entries.recent
    for _ in range(2):
        step(turns[0])
    assert op.entries.recent[0] is not recent[0], "who comes twice in a row is tried first"


def test_what_fails_at_a_later_call_is_a_typed_error(op, backend):
    kwargs = make_inputs(BASE).kwargs
    step(kwargs)

    class Failing(list):
        def append(self, call):
            raise RuntimeError("launch failure")

    backend.seen = Failing()
    with pytest.raises(BackendFailedError, match=r"run failed: op .*'pinning'.*launch failure"):
        step(kwargs)
