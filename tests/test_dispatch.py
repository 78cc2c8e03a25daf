"""Dispatch of repeated calls: whatever changes between two calls, the backend gets the second one's arguments."""

from __future__ import annotations

import itertools
import threading
from dataclasses import fields

import numpy as np
import pytest
import torch

from isokern.errors import ArgumentError, ArgumentTypeError, ArgumentValueError, BackendFailedError, IsokernError
from isokern.registry import Accepted, Backend, Registry
from isokern.registry.ops.fused_sigmoid_gating import entries, guards
from isokern.registry.ops.fused_sigmoid_gating.call import TENSORS, Call
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call
from isokern.registry.overrides import use
from isokern.registry.varlen.layout import SequenceLayout

BASE = CaseSpec("base", (3, 0, 4), h=1, hv=2, k=8, v=6)
SPECS = {
    "packed": BASE,
    "packed, by layout": BASE.but(as_layout=True),
    "batch": BASE.but(varlen=False, lengths=(2, 2)),
    "kda": BASE.but(is_kda=True, lower_bound=-5.0, k=4, v=4, state_layout="vk"),
    "no pool": BASE.but(state_dtype=None),
    "read only": BASE.but(update="disabled"),
    "tree, separate slots": BASE.but(verify="tree", update="separate", strides="rows"),
}
NUMBERS = ("softplus_beta", "softplus_threshold", "scale", "lower_bound", "max_seqlen")
FLAGS = ("use_qk_l2norm_in_kernel", "is_kda", "allow_neg_eigval", "disable_state_update")


class Spy(Backend):
    """Takes everything and remembers what it was given: as a Call, or, pinned, as tensors and the Call pinned to."""

    op, name, provenance, priority = "fused_sigmoid_gating", "spy", "external", 50

    def __init__(self, pinned=False):
        self.pinned = pinned
        self.seen = []

    def check(self, problem):
        return Accepted()

    def bind(self, problem, config):
        return Pinning(self) if self.pinned else self.run

    def run(self, call):
        self.seen.append(call)
        return torch.zeros_like(call.v) if call.out is None else call.out


class Pinning:
    def __init__(self, spy):
        self.spy = spy

    def __call__(self, call):
        return self.spy.run(call)

    def pin(self, call):
        def run(tensors):
            # What a pinned runner knows: these tensors, and the scalars and shapes of the call it was made from.
            assert len(tensors) == len(TENSORS)
            given = dict(zip(TENSORS, tensors, strict=True))
            for name, t in given.items():
                like = getattr(call, name)
                assert (t is None) == (like is None), name
                assert t is None or (t.shape, t.stride(), t.dtype) == (like.shape, like.stride(), like.dtype), name
            assert (given["write_slots"] is given["read_slots"]) == (call.write_slots is call.read_slots)
            self.spy.seen.append(call.replace(**given, layout=None))

        return run


@pytest.fixture(params=["call", "pinned", "call, python guard", "pinned, python guard"])
def spy(request, monkeypatch):
    if "python" in request.param:
        monkeypatch.setattr(guards, "compiled_guards", lambda: None)
    return Spy("pinned" in request.param)


@pytest.fixture
def op(spy):
    return op_of(spy)


def op_of(*backends):
    registry = Registry({}, load_plugins=False)
    registry.register_op(SPEC)
    for backend in backends:
        registry.register_backend(backend)
    return registry.get(SPEC.name)


def outcome(run):
    """What ``run`` returns, or the error's kind and argument."""
    try:
        return run()
    except BackendFailedError:
        raise
    except IsokernError as error:
        return type(error), getattr(error, "argument", None)


def same_tensor(x, y):
    if x is None or y is None:
        return x is y
    return (x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) == (
        y.data_ptr(),
        y.shape,
        y.stride(),
        y.dtype,
        y.device,
    )


