"""The accuracy policy: who may be chosen under it, and that nothing of one is ever found under the other."""

from __future__ import annotations

import dataclasses
import inspect
import os
import threading
from contextlib import nullcontext

import pytest
import torch
import typer
from rich.console import Console
from typer.testing import CliRunner

from isokern import cli, registry
from isokern.autotune.candidates import admit
from isokern.autotune.cli import warmup
from isokern.autotune.html_report import coverage_of
from isokern.autotune.recipe import ProblemRecipe
from isokern.autotune.report import plan_table
from isokern.autotune.session import Session
from isokern.autotune.warmup import HOOKS, plan_warmup
from isokern.cache import CandidateRecord, Entry, Layer, Plan, Store
from isokern.cache.codec import canonical
from isokern.errors import ArgumentTypeError, ArgumentValueError, NotPreparedError, UnknownNameError
from isokern.registry import Accepted, Backend, Config, Registry, RejectCode, Rule
from isokern.registry.agreement import _basis
from isokern.registry.doctor import examine
from isokern.registry.explain import render
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.catalogue import model
from isokern.registry.ops.fused_sigmoid_gating.concrete import adversarial_twin, concrete
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.misses import cases_of
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC
from isokern.registry.ops.fused_sigmoid_gating.workload_case import Case, Tier, parse_case
from isokern.registry.ops.fused_sigmoid_gating.workload_files import format_workloads, parse_workloads
from isokern.registry.overrides import Override, environment_accuracies, use

OP = SPEC.name
VARIABLE = "ISOKERN_ACCURACY_FUSED_SIGMOID_GATING"
CASE = CaseSpec("two rows", (1, 1), h=1, hv=2, k=8, v=6)
PROBLEM = describe(CASE, "cpu")
ROUNDED_PROBLEM = PROBLEM.with_accuracy("rounded")


class Exact(Backend):
    """Writes its own mark, so that outputs tell who ran."""

    op, name, provenance, priority = OP, "exact", "external", 10
    mark = 1.0

    def check(self, problem):
        return Accepted()

    def configs(self, problem):
        return (Config.of(chunk=64), Config.of(chunk=32))

    def bind(self, problem, config):
        return lambda call: call.out.fill_(self.mark)


class Rounding(Exact):
    """Comes first wherever it is allowed to."""

    name, priority, accuracy = "rounding", 90, "rounded"
    mark = 2.0


@pytest.fixture
def own(monkeypatch, tmp_path):
    """A registry of these two, with an empty store."""
    for name in tuple(os.environ):
        if name.startswith("ISOKERN_"):
            monkeypatch.delenv(name)
    made = Registry({}, load_plugins=False)
    made.register_op(SPEC)
    made.register_backend(Exact())
    made.register_backend(Rounding())
    made.use_store(Store([Layer("explicit", tmp_path, writable=True)]))
    return made


@pytest.fixture
def op(own):
    return own.get(OP)


@pytest.fixture
def kwargs():
    return make_inputs(CASE).kwargs


def chosen(registry, problem=PROBLEM, backend=None):
    return registry.dispatcher(OP).decide(problem, backend).backend


def ran(op, kwargs, **more):
    """Who wrote the output."""
    return {1.0: "exact", 2.0: "rounding"}[float(op(**kwargs, **more).flatten()[0])]


def tuned(registry, problem, backend, chunk=32, beaten=None):
    """As a warm-up would have published it. ``beaten``: whose default took twice as long."""
    environment = registry.environment("cpu")
    config = {"chunk": chunk}
    record = CandidateRecord(
        backend, config, "ok", median_us=1.0, samples_us=(1.0,), fingerprint=registry.fingerprint(OP, backend)
    )
    candidates = (record,)
    if beaten is not None:
        changes = {"config": {"chunk": 64}, "median_us": 2.0, "samples_us": (2.0,), "backend": beaten}
        candidates += (dataclasses.replace(record, **changes, fingerprint=registry.fingerprint(OP, beaten)),)
    measured = {"policy": "eager", "created": "2026-01-01T00:00:00+00:00", "seconds": 1.0, "isokern": "0"}
    entry = Entry(
        op=OP, contract_version=SPEC.contract_version, key=problem.tuning_key(), environment=environment.hash,
        backend=backend, config=config, rule="made up", candidates=candidates, margin_over_runner_up=None,
        margin_over_default=None, measured={**measured, "launches": 1, "method": "made up"},
    )  # fmt: skip
    registry.store.put(entry, environment)
    registry.refresh()


