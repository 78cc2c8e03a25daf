"""The serving replay: traffic as in production traces, served alike by every choice, judged before it is timed."""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import isokern
from isokern import registry
from isokern.errors import ArgumentValueError
from isokern.registry import FunctionBackend
from isokern.registry.ops.fused_sigmoid_gating.catalogue import model
from isokern.registry.ops.fused_sigmoid_gating.concrete import concrete
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.workload_case import Policy

EXAMPLES = Path(isokern.__file__).parent / "examples"
OP = "fused_sigmoid_gating"


def load(name: str):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


traffic = load("replay_traffic")
engine = load("replay_engine")
check = load("replay_check")
measure = load("replay_measure")
program = load("serve_replay")

CHAT, CODE = traffic.MIXES["conversation"], traffic.MIXES["code"]
#: Short requests, so that some begin, end and hand their slots on within a few small steps.
SHORT = replace(CHAT, name="short", prompts=replace(CHAT.prompts, mu=2.5), longest_prompt=60, answer_mean=4.0)
SERVER = traffic.Server(max_tokens=48, max_sequences=6)
SHARD = replace(model("qwen3-next-80b-a3b").shard(8), K=16, V=16)


# ---- requests


def quantile(values, share):
    return sorted(values)[int(share * (len(values) - 1))]


@pytest.mark.parametrize(("mix", "mean", "p95", "answer"), [(CHAT, 1155, 4083, 211), (CODE, 2048, 7315, 28)])
def test_requests_are_as_long_as_the_traces(mix, mean, p95, answer):
    drawn = list(itertools.islice(traffic.requests_of(mix, 1.0, 0), 4000))
    prompts = [request.prompt for request in drawn]
    assert statistics.mean(prompts) == pytest.approx(mean, rel=0.15)
    assert quantile(prompts, 0.95) == pytest.approx(p95, rel=0.1)
    assert statistics.mean(request.answer for request in drawn) == pytest.approx(answer, rel=0.15)
    assert len(drawn) / drawn[-1].arrival_s == pytest.approx(mix.rate, rel=0.15)


def test_a_higher_load_is_the_same_requests_in_less_time():
    one, four = (list(itertools.islice(traffic.requests_of(CODE, load, 3), 50)) for load in (1.0, 4.0))
    assert [(r.number, r.prompt, r.answer) for r in one] == [(r.number, r.prompt, r.answer) for r in four]
    assert [r.arrival_s / 4 for r in one] == pytest.approx([r.arrival_s for r in four])


# ---- batches