def assert_same_call(got: Call, want: Call, pinned: bool):
    for field in fields(Call):
        x, y = getattr(got, field.name), getattr(want, field.name)
        if field.name in TENSORS:
            if field.name == "out" and y is None:
                assert x is None or (x.shape, x.dtype, x.is_contiguous()) == (want.v.shape, want.q.dtype, True)
            else:
                assert same_tensor(x, y), field.name
        elif field.name == "layout":
            assert pinned or x is y
        else:
            assert (type(x), x) == (type(y), y), field.name
    assert got.update == want.update
    if not pinned:
        assert got.offsets == want.offsets


def check(op, spy, kwargs):
    """The op behaves on ``kwargs`` as validation from scratch does."""
    want = outcome(lambda: canonical_call(**{k: v for k, v in kwargs.items() if k != "backend"}))
    spy.seen.clear()
    got = outcome(lambda: op(**kwargs))
    if isinstance(want, tuple):
        assert got == want
        assert not spy.seen
        return
    assert isinstance(got, torch.Tensor), got
    assert spy.seen or not want.tokens
    if spy.seen:
        assert_same_call(spy.seen[-1], want, spy.pinned)
        out = spy.seen[-1].out
        assert out is None or got is out
    if kwargs.get("out") is not None:
        assert got is kwargs["out"]


def of_tensor(t):
    """Everything that can be unlike in a tensor, one thing at a time."""
    yield None
    yield 3
    yield np.zeros(3)
    yield torch.cat([t, t])
    yield t[:-1]
    yield t[None]
    yield t[..., :-1]
    yield t.transpose(0, -1).contiguous().transpose(0, -1)
    wide = torch.empty(*t.shape, 2, dtype=t.dtype)
    wide[..., 0] = t
    yield wide[..., 0]
    yield t[:1].expand_as(t)
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64, torch.int8):
        if dtype is not t.dtype:
            yield t.to(dtype)
    yield t.to("meta")
    yield t.float().to_sparse()
    yield torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape)
    yield torch.nn.Parameter(t, requires_grad=False)
    if t.is_floating_point():
        yield t.clone().requires_grad_()


@pytest.mark.parametrize("name", SPECS)
def test_each_tensor_changed_in_turn(op, spy, name):
    kwargs = make_inputs(SPECS[name]).kwargs
    if name == "batch":
        kwargs["out"] = torch.empty_like(kwargs["v"])
    tensors = {n: t for n, t in kwargs.items() if isinstance(t, torch.Tensor)}
    for argument, t in tensors.items():
        for value in of_tensor(t):
            check(op, spy, kwargs)
            changed = {**kwargs, argument: value}
            check(op, spy, changed)
            check(op, spy, changed)  # now remembered, if it was valid
            check(op, spy, kwargs)


@pytest.mark.parametrize("name", SPECS)
def test_each_absent_tensor_given_in_turn(op, spy, name):
    kwargs = make_inputs(SPECS[name]).kwargs
    other = make_inputs(BASE.but(verify="tree", update="separate")).kwargs
    other["out"] = torch.empty_like(kwargs["v"])
    for argument, value in other.items():
        if isinstance(value, torch.Tensor) and kwargs.get(argument) is None:
            check(op, spy, kwargs)
            check(op, spy, {**kwargs, argument: value})
            check(op, spy, {**kwargs, argument: value})
            check(op, spy, kwargs)


@pytest.mark.parametrize("name", SPECS)
@pytest.mark.parametrize("given", ["", "out", "flat gates", "out, flat gates"])
def test_the_second_call_of_a_kind_is_known_and_the_same(op, spy, name, given):
    for seed in range(2):
        kwargs = make_inputs(SPECS[name], seed).kwargs
        if "gates" in given and name != "batch":
            kwargs |= {gate: kwargs[gate][0] for gate in ("a", "b")} | {"dt_bias": kwargs["dt_bias"].flatten()}
        if "out" in given:
            kwargs["out"] = torch.empty_like(kwargs["v"])
        check(op, spy, kwargs)
        assert op.stats()["hits"] == seed