class TestChoice:
    def test_without_a_word_what_rounds_is_not_chosen_and_the_reason_says_how_it_would_be(self, own):
        decision = own.dispatcher(OP).decide(PROBLEM)
        verdict = decision.outcome_of("rounding")
        assert (decision.backend, verdict.code) == ("exact", RejectCode.POLICY)
        for words in ("bfloat16", "backend=", "registry.use", 'accuracy="rounded"', VARIABLE):
            assert words in verdict.reason
        assert "accuracy" not in decision.problem
        assert not any("policy" in note for note in decision.notes)

    def test_under_rounded_all_classes_compete_and_the_decision_says_so(self, own):
        with use(OP, accuracy="rounded"):
            decision = own.dispatcher(OP).decide(PROBLEM)
        assert (decision.backend, decision.rule) == ("rounding", Rule.HEURISTIC)
        assert all(outcome.verdict for outcome in decision.outcomes)
        assert decision.problem == {**PROBLEM.key(), "accuracy": "rounded"}
        assert 'note: policy: accuracy="rounded"' in render(decision)
        assert "accuracy=rounded" in render(decision)

    def test_it_does_not_have_to_be_the_rounded_one(self, own):
        own.unregister_backend(OP, "rounding")
        with use(OP, accuracy="rounded"):
            assert chosen(own) == "exact"

    def test_what_is_named_runs_under_either(self, own):
        assert chosen(own, backend="rounding") == "rounding"
        with use(OP, accuracy="rounded"):
            assert chosen(own, backend="exact") == "exact"

    def test_a_problem_s_own_policy_stays(self, own):
        assert chosen(own, ROUNDED_PROBLEM) == "rounding"

    def test_policies_are_per_op(self, own):
        with use("another_op", accuracy="rounded"):
            assert chosen(own) == "exact"

    def test_problems_of_ops_that_know_no_policy_stay_as_they_are(self, own):
        with use(OP, accuracy="rounded"):
            assert own.dispatcher(OP).under_policy("anything") == "anything"


class TestContext:
    def test_an_inner_context_leaves_what_it_does_not_name(self, own):
        dispatcher = own.dispatcher(OP)
        with use(OP, accuracy="rounded"):
            with use(OP, "exact"):
                assert (chosen(own), dispatcher.policy()) == ("exact", "rounded")
            with use(OP, accuracy="float32"):
                assert chosen(own) == "exact"
                with use(OP, "rounding"):
                    assert (chosen(own), dispatcher.policy()) == ("rounding", "float32")
            assert chosen(own) == "rounding"
        with use(OP, "exact"), use(OP, accuracy="rounded"):
            assert (chosen(own), dispatcher.policy()) == ("exact", "rounded")
        with use(OP, "exact", accuracy="rounded"):
            assert dispatcher.request(None).context == "exact"
        assert (chosen(own), dispatcher.policy()) == ("exact", "float32")

    def test_it_holds_after_an_error_no_longer(self, own):
        with pytest.raises(KeyError), use(OP, accuracy="rounded"):
            raise KeyError
        assert chosen(own) == "exact"

    def test_other_threads_keep_their_own(self, op, kwargs):
        inside, done, seen = threading.Event(), threading.Event(), []

        def other():
            inside.wait(10)
            seen.append(ran(op, kwargs))  # while the main thread is in its context
            with use(OP, accuracy="rounded"):
                seen.append(ran(op, kwargs))
                done.set()

        thread = threading.Thread(target=other)
        thread.start()
        with use(OP, accuracy="rounded"):
            assert ran(op, kwargs) == "rounding"
            inside.set()
            assert done.wait(10)
        assert ran(op, kwargs) == "exact"
        thread.join(10)
        assert seen == ["exact", "rounding"]

    def test_what_is_wrong_is_refused_at_once(self):
        with pytest.raises(ArgumentValueError, match="accuracy: expected 'float32' or 'rounded', given 'bfloat16'"):
            registry.use(OP, accuracy="bfloat16")
        with pytest.raises(ArgumentTypeError, match="at least one of them, given neither"):
            registry.use(OP)
        with pytest.raises(UnknownNameError, match="unknown op"):
            registry.use("fused", accuracy="rounded")

    def test_an_override_compares_as_a_tuple(self):
        assert Override("exact") == Override("exact", None) != Override("exact", "rounded")