@pytest.mark.parametrize(
    ("mix", "load", "share", "rows", "mixed"),
    [
        (CHAT, 1.0, (0.88, 0.96), (13, 19), (800, 1300)),
        (CHAT, 2.5, (0.74, 0.88), (38, 54), (800, 1300)),
        (CHAT, 4.0, (0.62, 0.78), (70, 100), (900, 1400)),
        (CODE, 1.0, (0.88, 0.97), (1, 4), (2000, 8192)),
        (CODE, 4.0, (0.80, 0.96), (2, 6), (2000, 8192)),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_steps_are_as_in_the_replayed_traces(mix, load, share, rows, mixed):
    """Pure decode in 70 to 94 % of steps, of median N 16, 47, 84 (conversation) and 2 to 3 (code)."""
    steps = traffic.simulate(mix, load, 2500, seed=1)
    assert share[0] <= steps.decode_share <= share[1]
    assert rows[0] <= statistics.median(steps.decode_rows) <= rows[1]
    assert mixed[0] <= statistics.median(steps.mixed_tokens) <= mixed[1]
    prompts = [len(step.pieces) - step.decode_rows for step in steps.steps if not step.is_decode]
    assert quantile(prompts, 0.95) <= 8


@pytest.mark.parametrize("mix", [CHAT, CODE, SHORT], ids=lambda mix: mix.name)
def test_every_token_of_every_request_is_served_once_and_in_order(mix):
    served = traffic.simulate(mix, 4.0, 400, seed=2, settle=0)
    done = Counter()
    for step in served.steps:
        for piece in step.pieces:
            assert piece.start == done[piece.request]
            assert piece.length > 0
            done[piece.request] += piece.length
    asked = {r.number: r for r in itertools.islice(traffic.requests_of(mix, 4.0, 2), max(done) + 1)}
    last = {piece.request for piece in served.steps[-1].pieces}
    finished = [number for number in done if done[number] == asked[number].tokens]
    assert finished
    assert all(done[number] <= asked[number].tokens for number in done)
    # Whoever is not done was in the last step, or waits for room for the rest of its prompt.
    assert all(done[n] < asked[n].prompt for n in done if n not in finished and n not in last)


@pytest.mark.parametrize("server", [traffic.Server(), SERVER], ids=["large", "small"])
def test_a_slot_belongs_to_one_request_from_its_first_token_to_its_last(server):
    served = traffic.simulate(SHORT, 4.0, 600, seed=5, server=server, settle=0)
    owner: dict[int, int] = {}
    slot_of: dict[int, int] = {}
    asked = {r.number: r for r in itertools.islice(traffic.requests_of(SHORT, 4.0, 5), 5000)}
    handed_on = 0
    for step in served.steps:
        assert len(set(step.slots)) == len(step.slots)
        for piece in step.pieces:
            if piece.start == 0:
                assert piece.slot not in owner
                owner[piece.slot] = piece.request
                handed_on += piece.slot in slot_of.values()
                slot_of[piece.request] = piece.slot
            assert owner[piece.slot] == piece.request
        for piece in step.pieces:
            if piece.start + piece.length == asked[piece.request].tokens:
                del owner[piece.slot]
    assert handed_on
    assert max(slot_of.values()) < served.slots <= server.max_sequences


def test_steps_hold_decode_rows_first_and_keep_to_the_server_s_limits():
    steps = traffic.simulate(SHORT, 40.0, 300, server=SERVER, settle=0).steps
    asked = {r.number: r for r in itertools.islice(traffic.requests_of(SHORT, 40.0, 0), 5000)}
    for step in steps:
        assert 0 < step.tokens <= SERVER.max_tokens
        assert len(step.pieces) <= SERVER.max_sequences
        decoding = [piece.start >= asked[piece.request].prompt for piece in step.pieces]
        assert decoding == [True] * step.decode_rows + [False] * (len(step.pieces) - step.decode_rows)
    chunked = [p for step in steps for p in step.pieces if 0 < p.start < asked[p.request].prompt]
    assert chunked, "no prompt was cut where a step was full"
    assert any(step.tokens == SERVER.max_tokens for step in steps)


def test_traffic_is_a_function_of_its_seed():
    one, same, other = (traffic.simulate(CODE, 2.5, 50, seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one.steps != other.steps


def test_a_window_is_like_the_whole():
    whole = traffic.simulate(CHAT, 1.0, 1000)
    part = whole.window(30)
    first = whole.steps.index(part.steps[0])
    assert whole.steps[first : first + 30] == part.steps
    assert part.decode_share == pytest.approx(whole.decode_share, abs=0.05)
    mean = [sum(step.tokens for step in t.steps) / len(t.steps) for t in (whole, part)]
    assert mean[1] == pytest.approx(mean[0], rel=0.1)


@pytest.mark.parametrize(
    ("make", "argument"),
    [
        (lambda: traffic.simulate(CODE, 0.0, 5), "load"),
        (lambda: traffic.simulate(CODE, math.inf, 5), "load"),
        (lambda: traffic.simulate(CODE, 1.0, 0), "steps"),
        (lambda: traffic.simulate(CODE, 1.0, 5, settle=0).window(6), "count"),
        (lambda: traffic.Server(max_tokens=8, max_sequences=9), "max_sequences"),
        (lambda: traffic.Server(step_s=0.0), "step_s"),
    ],
)
def test_what_cannot_be_simulated_is_refused(make, argument):
    with pytest.raises(ArgumentValueError) as caught:
        make()
    assert caught.value.argument == argument


def test_the_simulation_imports_no_torch():
    code = "import replay_traffic, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=EXAMPLES, check=True)


# ---- serving


@pytest.fixture(scope="module")
def short():
    return traffic.simulate(SHORT, 8.0, 14, seed=1, server=SERVER, settle=28)


@pytest.fixture
def field():
    return measure.Field(SHARD, "cpu")


@pytest.fixture
def planted():
    """Register a backend that calls the reference and then does something to its call."""
    names = []

    def plant(name, spoil, provenance):
        reference = registry.backends(OP)["torch_reference"]

        def run(call):
            out = reference.bind(call.problem(), reference.configs(call.problem())[0])(call)
            spoil(call)
            return out

        registry.register_backend(FunctionBackend(run, OP, name, provenance=provenance, priority=-1))
        names.append(name)

    yield plant
    for name in names:
        registry.unregister_backend(OP, name)


NAMED = [engine.Choice.parse("torch_vectorized"), engine.Choice.parse("torch_reference+torch_chunked")]


def test_the_short_traffic_has_everything(short):
    """What the tests below rest on: slots handed on, prompts cut, requests begun before the first step."""
    begun = [slot for step in short.steps for slot in step.fresh]
    assert len(begun) > len(set(begun))
    assert any(step.is_decode for step in short.steps)
    assert any(piece.start and piece.length > 1 for step in short.steps for piece in step.pieces)
    assert any(piece.start for piece in short.steps[0].pieces)


def test_every_choice_serves_the_same_steps_and_gives_the_same(field, short):
    outcome = measure.replay(field, short, 2, named=NAMED, rounds=2)
    assert [timing.choice.name for timing in outcome.timings] == ["isokern", *(choice.name for choice in NAMED)]
    for timing in outcome.timings:
        assert len(timing.rounds) == 2
        assert all(len(of_round) == len(short.steps) and min(of_round) > 0 for of_round in timing.rounds)
        assert sum(timing.ran.values()) == len(short.steps)
    pair = outcome.timings[2].ran
    decode = sum(step.is_decode for step in short.steps)
    assert sum(n for words, n in pair.items() if words.startswith("torch_reference")) == decode
    assert sum(n for words, n in pair.items() if words.startswith("torch_chunked")) == len(short.steps) - decode
    assert outcome.best_fixed in outcome.timings[1:]


def test_without_names_every_backend_that_accepts_all_steps_runs(field, short):
    outcome = measure.replay(field, short, 1, rounds=1)
    ran = {timing.choice.name for timing in outcome.timings}
    assert {"isokern", "torch_vectorized", "torch_chunked"} <= ran
    assert "composite declines" in outcome.left_out["composite"]
    assert "runs where it is named" in outcome.left_out["torch_reference"]
    assert "rounds operands" in outcome.left_out["cupy_chunked_bf16"]
    assert "triton" not in ran | set(outcome.left_out)  # nothing to say: there is no GPU
    slow = measure.replay(field, short, 1, rounds=1, patience_s=0.0)
    assert [timing.choice.name for timing in slow.timings] == ["isokern"]
    assert "for the largest step" in slow.left_out["torch_chunked"]


WRONG = {
    "an output": (lambda call: call.out[:, -1, -1].mul_(1.02), "output"),
    "a state": (lambda call: call.pool[int(call.read_slots[0])].mul_(1.001), "state"),
    "another slot": (lambda call: call.pool[-1].add_(1.0), "a slot that nothing was served in has changed"),
    "NaN": (lambda call: call.out.fill_(math.nan), "output"),
}


@pytest.mark.parametrize("what", WRONG)
def test_who_computes_something_else_is_an_error(field, short, planted, what):
    spoil, words = WRONG[what]
    planted("wrong", spoil, "torch")
    spare = replace(short, slots=short.slots + 1)
    with pytest.raises(measure.MismatchError) as caught:
        measure.replay(field, spare, 1, named=[engine.Choice.parse("wrong")], rounds=1)
    assert set(caught.value.faults) == {"wrong"}
    assert any(words in fault for fault in caught.value.faults["wrong"])


@pytest.mark.parametrize("judged", [1, 10_000], ids=["few judged", "all judged"])
def test_another_library_that_computes_something_else_is_not_timed(field, short, planted, judged):
    planted("wrong", WRONG["an output"][0], "external")
    named = [engine.Choice.parse("wrong"), *NAMED[:1]]
    outcome = measure.replay(field, short, 1, named=named, rounds=1, judged_tokens=judged)
    assert [timing.choice.name for timing in outcome.timings] == ["isokern", "torch_vectorized"]
    assert outcome.left_out["wrong"].startswith("computes something else")


def test_a_state_that_is_not_zeroed_for_its_next_owner_is_found(field, short, monkeypatch):
    monkeypatch.setattr(engine.Replay, "admit", lambda self, step: None)
    with pytest.raises(measure.MismatchError, match="against float64"):
        measure.replay(field, short, 1, named=NAMED[:1], rounds=1, judged_tokens=10_000)


def test_states_may_differ_by_the_suite_s_limit_for_every_call_that_wrote_them(short):
    stack = engine.Stack(SHARD, short, 2, "cpu")
    slot = short.steps[-1].slots[0]
    for factor, found in ((1 + 1e-5, False), (1.01, True), (math.nan, True)):
        other = [pool.clone() for pool in stack.initial]
        other[1][slot, 0] *= factor
        faults = check.differing_states(stack, other, stack.initial)
        assert [fault.startswith("layer 1: a state") for fault in faults] == [True] * found


def test_a_round_begins_where_the_first_one_did(field, short):
    stack = engine.Stack(SHARD, short, 2, "cpu")
    served = engine.Replay(stack, measure.OWN)

    def serve():
        for batch in stack.batches:
            served.admit(batch.step)
            served.run(batch)
        return [pool.clone() for pool in served.pools]

    first = serve()
    assert not torch.equal(first[0], stack.initial[0])
    served.reset()
    assert all(torch.equal(a, b) for a, b in zip(serve(), first, strict=True))


def test_decode_steps_in_graphs_give_what_steps_from_the_host_give(short):
    """Without a GPU a graph is a function that reads the same tensors again, which is what must be right."""
    made = []

    def capture(launch):
        launch()
        made.append(launch)
        return launch

    graphs = measure.Field(SHARD, "cpu", capture=capture)
    outcome = measure.replay(graphs, short, 2, named=NAMED, rounds=1)
    assert [timing.graphed for timing in outcome.timings] == [True, True, False]  # the reference waits for the device
    buckets = {engine.bucket(step.decode_rows) for step in short.steps if step.is_decode}
    assert len(made) == 2 * len(buckets)


def test_a_named_choice_that_declines_a_step_is_refused(field, short):
    with pytest.raises(ArgumentValueError, match="composite declines"):
        measure.replay(field, short, 1, named=[engine.Choice.parse("composite")])


def test_what_is_tuned_are_the_problems_of_the_steps(short):
    field = measure.Field(SHARD, "cpu")
    cases = field.cases([short, short])
    keys = [describe(concrete(SHARD, case), "cpu", 0).tuning_key() for case in cases]
    met = [field.problem(step, Policy.EAGER).tuning_key() for step in short.steps]
    assert all(key in keys for key in met)
    assert all(key in met for key in keys)
    assert len({case.name for case in cases}) == len({frozenset(key.items()) for key in keys}) == len(cases)


# ---- the program


def timing(name, *rounds):
    return measure.Timing(engine.Choice(name), rounds, False, Counter({f"{name}[default] by context": len(rounds[0])}))


def test_times_are_medians_over_rounds_and_gains_ratios_of_totals():
    own = timing("isokern", (1.0, 2.0), (3.0, 2.0), (1.0, 2.0))
    other = timing("other", (2.0, 4.0), (3.0, 3.0), (2.0, 4.0))
    assert (own.steps, own.median_s, own.p95_s, own.total_s) == ((1.0, 2.0), 1.5, 2.0, 3.0)
    assert own.gain_over(other) == (2.0, 1.2, 2.0)


def test_who_runs_the_same_kernels_by_another_rule_is_known():
    tuned = replace(
        timing("a", (1.0,)), ran=Counter({"x[c=1] by tuned-user": 2, "x[c=1] by heuristic": 1, "y[] by plan": 1})
    )
    fixed = replace(timing("b", (1.0,)), ran=Counter({"x[c=1] by context": 3, "y[] by context": 1}))
    assert tuned.kernels == fixed.kernels
    assert tuned.kernels != replace(fixed, ran=Counter({"x[c=2] by context": 3, "y[] by context": 1})).kernels


def test_a_file_has_a_row_per_choice_and_one_for_whom_was_left_out(short):
    timings = (timing("isokern", (1.0, 2.0)), timing("slow", (4.0, 5.0)), timing("fast", (1.0, 1.0)))
    outcome = measure.Outcome(short, timings, {"absent": "declines"})
    assert outcome.best_fixed is timings[2]
    rows = program.rows_of(outcome, 3)
    assert [(row.case, row.implementation, row.eager_us) for row in rows] == [
        ("short 8x", "isokern", 1.5e6),
        ("short 8x", "slow", 4.5e6),
        ("short 8x", "fast", 1e6),
        ("short 8x", "absent", None),
    ]
    assert [row.extra.get("isokern_gains") for row in rows] == [1.0, 3.0, 0.6667, None]
    assert rows[3].extra == {"left_out": "declines"}
    assert program.overall([outcome, outcome]) == [("isokern", 6.0), ("fast", 4.0), ("slow", 18.0)]


def test_the_program_prints_and_writes_what_it_measured(tmp_path):
    out = tmp_path / "some" / "replay.json"
    words = ["--tp", "8", "--layers", "1", "--mix", "code", "--load", "1", "--steps", "3", "--rounds", "1"]
    words += ["--backend", "torch_chunked", "--store", str(tmp_path / "store"), "--judged", "64", "--out", str(out)]
    words += ["--device", "cpu"]
    done = CliRunner().invoke(program.app, words)
    assert done.exit_code == 0, done.output
    assert "against the best fixed choice, torch_chunked" in done.output
    result = json.loads(out.read_text())
    assert (result["meta"]["what"], result["meta"]["tuned"]) == ("replay", None)
    assert [row["implementation"] for row in result["rows"]] == ["isokern", "torch_chunked"]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--mix", "chatter"], "conversation"),
        (["--tune", "5"], "--store"),
        (["--device", "cpu", "--graphs"], "--graphs"),
        (["--device", "tpu"], "--device"),
        (["--state-layout", "vv"], "--state-layout"),
        (["--model", "qwen3-nxt"], "qwen3-next"),
        (["--device", "cpu", "--steps", "2", "--mix", "code", "--load", "1", "--backend", "tritn"], "triton"),
    ],
)
def test_what_makes_no_sense_is_refused(words, expected):
    done = CliRunner().invoke(program.app, words)
    assert done.exit_code != 0
    assert expected in done.output