@pytest.mark.parametrize("name", ["packed", "kda"])
def test_each_scalar_changed_in_turn(op, spy, name):
    kwargs = {**make_inputs(SPECS[name]).kwargs, "scale": 0.5, "max_seqlen": 4}
    values = (
        None,
        0,
        1,
        1.0,
        True,
        False,
        2,
        4,
        0.5,
        20,
        20.0,
        -5,
        -5.0,
        "1",
        np.float64(0.5),
        np.float32(0.5),
        float("nan"),
    )
    values = (*values, float("inf"), torch.tensor(0.5), [0.5])
    for argument in (*NUMBERS, *FLAGS):
        for value in values:
            check(op, spy, kwargs)
            for _ in range(2):
                check(op, spy, {**kwargs, argument: value})
            check(op, spy, kwargs)
    for layout in ("kv", "vk", "KV", None, 3):
        for _ in range(2):
            check(op, spy, {**kwargs, "state_layout": layout})
        check(op, spy, kwargs)


@pytest.mark.parametrize("first", [1, 1.0])
def test_one_is_not_true(op, spy, first):
    kwargs = {**make_inputs(BASE).kwargs, "softplus_beta": first}
    check(op, spy, kwargs)
    for argument in ("softplus_beta", "scale", "softplus_threshold"):
        with pytest.raises(ArgumentTypeError, match=argument):
            op(**{**kwargs, argument: True})
    with pytest.raises(ArgumentTypeError, match="use_qk_l2norm_in_kernel"):
        op(**{**kwargs, "use_qk_l2norm_in_kernel": 1})


def test_equal_numbers_that_are_other_objects_are_the_same_call(op, spy):
    kwargs = {**make_inputs(BASE).kwargs, "scale": float("0.35"), "softplus_threshold": float("20.0")}
    op(**kwargs)
    misses = op.stats()["misses"]
    check(
        op, spy, {**kwargs, "scale": float("0.35"), "softplus_threshold": float("20.0"), "state_layout": "".join("kv")}
    )
    assert op.stats()["misses"] == misses


class TestLengths:
    CHANGES = (
        [0, 3, 3, 7],
        [0, 1, 2, 7],
        [0, 0, 0, 0],
        [0, 7, 7, 7],
        [0, 3, 2, 7],
        [1, 3, 3, 7],
        [0, 3, 3, 8],
        [0, 3, 3, 6],
    )

    def test_offsets_on_the_host_are_compared_by_value(self, op, spy):
        for before, after in itertools.product(self.CHANGES, repeat=2):
            kwargs = make_inputs(BASE).kwargs
            cu = kwargs["cu_seqlens"]
            cu.copy_(torch.tensor(before))
            check(op, spy, kwargs)
            cu.copy_(torch.tensor(after))  # the same tensor
            check(op, spy, kwargs)

    def test_every_layout_is_checked_and_handed_on(self, op, spy):
        kwargs = make_inputs(BASE.but(as_layout=True)).kwargs
        lengths = ((3, 0, 4), (1, 1, 5), (0, 0, 0), (7, 0, 0), (3, 0, 5), (4, 3, 0), (30, 0, 0))
        for before, after in itertools.product(lengths, repeat=2):
            check(op, spy, {**kwargs, "cu_seqlens": SequenceLayout.from_lengths(before)})
            check(op, spy, {**kwargs, "cu_seqlens": SequenceLayout.from_lengths(after)})

    def test_lengths_of_one_bucket_are_one_entry(self, op):
        kwargs = make_inputs(BASE.but(as_layout=True)).kwargs
        for lengths in ((3, 0, 4), (4, 0, 3), (0, 3, 4)):
            op(**{**kwargs, "cu_seqlens": SequenceLayout.from_lengths(lengths)})
        assert op.stats()["misses"] == 1

    @pytest.mark.parametrize("as_layout", [True, False])
    def test_lengths_of_another_bucket_are_decided_anew(self, op, as_layout):
        kwargs = make_inputs(BASE).kwargs
        for lengths in ((3, 0, 4), (7, 0, 0), (3, 0, 4)):
            layout = SequenceLayout.from_lengths(lengths)
            op(**{**kwargs, "cu_seqlens": layout if as_layout else layout.cu_seqlens})
        assert (op.stats()["bound"], op.stats()["misses"]) == (2, 2)

    def test_a_layout_and_its_tensor_are_not_taken_for_one_another(self, op, spy):
        for as_layout in (True, False, True, False):
            check(op, spy, make_inputs(BASE.but(as_layout=as_layout)).kwargs)

    def test_more_steps_than_the_buffer_holds_are_refused_after_a_good_call(self, op, spy):
        for as_layout in (True, False):
            kwargs = make_inputs(BASE.but(lengths=(4, 4), verify="chain", extra_rows=4, as_layout=as_layout)).kwargs
            check(op, spy, kwargs)
            layout = SequenceLayout.from_lengths((8, 0))
            with pytest.raises(ArgumentValueError, match="intermediate_states_buffer"):
                op(**{**kwargs, "cu_seqlens": layout if as_layout else layout.cu_seqlens})