class TestEnvironment:
    def test_it_is_read_once_and_a_context_comes_first(self, own, monkeypatch):
        assert chosen(own) == "exact"
        monkeypatch.setenv(VARIABLE, "rounded")
        assert chosen(own) == "exact", "read once"
        own.refresh()
        assert chosen(own) == "rounding"
        with use(OP, accuracy="float32"):
            assert chosen(own) == "exact"
        monkeypatch.setenv(VARIABLE, "float32")
        own.refresh()
        assert chosen(own) == "exact"

    def test_another_value_is_an_error_that_names_what_is_allowed(self, op, kwargs, monkeypatch):
        monkeypatch.setenv(VARIABLE, "bf16")
        for _ in range(2):
            with pytest.raises(ArgumentValueError, match=f"{VARIABLE}: expected 'float32' or 'rounded', given 'bf16'"):
                op(**kwargs)
        with use(OP, accuracy="rounded"):
            assert ran(op, kwargs) == "rounding", "it is not asked"

    def test_calls_follow_it(self, op, kwargs, monkeypatch):
        assert ran(op, kwargs) == "exact"
        monkeypatch.setenv(VARIABLE, "rounded")
        assert ran(op, kwargs) == "exact"
        op.dispatcher.registry.refresh()
        assert ran(op, kwargs) == "rounding"

    def test_variables_are_per_op_and_empty_ones_are_none(self):
        environ = {"ISOKERN_ACCURACY_TOY": "rounded", "ISOKERN_ACCURACY_OTHER": "", "ISOKERN_BACKEND_TOY": "slow"}
        assert environment_accuracies(environ) == {"toy": "rounded"}

    def test_doctor_tells_good_ones_from_bad_ones(self, own, monkeypatch):
        monkeypatch.setenv(VARIABLE, "rounded")
        monkeypatch.setenv("ISOKERN_ACCURACY_FUSED", "rounded")
        found = {item.name: item.state for item in examine(own) if item.topic == "override"}
        assert found == {VARIABLE: "ok", "ISOKERN_ACCURACY_FUSED": "bad"}
        monkeypatch.setenv(VARIABLE, "half")
        [item] = [item for item in examine(own) if item.name == VARIABLE]
        assert (item.state, item.text) == ("bad", "'half' is none of float32, rounded")

    def test_ranks_under_different_policies_do_not_agree(self, own, monkeypatch):
        before = _basis(own, {OP: {}})
        monkeypatch.setenv(VARIABLE, "rounded")
        own.refresh()
        assert _basis(own, {OP: {}}) != before


