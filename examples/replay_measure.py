"""Who may serve a traffic, whether each computes the same, and how long each takes per step."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import psutil
import torch
from replay_check import Judge, differing_outputs, differing_states
from replay_engine import OP, Batch, Capture, Choice, Replay, Stack, case_of
from replay_traffic import Step, Traffic

from isokern import registry
from isokern.autotune.warmup import arch_of
from isokern.errors import ArgumentValueError, BackendFailedError, IsokernError, UnknownNameError
from isokern.registry.backend import Config
from isokern.registry.decision import Decision, RejectCode, Rejected
from isokern.registry.ops.fused_sigmoid_gating.catalogue import Shard
from isokern.registry.ops.fused_sigmoid_gating.concrete import concrete
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.problem import Problem
from isokern.registry.ops.fused_sigmoid_gating.workload_case import Case, Policy
from isokern.registry.plugins import checked
from isokern.registry.varlen.profile import bucket

__all__ = ["OWN", "Field", "MismatchError", "Outcome", "Timing", "replay"]

OWN = Choice("isokern")
#: Not worth a word: a backend that cannot run on this machine at all.
_ELSEWHERE = (RejectCode.NOT_INSTALLED, RejectCode.DEVICE)
#: Consecutive steps of one choice before the next one's turn: close enough together that a machine's drift is shared,
#: few of them right after another choice, whose threads may still spin and whose states fill the caches.
_TURN = 10
#: Share of the free memory that pools may take.
_MEMORY_SHARE = 0.8


class MismatchError(IsokernError):
    """Choices that must compute the same do not. Attribute ``faults``: sentences by the name of the choice."""

    def __init__(self, faults: Mapping[str, Sequence[str]]) -> None:
        self.faults = faults
        super().__init__("\n".join(f"{name}: {fault}" for name, found in faults.items() for fault in found))


@dataclass(frozen=True, slots=True)
class Field:
    """The layer that is served, where, and how decode steps are launched there.

    Attributes:
        shard: the layer. device: ``cpu`` or ``cuda``. state_layout: in place of the model's.
        graphs: decode steps run as CUDA graphs, on the choices that can. capture: how to make one.
    """

    shard: Shard
    device: str
    state_layout: str | None = None
    capture: Capture | None = None

    @property
    def graphs(self) -> bool:
        """Whether decode steps are launched as graphs."""
        return self.capture is not None

    def mode(self, step: Step) -> Policy:
        """How ``step`` is launched."""
        return Policy.GRAPH if self.graphs and step.is_decode else Policy.EAGER

    def problem(self, step: Step, mode: Policy) -> Problem:
        """What the op dispatches ``step`` as; a graph is one for all numbers of rows of its bucket."""
        lengths = (1,) * bucket(step.decode_rows) if mode is Policy.GRAPH else step.lengths
        arch = arch_of(registry.default.environment(self.device))
        spec = concrete(self.shard, case_of(lengths, self.state_layout))
        return describe(spec, self.device, arch, "graph" if mode is Policy.GRAPH else "eager")

    def declined(self, name: str, steps: Sequence[Step], mode: Policy = Policy.EAGER) -> dict[Problem, Rejected]:
        """The problems of ``steps`` that backend ``name`` declines, with its reasons.

        Raises:
            UnknownNameError: no such backend.
        """
        backends = registry.backends(OP)
        if name not in backends:
            raise UnknownNameError("backend", name, backends)
        answers = {problem: checked(backends[name], problem) for problem in {self.problem(s, mode) for s in steps}}
        return {problem: answer for problem, answer in answers.items() if isinstance(answer, Rejected)}

    def refusal(self, choice: Choice, steps: Sequence[Step]) -> tuple[RejectCode, str] | None:
        """Why ``choice`` cannot serve ``steps`` from the host; None if it can."""
        for decode in (True, False):
            chosen = [step for step in steps if step.is_decode is decode]
            name = choice.decode if decode else choice.mixed
            if name is not None and (declined := self.declined(name, chosen)):
                problem, answer = next(iter(declined.items()))
                return answer.code, f"{name} declines {problem.profile.label}: {answer.reason}"
        return None

    def candidates(self, steps: Sequence[Step]) -> tuple[list[Choice], dict[str, str]]:
        """Every fixed backend that accepts all ``steps``; of the others that run on this device, the reason."""
        accepted, left_out = [], {}
        for name, backend in registry.backends(OP).items():
            choice = Choice.parse(name)
            if backend.accuracy == "rounded":
                left_out[name] = "rounds operands: another result than the others'"
            elif name == registry.spec(OP).reference_backend:
                left_out[name] = "token by token in Python: runs where it is named"
            elif refusal := self.refusal(choice, steps):
                if refusal[0] not in _ELSEWHERE:
                    left_out[name] = refusal[1]
            else:
                accepted.append(choice)
        return accepted, left_out

    def cases(self, traffics: Sequence[Traffic]) -> list[Case]:
        """The problems that the traffics contain, as cases of a warm-up: most tokens in all first.

        Each stands for the steps that share its tuning key, with the lengths of the largest.
        """
        found: dict[frozenset[tuple[str, object]], tuple[int, Step, Policy]] = {}
        for step in (step for traffic in traffics for step in traffic.steps):
            modes = {Policy.EAGER} if not step.is_decode else {self.mode(step)}
            for mode in modes:
                key = frozenset(self.problem(step, mode).tuning_key().items())
                tokens, largest, _ = found.get(key, (0, step, mode))
                found[key] = (tokens + step.tokens, max(largest, step, key=lambda s: s.tokens), mode)
        cases = []
        for _, step, mode in sorted(found.values(), key=lambda entry: -entry[0]):
            lengths = (1,) * bucket(step.decode_rows) if mode is Policy.GRAPH else step.lengths
            case = case_of(lengths, self.state_layout)
            name = f"{case.name} {mode}"
            cases.append(Case(name, case.phase, case.lengths, policy=mode, state_layout=case.state_layout))
        return cases


@dataclass(frozen=True, slots=True)
class Timing:
    """How long one choice took.

    Attributes:
        choice: who. rounds: seconds of each step, for every round. graphed: decode steps ran as graphs.
        ran: steps by what ran them: backend, config and the rule that chose it.
    """

    choice: Choice
    rounds: tuple[tuple[float, ...], ...]
    graphed: bool
    ran: Counter[str]

    @property
    def steps(self) -> tuple[float, ...]:
        """Seconds of each step, medians over the rounds."""
        return tuple(statistics.median(seconds) for seconds in zip(*self.rounds, strict=True))

    @property
    def kernels(self) -> Counter[str]:
        """Steps by backend and config, whatever rule chose them."""
        found = Counter[str]()
        for words, count in self.ran.items():
            found[words.rpartition(" by ")[0]] += count
        return found

    @property
    def median_s(self) -> float:
        """Of a step."""
        return statistics.median(self.steps)

    @property
    def p95_s(self) -> float:
        """95 % of the steps take no longer."""
        ordered = sorted(self.steps)
        return ordered[max(0, -(-95 * len(ordered) // 100) - 1)]

    @property
    def total_s(self) -> float:
        """All steps."""
        return sum(self.steps)

    def gain_over(self, other: Timing) -> tuple[float, float, float]:
        """By which factor all steps take longer on ``other``: of the medians, least and most of any round."""
        by_round = [sum(theirs) / sum(own) for own, theirs in zip(self.rounds, other.rounds, strict=True)]
        return other.total_s / self.total_s, min(by_round), max(by_round)


@dataclass(frozen=True, slots=True)
class Outcome:
    """One traffic, served by every choice.

    Attributes:
        traffic: what was served. timings: the registry's own choice first.
        left_out: who was not timed, and why.
    """

    traffic: Traffic
    timings: tuple[Timing, ...]
    left_out: dict[str, str]

    @property
    def own(self) -> Timing:
        """The registry's own choice."""
        return self.timings[0]

    @property
    def best_fixed(self) -> Timing | None:
        """The fixed choice with the least total time."""
        return min(self.timings[1:], key=lambda t: t.total_s, default=None)