class TestGraphLayouts:
    def test_one_that_may_hold_more_tokens_than_there_are_is_refused_after_one_that_does_not(self, op):
        given = make_inputs(CaseSpec("two", (3, 5), k=8, v=8)).kwargs
        fits, beyond = (SequenceLayout.padded(2, max_length=8, max_tokens=most) for most in (8, 9))
        for layout in (fits, beyond):
            layout.update([3, 5])
        for layout, fine in ((beyond, False), (fits, True), (fits, True), (beyond, False)):
            if fine:
                op(**given | {"cu_seqlens": layout})
            else:
                with pytest.raises(ArgumentValueError, match="cu_seqlens: expected a GraphLayout of at most T = 8"):
                    op(**given | {"cu_seqlens": layout})


class TestSlots:
    def test_in_place_and_separate_are_told_apart_by_the_object(self, op, spy):
        kwargs = make_inputs(BASE).kwargs
        slots = kwargs["initial_state_indices"]
        for write in (None, slots.clone(), slots, None, slots, slots.clone()):
            check(op, spy, {**kwargs, "output_state_indices": write})

    def test_what_cannot_be_recognised_again_is_not_kept(self, op):
        kwargs = make_inputs(BASE).kwargs
        for _ in range(3):
            op(**{**kwargs, "output_state_indices": kwargs["initial_state_indices"]})
        assert op.stats()["entries"] == 0

    def test_one_tensor_in_two_roles_is_remembered_too(self, op, spy):
        kwargs = make_inputs(BASE.but(verify="chain")).kwargs
        kwargs["intermediate_state_indices"] = kwargs["initial_state_indices"].clamp(max=3)
        for rows in (kwargs["intermediate_state_indices"], kwargs["initial_state_indices"]):
            for _ in range(2):
                check(op, spy, {**kwargs, "intermediate_state_indices": rows})
        assert op.stats()["misses"] <= 2