class TestCalls:
    def test_the_signature_is_as_it_was(self, op):
        assert "accuracy" not in inspect.signature(op.__call__).parameters

    @pytest.mark.parametrize("pinned", [False, True])
    def test_calls_alike_but_for_the_policy_are_not_taken_for_one_another(self, op, kwargs, pinned):
        if pinned:
            for backend in op.dispatcher.registry.backends(OP).values():
                backend.bind = lambda problem, config, mark=backend.mark: Pinning(mark)
        rounded = use(OP, accuracy="rounded")
        assert ran(op, kwargs) == "exact"
        with rounded:
            assert ran(op, kwargs) == "rounding"
            assert ran(op, kwargs) == "rounding"
        assert ran(op, kwargs) == "exact"
        with use(OP, accuracy="float32"):
            assert ran(op, kwargs) == "exact"
        with use(OP, accuracy="rounded"):  # another context that asks for the same
            assert ran(op, kwargs) == "rounding"
            assert ran(op, kwargs, backend="exact") == "exact"
        assert ran(op, kwargs, backend="rounding") == "rounding"
        counted = op.stats()
        assert (counted["hits"], counted["misses"]) == (3, 5)

    def test_a_failure_names_the_policy(self, op, kwargs):
        def fails(call):
            raise RuntimeError("no")

        op.dispatcher.registry.backends(OP)["rounding"].bind = lambda problem, config: fails
        with use(OP, accuracy="rounded"), pytest.raises(Exception, match="accuracy rounded"):
            op(**kwargs)

    def test_prepare_and_decide_hold_to_it(self, op, kwargs):
        with use(OP, accuracy="rounded"):
            assert op.decide(**kwargs).backend == "rounding"
            assert op.prepare(**kwargs).backend == "rounding"
            assert op.prepare(problem=PROBLEM).backend == "rounding"
            assert {problem.accuracy for problem, _ in op.dispatcher.bound} == {"rounded"}
        assert op.prepare(problem=PROBLEM).backend == "exact"

    def test_in_a_capture_a_kernel_of_the_other_policy_does_not_serve(self, own):
        dispatcher, on_gpu = own.dispatcher(OP), describe(CASE, "cuda", 90)
        own.environment = lambda device: Registry.environment(own, "cpu")
        assert dispatcher.resolve(on_gpu).decision.backend == "exact"
        with use(OP, accuracy="rounded"), pytest.raises(NotPreparedError, match=r"'rounding'.*accuracy rounded"):
            dispatcher.resolve(on_gpu.with_mode("graph"))
        with use(OP, accuracy="rounded"):
            dispatcher.prepare(on_gpu)
            assert dispatcher.resolve(on_gpu.with_mode("graph")).decision.backend == "rounding"
        assert dispatcher.resolve(on_gpu.with_mode("graph")).decision.backend == "exact"

    def test_compiled_graphs_choose_under_the_policy_they_run_under(self, kwargs):
        process_wide = registry.get(OP)

        def layer(kwargs):
            return process_wide(**kwargs) + 0

        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        registry.register_backend(Rounding())
        try:
            assert not (compiled(kwargs) == 2).all()
            with registry.use(OP, accuracy="rounded"):
                assert (compiled(kwargs) == 2).all()
            assert not (compiled(kwargs) == 2).all()
        finally:
            registry.unregister_backend(OP, "rounding")


class Pinning:
    """A runner for bare tensors, too."""

    def __init__(self, mark):
        self.mark = mark

    def __call__(self, call):
        return call.out.fill_(self.mark)

    def pin(self, call):
        return lambda tensors: tensors[-1].fill_(self.mark)


class TestKeys:
    def test_the_default_s_keys_are_those_of_before_there_was_another(self):
        assert canonical(PROBLEM.tuning_key()) == (
            '{"device":"cpu","grad":false,"h":1,"hv":2,"intermediates":"none","io_dtype":"bfloat16","is_kda":false,'
            '"k":8,"l2norm":true,"length_class":"decode","longest":1,"lower_bound":false,"mode":"eager","n":2,'
            '"neg_eigval":false,"state_dtype":"float32","state_layout":"kv","strides":"dense","tokens":2,'
            '"update":"in_place","v":6,"varlen":true}'
        )
        assert set(PROBLEM.key()) - {"n", "tokens", "longest", "length_class"} == {*PROBLEM.__dataclass_fields__} - {
            "profile",
            "accuracy",
        }

    def test_the_other_s_say_so(self):
        assert ROUNDED_PROBLEM.tuning_key() == {**PROBLEM.tuning_key(), "accuracy": "rounded"}
        assert describe(CASE, "cpu", accuracy="rounded") == ROUNDED_PROBLEM != PROBLEM
        assert ROUNDED_PROBLEM.with_mode("graph").accuracy == "rounded"
        assert "accuracy rounded" in ROUNDED_PROBLEM.label
        assert "accuracy" not in PROBLEM.label