def replay(
    field: Field,
    traffic: Traffic,
    layers: int,
    *,
    named: Sequence[Choice] = (),
    rounds: int = 3,
    seed: int = 0,
    judged_tokens: int = 2048,
    patience_s: float = 2.0,
) -> Outcome:
    """Serve ``traffic`` with the registry's own choice and every fixed one, on ``layers`` layers.

    Args:
        named: the fixed choices; none: every backend that accepts all steps. rounds: timed ones.
        judged_tokens: per layer, judged against float64. patience_s: a fixed choice that was not named and takes longer
            for the largest step is left out.

    Raises:
        ArgumentValueError: a named choice declines a step, or there is no memory for so many pools.
        MismatchError: one of isokern's own backends, or the registry's choice, computes something else.
        IsokernError: one of them failed.
    """
    if named:
        for choice in named:
            if refusal := field.refusal(choice, traffic.steps):
                raise ArgumentValueError("backend", "a choice that accepts every step", f"{choice.name}: {refusal[1]}")
        chosen, left_out = list(named), dict[str, str]()
    else:
        chosen, left_out = field.candidates(traffic.steps)
    stack = Stack(
        field.shard, traffic, layers, field.device, seed=seed, state_layout=field.state_layout, graphs=field.graphs
    )
    _require_memory(stack, 1 + len(chosen))
    replays = [Replay(stack, choice, _capture(field, choice, traffic)) for choice in (OWN, *chosen)]
    replays = _able(stack, replays, math.inf if named else patience_s, left_out)
    replays, ran = _rehearsed(field, stack, replays, Judge(stack, judged_tokens, seed), left_out)
    rounds_of = _race(stack, replays, rounds, seed)
    timings = tuple(Timing(r.choice, rounds_of[r.choice.name], r.graphed, ran[r.choice.name]) for r in replays)
    return Outcome(traffic, timings, left_out)