class TestModes:
    def test_grad_mode_is_part_of_a_call_whose_inputs_require_grad(self):
        spy = Spy()
        op = op_of(spy)
        kwargs = make_inputs(BASE).kwargs
        kwargs["q"].requires_grad_()
        for _ in range(2):
            op(**kwargs)
            assert spy.seen[-1].out is None, "autograd must see the output being made"
            with torch.no_grad():
                op(**kwargs)
                assert spy.seen[-1].out is not None
        assert op.stats()["misses"] == 2

    def test_grad_mode_makes_no_difference_otherwise(self, op):
        kwargs = make_inputs(BASE).kwargs
        op(**kwargs)
        with torch.no_grad():
            op(**kwargs)
        assert op.stats()["misses"] == 1

    def test_a_subclass_of_tensor_changes_no_result_s_type(self, op):
        class Marked(torch.Tensor):
            pass

        kwargs = make_inputs(BASE).kwargs
        kwargs["v"] = kwargs["v"].as_subclass(Marked)
        assert [type(op(**kwargs)) for _ in range(2)] == [torch.Tensor] * 2

    def test_inference_mode_is_another_kind_of_call(self, op, spy):
        kwargs = make_inputs(BASE).kwargs
        for _ in range(2):
            check(op, spy, kwargs)
            with torch.inference_mode():
                check(op, spy, kwargs)


class TestOverrides:
    @pytest.fixture
    def two(self):
        first, second = Spy(), Spy()
        second.name, second.priority = "second", 10
        return first, second, op_of(first, second)

    def test_argument_and_context(self, two):
        first, second, op = two
        kwargs = make_inputs(BASE).kwargs

        def ran(**choice):
            before = len(first.seen), len(second.seen)
            op(**kwargs, **choice)
            return "spy" if len(first.seen) > before[0] else "second"

        for _ in range(3):
            assert ran() == "spy"
            with use(SPEC.name, "second"):
                assert ran() == "second"
                assert ran(backend="spy") == "spy"
            assert ran(backend="second") == "second"
            assert ran(backend="".join(["sp", "y"])) == "spy"

    def test_environment_is_read_again_on_refresh(self, two, monkeypatch):
        first, second, op = two
        kwargs = make_inputs(BASE).kwargs
        op(**kwargs)
        monkeypatch.setenv("ISOKERN_BACKEND_FUSED_SIGMOID_GATING", "second")
        op(**kwargs)
        assert (len(first.seen), len(second.seen)) == (2, 0)
        op.dispatcher.registry.refresh()
        op(**kwargs)
        assert (len(first.seen), len(second.seen)) == (2, 1)

    def test_a_change_of_store_plan_or_backends_forgets(self, two):
        first, _, op = two
        registry = op.dispatcher.registry
        kwargs = make_inputs(BASE).kwargs
        for count, change in enumerate([lambda: registry.use_store(None), lambda: registry.pin(None)], start=1):
            op(**kwargs)
            assert op.stats()["misses"] == count
            change()
            assert op.stats()["entries"] == op.stats()["bound"] == 0
        registry.unregister_backend(SPEC.name, "spy")
        count = len(first.seen)
        op(**kwargs)
        assert len(first.seen) == count

    def test_what_was_decided_before_a_change_is_not_remembered_after_it(self):
        spy = Spy()
        op = op_of(spy)
        dispatcher = op.dispatcher
        spy.run = lambda call: (dispatcher.forget(), call.out)[1]  # a plan is pinned while the first call runs
        op(**make_inputs(BASE).kwargs)
        assert op.stats()["entries"] == 0

    def test_a_choice_made_for_a_change_that_came_meanwhile_is_not_kept(self):
        spy = Spy()
        op = op_of(spy)
        dispatcher = op.dispatcher
        spy.bind = lambda problem, config: (dispatcher.forget(), spy.run)[1]
        op(**make_inputs(BASE).kwargs)
        assert op.stats()["bound"] == op.stats()["entries"] == 0