class TestStores:
    @pytest.mark.parametrize(("under", "other"), [(PROBLEM, ROUNDED_PROBLEM), (ROUNDED_PROBLEM, PROBLEM)])
    def test_what_was_tuned_under_one_is_a_miss_under_the_other(self, own, under, other):
        tuned(own, under, "exact")
        decide = own.dispatcher(OP).decide
        assert (decide(under).rule, decide(under).config) == (Rule.TUNED_USER, {"chunk": 32})
        assert (decide(other).rule, decide(other).config) == (Rule.HEURISTIC, {"chunk": 64})
        assert any(note.startswith("not tuned") for note in decide(other).notes)

    @pytest.mark.parametrize("policies", [("float32", "rounded"), ("rounded", "float32")])
    def test_nor_is_it_a_neighbour(self, own, policies):
        one, two = policies
        first = {"float32": "exact", "rounded": "rounding"}[one]
        tuned(own, describe(CASE.but(lengths=(1,) * 8), "cpu", accuracy=one), "exact", beaten=first)
        decide = own.dispatcher(OP).decide
        assert decide(PROBLEM.with_accuracy(one)).rule is Rule.NEIGHBOUR
        assert decide(PROBLEM.with_accuracy(two)).rule is Rule.HEURISTIC

    def test_plans_answer_for_the_policy_they_were_made_under(self, own, tmp_path):
        tuned(own, ROUNDED_PROBLEM, "rounding")
        environment = own.environment("cpu")
        Plan.from_store(own.store, environment).save(tmp_path / "plan.json")
        own.use_store(Store([Layer("explicit", tmp_path / "empty")]))
        own.pin(tmp_path / "plan.json")
        with use(OP, accuracy="rounded"):
            decision = own.dispatcher(OP).decide(PROBLEM)
        assert (decision.rule, decision.backend, decision.config) == (Rule.PLAN, "rounding", {"chunk": 32})
        assert own.dispatcher(OP).decide(PROBLEM).rule is Rule.HEURISTIC

    def test_a_rounded_choice_stored_under_float32_does_not_apply(self, own):
        tuned(own, PROBLEM, "rounding")
        decision = own.dispatcher(OP).decide(PROBLEM)
        assert (decision.backend, decision.rule) == ("exact", Rule.HEURISTIC)
        assert any("does not apply: rounds operands" in note for note in decision.notes)


class TestMisses:
    def test_they_are_recorded_by_policy_and_come_back_as_cases(self, op, own):
        kwargs = make_inputs(CASE.but(as_layout=True)).kwargs
        for context in (nullcontext(), use(OP, accuracy="rounded")):
            with context:
                op(**kwargs)
        [recorded] = cases_of(own.dispatcher(OP).misses)
        assert not recorded.left_out
        assert [(case.name, case.accuracy) for case in recorded.cases] == [
            ("decode N=2 float32 eager", None),
            ("decode N=2 float32 eager rounded", "rounded"),
        ]
        assert parse_workloads(format_workloads(recorded.cases)) == recorded.cases

    def test_workload_files_say_it_case_by_case(self):
        text = "op: fused_sigmoid_gating\ncases:\n  - decode N=8\n  - name: decode N=4\n    accuracy: {}\n"
        assert [case.accuracy for case in parse_workloads(text.format("rounded"))] == [None, "rounded"]
        with pytest.raises(Exception, match=r":5: accuracy: expected one of float32, rounded, given 'round'"):
            parse_workloads(text.format("round"))
        with pytest.raises(ArgumentValueError, match="accuracy"):
            Case("x", parse_case("decode N=1").phase, parse_case("decode N=1").lengths, accuracy="half")