def _own(name: str) -> bool:
    """Whether a choice is made of isokern's own backends alone."""
    backends = registry.backends(OP)
    return name == OWN.name or all(backends[part].provenance != "external" for part in name.split("+"))


def _capture(field: Field, choice: Choice, traffic: Traffic) -> Capture | None:
    """How the choice's decode steps become graphs; None if they cannot."""
    rows = [step for step in traffic.steps if step.is_decode]
    if choice.decode is not None and field.graphs and field.declined(choice.decode, rows, Policy.GRAPH):
        return None
    return field.capture


def _require_memory(stack: Stack, sets: int) -> None:
    needed = sets * stack.state_bytes
    free = psutil.virtual_memory().available if stack.device == "cpu" else torch.cuda.mem_get_info()[0]
    if needed > _MEMORY_SHARE * free:
        expected = f"so few that {sets} sets of pools fit into {_MEMORY_SHARE * free / 2**30:.1f} GiB"
        given = f"{len(stack.initial)} layers, {needed / 2**30:.1f} GiB"
        raise ArgumentValueError("layers", expected, given, "fewer layers, choices (--backend) or ranks' heads (--tp)")


def _synchronise(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _timed(replay: Replay, batch: Batch) -> float:
    """Seconds of one step until the device is done: its layout, its slots and all layers."""
    device = replay.stack.device
    replay.admit(batch.step)
    _synchronise(device)
    began = time.perf_counter_ns()
    replay.run(batch)
    _synchronise(device)
    return (time.perf_counter_ns() - began) * 1e-9


def _able(stack: Stack, replays: Sequence[Replay], patience_s: float, left_out: dict[str, str]) -> list[Replay]:
    """Those that run, and whose largest step does not take longer than ``patience_s``; its first run may compile."""
    largest = max(stack.batches, key=lambda batch: batch.step.tokens)
    kept = []
    for replay in replays:
        name = replay.choice.name
        try:
            seconds = min(_timed(replay, largest) for _ in range(2))
        except BackendFailedError as error:
            if _own(name):
                raise
            left_out[name] = f"failed: {error}"
            continue
        if seconds > patience_s and replay.choice != OWN:
            left_out[name] = f"takes {seconds:.1f} s for the largest step: runs where it is named"
        else:
            kept.append(replay)
    return kept


def _rehearsed(
    field: Field, stack: Stack, replays: Sequence[Replay], judge: Judge, left_out: dict[str, str]
) -> tuple[list[Replay], dict[str, Counter[str]]]:
    """Serve all steps once, untimed, so that everything is compiled, and judge what comes out.

    Another library that computes something else is left out; one of isokern's own raises.
    """
    witnesses = {replay.choice.name: judge.witness(replay.choice) for replay in replays}
    ran = {replay.choice.name: Counter[str]() for replay in replays}
    apart: dict[str, list[str]] = {replay.choice.name: [] for replay in replays}
    decided: dict[tuple[str, Problem], Decision] = {}
    for replay in replays:
        replay.reset()
    for index, batch in enumerate(stack.batches):
        first = None
        for replay in replays:
            name = replay.choice.name
            problem = field.problem(batch.step, field.mode(batch.step) if replay.graphed else Policy.EAGER)
            if (name, problem) not in decided:
                decided[name, problem] = _decision(replay.choice, batch.step, problem)
                witnesses[name].ran(decided[name, problem].backend, decided[name, problem].config)
            ran[name][_words(decided[name, problem])] += 1
            replay.admit(batch.step)
            outputs = replay.run(batch)
            witnesses[name].see(index, outputs, replay.pools)
            if first is None:
                first = [output.clone() for output in outputs]
            elif not apart[name]:
                apart[name] = [f"step {index}: {fault}" for fault in differing_outputs(batch, outputs, first)]
    wrong = {}
    for replay in replays:
        name = replay.choice.name
        found = witnesses[name].faults()
        if replays[0].choice.name not in wrong:  # else the others are right not to agree with it
            found += apart[name] + differing_states(stack, replay.pools, replays[0].pools)
        if found:
            wrong[name] = found
    own = {name: found for name, found in wrong.items() if _own(name)}
    if own:
        raise MismatchError(own)
    for name, found in wrong.items():
        left_out[name] = f"computes something else: {found[0]}"
    return [replay for replay in replays if replay.choice.name not in wrong], ran


def _decision(choice: Choice, step: Step, problem: Problem) -> Decision:
    with choice.forced(step):
        return registry.default.dispatcher(OP).decide(problem, None)


def _words(decision: Decision) -> str:
    return f"{decision.backend}[{Config.from_dict(decision.config).label}] by {decision.rule.value}"


def _race(stack: Stack, replays: Sequence[Replay], rounds: int, seed: int) -> dict[str, tuple[tuple[float, ...], ...]]:
    """Seconds by choice, round and step: a few steps on every choice, in random order, then the next few."""
    shuffle = random.Random(seed)
    found: dict[str, list[tuple[float, ...]]] = {replay.choice.name: [] for replay in replays}
    for _ in range(rounds):
        for replay in replays:
            replay.reset()
        seconds: dict[str, list[float]] = {replay.choice.name: [] for replay in replays}
        gc.collect()
        gc.disable()
        try:
            for turn in range(0, len(stack.batches), _TURN):
                for replay in shuffle.sample(replays, len(replays)):
                    batches = stack.batches[turn : turn + _TURN]
                    seconds[replay.choice.name] += [_timed(replay, batch) for batch in batches]
        finally:
            gc.enable()
        for name, of_round in seconds.items():
            found[name].append(tuple(of_round))
    return {name: tuple(of_rounds) for name, of_rounds in found.items()}