class TestBookkeeping:
    def test_hits_and_misses_are_counted(self, op):
        kwargs = make_inputs(BASE).kwargs
        for _ in range(5):
            op(**kwargs)
        with pytest.raises(ArgumentError):
            op(**{**kwargs, "scale": -1.0})
        for _ in range(2):  # reading the counters counts nothing
            found = op.stats()
            assert (found["hits"], found["misses"], found["entries"], found["bound"]) == (4, 2, 1, 1)

    def test_calls_with_equal_problems_share_one_runner(self, op):
        for strides in (0, 8):
            kwargs = make_inputs(BASE).kwargs
            pool = kwargs["initial_state_source"]
            kwargs["initial_state_source"] = torch.cat([pool, pool])[: len(pool) + strides // 8]
            op(**kwargs)
        assert (op.stats()["entries"], op.stats()["bound"]) == (2, 1)

    def test_entries_are_bounded(self, op, spy, monkeypatch):
        monkeypatch.setattr(entries, "MAX_ENTRIES", 6)
        monkeypatch.setattr(entries, "MAX_ALIKE", 3)
        for round_ in range(3):
            for n in range(1, 5):
                for scale in (0.1, 0.2, 0.3, 0.4, 0.5):
                    kwargs = {**make_inputs(BASE.but(lengths=(n,))).kwargs, "scale": scale}
                    check(op, spy, kwargs)
                    check(op, spy, kwargs)
                    assert op.stats()["entries"] <= 6, round_
        assert op.stats()["evicted"] > 0

    def test_alternating_calls_stay_recognised(self, op, spy):
        kinds = [
            make_inputs(BASE.but(lengths=(n,), state_dtype=d)).kwargs
            for n in (1, 2, 3)
            for d in ("float32", "bfloat16")
        ]
        for _ in range(3):
            for kwargs in kinds:
                check(op, spy, kwargs)
        assert op.stats()["misses"] == len(kinds)

    def test_calls_that_take_turns_are_found_among_the_recent_ones_which_stay_in_place(self, op, monkeypatch):
        kinds = [make_inputs(BASE.but(lengths=(n,))).kwargs for n in range(1, entries.RECENT + 1)]
        for kwargs in kinds:
            op(**kwargs)
        recent = op.entries.recent
        assert len(recent) == entries.RECENT
        monkeypatch.setattr(op.entries, "alike", lambda q, v: pytest.fail("asked the table"))
        for kwargs in 3 * kinds:
            op(**kwargs)
            assert op.entries.recent == recent

    @pytest.mark.parametrize("more", [0, 1], ids=["recent", "dropped out"])
    def test_a_call_that_comes_twice_in_a_row_is_tried_first(self, op, more):
        kinds = [make_inputs(BASE.but(lengths=(n,))).kwargs for n in range(1, entries.RECENT + 1 + more)]
        for kwargs in kinds:
            op(**kwargs)
        for kwargs in kinds:
            for _ in range(2):
                op(**kwargs)
            assert op.entries.recent[0].shapes[0] == kwargs["q"].shape
            assert len(set(op.entries.recent)) == entries.RECENT

    def test_nothing_to_do_launches_nothing_however_often(self, op, spy):
        for spec in (BASE.but(lengths=()), BASE.but(lengths=(0, 0))):
            for _ in range(3):
                kwargs = make_inputs(spec).kwargs
                assert op(**kwargs).shape == kwargs["v"].shape
        assert not spy.seen

    def test_a_backend_that_fails_later_is_a_typed_error(self, op, spy):
        kwargs = make_inputs(BASE).kwargs
        op(**kwargs)

        class Failing(list):
            def append(self, call):
                raise RuntimeError("launch failure")

        spy.seen = Failing()
        with pytest.raises(IsokernError, match=r"run failed: op .*'spy'.*launch failure"):
            op(**kwargs)

    def test_threads_with_calls_of_their_own_do_not_mix(self, op, spy):
        kinds = [make_inputs(BASE.but(lengths=(n, n))).kwargs for n in range(1, 5)]
        wrong = []

        def work(kwargs):
            for _ in range(200):
                out = op(**kwargs)
                if out.shape != kwargs["v"].shape:
                    wrong.append(out.shape)

        threads = [threading.Thread(target=work, args=(kwargs,)) for kwargs in kinds]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
        assert op.stats()["hits"] + op.stats()["misses"] == 800