class TestPlanning:
    CASES = (parse_case("decode N=1"),)

    def plan(self, own, cases=CASES, **more):
        return plan_warmup("qwen3-next-80b-a3b", 8, cases, tier=Tier.FULL, registry=own, store=own.store, **more)

    def test_rounded_candidates_are_admitted_under_the_policy_only(self, own):
        for accuracy, admitted in (("float32", {"exact"}), ("rounded", {"exact", "rounding"})):
            [planned] = self.plan(own, accuracy=accuracy).problems
            assert planned.task.problem.accuracy == planned.task.recipe.accuracy == accuracy
            assert {c.backend for c in admit(own, OP, planned.task.problem).candidates} == admitted
            assert planned.candidates == 2 * len(admitted)
        assert self.plan(own).problems[0].task.problem.accuracy == "float32"
        with pytest.raises(ArgumentValueError, match="accuracy"):
            self.plan(own, accuracy="half")

    def test_a_case_that_names_a_policy_keeps_it(self, own):
        named = Case("named", self.CASES[0].phase, self.CASES[0].lengths, accuracy="rounded")
        plan = self.plan(own, (*self.CASES, named))
        assert [(p.cases, p.task.problem.accuracy) for p in plan.problems] == [
            (("decode N=1",), "float32"),
            (("named",), "rounded"),
        ]
        out = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
        out.print(plan_table(plan))
        assert "named, accuracy rounded" in out.export_text()

    def test_a_report_s_coverage_names_the_command_that_tunes_what_is_missing(self, own):
        command = "isokern warmup --model qwen3-next-80b-a3b --tp 8"
        assert coverage_of(self.plan(own)).command == command
        coverage = coverage_of(self.plan(own, accuracy="rounded"))
        assert coverage.command == f"{command} --accuracy rounded"
        assert "accuracy rounded" in coverage.title

    def test_a_worker_builds_the_problem_that_was_planned(self):
        recipe = ProblemRecipe(OP, CASE, adversarial_twin(CASE), HOOKS, accuracy="rounded")
        again = ProblemRecipe.from_dict(recipe.to_dict())
        assert again == recipe
        assert Session("cpu", 1).load(again) == {"key": ROUNDED_PROBLEM.key()}

    def test_explain_on_the_command_line(self, own, monkeypatch):
        monkeypatch.setattr(registry, "default", own)
        spec = concrete(model("qwen3-next-80b-a3b").shard(8), parse_case("decode N=1"))
        tuned(own, describe(spec, "cpu", accuracy="rounded"), "rounding")
        words = ["explain", "--model", "qwen3-next-80b-a3b", "--tp", "8", "--case", "decode N=1", "--device", "cpu"]
        unasked = CliRunner().invoke(cli.app, words).output
        asked = CliRunner().invoke(cli.app, [*words, "--accuracy", "rounded"]).output
        assert "rejected [policy]" in unasked
        assert "tuned choice: rounding" not in unasked
        assert "tuned choice: rounding[chunk=32]: made up" in asked, "the store is asked for the same problem"

    @pytest.mark.parametrize(
        ("word", "variable", "under"),
        [("rounded", None, True), (None, "rounded", True), ("float32", "rounded", False), (None, None, False)],
    )
    def test_warm_up_s_dry_run_on_the_command_line(self, own, monkeypatch, tmp_path, word, variable, under):
        monkeypatch.setattr(registry, "default", own)
        if variable is not None:
            monkeypatch.setenv(VARIABLE, variable)
        (tmp_path / "cases.yaml").write_text("op: fused_sigmoid_gating\ncases: [decode N=1]\n")
        words = [
            "--model",
            "qwen3-next-80b-a3b",
            "--tp",
            "8",
            "--workloads",
            str(tmp_path / "cases.yaml"),
            "--device",
            "cpu",
        ]
        command = typer.Typer()
        command.command()(warmup)
        done = CliRunner().invoke(command, [*words, "--dry-run", *([] if word is None else ["--accuracy", word])])
        assert done.exit_code == 0, done.output
        assert ("decode N=1, accuracy rounded" in done.output) is under
        refused = CliRunner().invoke(command, [*words, "--dry-run", "--accuracy", "half"])
        assert isinstance(refused.exception, ArgumentValueError)
