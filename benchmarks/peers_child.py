"""One implementation on the cells, in a process of its own; says what it finds as lines of JSON.

`{"begin": case}` before each cell, `{"row": {...}}` after it. What ends the process ends one cell only.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers_cells import SETS, Cell
from peers_judge import SAME_JOB, Truth

from isokern import registry
from isokern.autotune.candidates import admit
from isokern.autotune.recipe import ProblemRecipe
from isokern.autotune.tuner import Task, default_settings, known
from isokern.autotune.warmup import HOOKS, PlannedProblem, WarmupPlan, arch_of, run_warmup
from isokern.backends.external.adapter import Adapter
from isokern.cache import Layer, Store
from isokern.errors import IsokernError
from isokern.registry.backend import Backend, Chunked, Config
from isokern.registry.conformance.gate import gate
from isokern.registry.conformance.subject import chunk_of
from isokern.registry.decision import Decision, Rejected, Verdict
from isokern.registry.ops.fused_sigmoid_gating.call import Call
from isokern.registry.ops.fused_sigmoid_gating.concrete import adversarial_twin
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import Judgement
from isokern.registry.ops.fused_sigmoid_gating.problem import Problem
from isokern.registry.ops.fused_sigmoid_gating.timing import bytes_moved, rotated_calls, with_room
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call
from isokern.registry.plugins import checked
from isokern.tools.gpu_test.report import timing_row
from isokern.tools.gpu_test.timing import Replay, copy_bandwidth, eager_us, launches_for, race

__all__ = [
    "MODES",
    "OP",
    "OWN",
    "Bench",
    "bound_for",
    "measure_cells",
    "only_own",
    "own_decision",
    "verdict_on",
    "warm_up",
]

OP = "fused_sigmoid_gating"
#: The registry's own choice.
OWN = "isokern"
#: Launch modes, in the order they are tuned.
MODES = ("graph", "eager")
#: Rounds of every config, of the best few, and of what takes longer than a display needs.
_GLANCE, _ROUNDS, _SLOW_ROUNDS = 3, 15, 5
_BEST = 3
#: Configs of a backend that pass the gate on the cells that are only gated.
_GATED = 2
#: Microseconds of a call beyond which fewer calls and rounds are as good.
_SLOW = 2000.0

#: Bytes that are more than any cache holds.
_NO_CACHE = 256 << 20

Launch = Callable[[Any], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Bound:
    """What an error bound is made for; None: token by token."""

    chunk: int | Chunked | None


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way to run the cell's calls.

    Attributes:
        chunk: what the error bound that a call from the host is held to is made for.
        replayed: of the registry, which may choose otherwise in a CUDA graph: what a replay is held to.
    """

    config: str
    launch: Launch
    calls: Sequence[Any]
    chunk: int | Chunked | None = None
    replayed: Bound | None = None


class Bench:
    """One cell's calls and their truth.

    Args:
        sets: of slots that the calls take turns with.
    """

    def __init__(self, cell: Cell, device: str, sets: int = SETS) -> None:
        self.cell = cell
        self.device = device
        spec = with_room(cell.spec, sets)
        self.kwargs = make_inputs(spec, device=device).kwargs
        self.calls = _with_own_steps(rotated_calls(canonical_call(**self.kwargs), sets))
        self.truth = Truth(self.calls[0])
        self.bytes = bytes_moved(self.calls[0])

    @property
    def floor(self) -> float | None:
        """Microseconds that its bytes take to copy; on a CPU unknown."""
        return self.bytes / copy_bandwidth() if self.device != "cpu" else None

    def with_out(self) -> list[Call]:
        out = torch.empty(self.calls[0].v.shape, dtype=self.calls[0].q.dtype, device=self.device)
        return [call.replace(out=out) for call in self.calls]

    def as_arguments(self) -> list[dict[str, Any]]:
        """The public op's arguments of each call."""
        steps = [{} if c.intermediates is None else {"intermediate_states_buffer": c.intermediates} for c in self.calls]
        return [
            self.kwargs | {"initial_state_indices": call.read_slots} | more
            for call, more in zip(self.calls, steps, strict=True)
        ]

    def replayed(self, candidate: Candidate) -> torch.Tensor:
        """The output of a replayed graph of the first call, which has run before, on restored states."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = candidate.launch(candidate.calls[0])
        self.truth.restore()
        graph.replay()
        self.wait()
        return out.clone()

    # ---- timing

    def seconds_of_one(self, candidate: Candidate) -> float:
        self.wait()
        began = time.perf_counter()
        candidate.launch(candidate.calls[1 % len(candidate.calls)])
        self.wait()
        return time.perf_counter() - began

    def wait(self) -> None:
        if self.device != "cpu":
            torch.cuda.synchronize()

    def graph_us(self, candidates: dict[str, Candidate], rounds: int, slow: bool) -> dict[str, float]:
        """Medians of graph replays, raced; none on a CPU."""
        if self.device == "cpu":
            return {}
        floor = self.floor
        assert floor is not None
        launches = 2 if slow else launches_for(floor, len(self.calls))
        replays = {label: Replay(c.launch, c.calls, launches) for label, c in candidates.items()}
        return race(replays, min(rounds, _SLOW_ROUNDS) if slow else rounds)

    def eager_us(self, candidate: Candidate, slow: bool) -> float:
        if self.device != "cpu":
            return eager_us(candidate.launch, candidate.calls, *((4, 3) if slow else (40, 5)))
        taken = []
        for i in range(9):
            began = time.perf_counter()
            candidate.launch(candidate.calls[i % len(candidate.calls)])
            taken.append((time.perf_counter() - began) * 1e6)
        return statistics.median(taken)


def _with_own_steps(calls: Sequence[Call]) -> tuple[Call, ...]:
    """Calls that keep intermediate states, with buffers by turns that no cache holds together; others as they are."""
    buffer = calls[0].intermediates
    if buffer is None:
        return tuple(calls)
    turns = min(len(calls), -(-_NO_CACHE // max(1, buffer.numel() * buffer.element_size())))
    buffers = [buffer, *(torch.empty_like(buffer) for _ in range(turns - 1))]
    made = []
    for i, call in enumerate(calls):
        other = call.replace(intermediates=buffers[i % turns])
        if call.lengths_on_host:
            other.__dict__["offsets"] = call.offsets
        made.append(other)
    return tuple(made)


def measure_cells(
    who: str, cells: Sequence[Cell], device: str, first: int | None, store: Path | None, say: Callable[[Any], None]
) -> None:
    """A row for each cell; nothing is timed before it was judged. isokern chooses under the policy in force."""
    if store is not None:
        registry.use_store(Store([Layer("explicit", store, writable=True)]))
    if who == OWN:
        only_own()
    for cell in cells:
        say({"begin": cell.case})
        began = time.monotonic()
        try:
            row = _measure(who, cell, device, first)
        except (IsokernError, RuntimeError, ValueError, TypeError, AssertionError) as error:
            row = _blank(cell, who, "failed", f"{type(error).__name__}: {error}")
            if _device_is_lost(device):
                row["extra"]["status"] = "crashed"
        row["extra"] |= {"group": cell.group, "seconds": round(time.monotonic() - began, 1)}
        if row["extra"]["status"] == "crashed":
            say({"row": row})
            raise SystemExit(3)  # nothing more can be done on the device from this process
        if device != "cpu":
            row["extra"]["copy_TB_s"] = round(copy_bandwidth() / 1e6, 3)
            torch.cuda.empty_cache()
        say({"row": row})


def _device_is_lost(device: str) -> bool:
    """Whether an illegal access or the like has ended this process's use of the GPU."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def only_own() -> None:
    """The registry without other libraries: isokern's choice is among its own kernels."""
    for name, backend in tuple(registry.backends(OP).items()):
        if isinstance(backend, Adapter):
            registry.unregister_backend(OP, name)


def _blank(cell: Cell, who: str, status: str, fault: str) -> dict[str, Any]:
    return timing_row(cell.case, who, backend=None if who == OWN else who, status=status, faults=[fault[:600]])


def _measure(who: str, cell: Cell, device: str, first: int | None) -> dict[str, Any]:
    if who != OWN:
        verdict = verdict_on(registry.backends(OP)[who], cell, device)
        if isinstance(verdict, Rejected):
            return _blank(cell, who, "declined", f"[{verdict.code}] {verdict.reason}")
    with torch.no_grad():
        if cell.group == "gate":
            return _gated(who, cell, device)
        bench = Bench(cell, device)
        if who == OWN:
            return _own_choice(bench)
        return _configs_of(registry.backends(OP)[who], bench, first)


def _gated(who: str, cell: Cell, device: str) -> dict[str, Any]:
    """Every config through the tuner's gate."""
    backend = registry.backends(OP)[who]
    arch = arch_of(registry.default.environment(device))
    problem = describe(cell.spec, torch.device(device).type, arch)
    found = {c.label: gate(OP, backend, c, cell.spec, device=device) for c in backend.configs(problem)[:_GATED]}
    faults = [f"[{label}] {result.code}: {result.reason}"[:600] for label, result in found.items() if not result]
    ratios = {label: str(result.worst_ratio) for label, result in found.items()}
    status = "not conforming" if faults else "conforms"
    return timing_row(cell.case, who, backend=who, status=status, faults=faults, bound_ratio=ratios)


def verdict_on(backend: Backend, cell: Cell, device: str) -> Verdict:
    """What ``backend`` says to the cell's problem, before any tensor is made."""
    arch = arch_of(registry.default.environment(device))
    return checked(backend, describe(cell.spec, torch.device(device).type, arch, bound_for(backend, device)))


def bound_for(backend: Backend, device: str) -> Any:
    """The launch mode to bind ``backend`` for.

    Libraries decline a capture because of their first call; here it is made before one.
    """
    return "eager" if isinstance(backend, Adapter) else _mode(device)


def _mode(device: str) -> Any:
    return "eager" if device == "cpu" else "graph"


def own_decision(call: Call, device: str) -> tuple[Problem, Decision]:
    """The problem of ``call`` under the policy in force, and what the registry chose for it in graphs (CPU: eager)."""
    dispatcher = registry.get(OP).dispatcher
    problem = dispatcher.under_policy(call.problem(_mode(device)))
    return problem, dispatcher.decide(problem)


def _own_choice(bench: Bench) -> dict[str, Any]:
    op = registry.get(OP)
    arguments = bench.as_arguments()
    op.prepare(**arguments[0])
    problem, decision = own_decision(bench.calls[0], bench.device)
    decisions = {_mode(bench.device): decision, "eager": op.dispatcher.decide(problem.with_mode("eager"))}
    # Both are judged: a call from the host, and where there are graphs a replay, which may be another kernel.
    bounds = {mode: chunk_of(registry.backends(OP)[d.backend], _config(d)) for mode, d in decisions.items()}
    replayed = Bound(bounds["graph"]) if "graph" in bounds else None
    chosen = Candidate("", lambda given: op(**given), arguments, bounds["eager"], replayed)
    row, judged = _timed(bench, OWN, {"": chosen})
    if "by_host" in judged.get("", {}):
        by_host = decisions["eager"]
        row["extra"]["by_host"] = judged[""]["by_host"] | {"backend": by_host.backend, "config": _config(by_host).label}
    row |= {"backend": decision.backend, "config": _config(decision).label}
    row["extra"]["rules"] = {mode: f"{d.rule.value}: {d.backend}" for mode, d in decisions.items()}
    row["extra"]["accuracy"] = problem.accuracy
    return row


def _config(decision: Decision) -> Config:
    return Config.from_dict(decision.config)


def _configs_of(backend: Backend, bench: Bench, first: int | None) -> dict[str, Any]:
    problem = bench.calls[0].problem(bound_for(backend, bench.device))
    configs = list(backend.configs(problem))[:first]
    # A library's own tensor is what its users get; isokern's kernels write where they are told.
    calls: Sequence[Call] = bench.with_out()
    if isinstance(backend, Adapter):
        configs += backend.shortcuts(problem)
        calls = bench.calls
    candidates: dict[str, Candidate] = {}
    faults = []
    for config in configs:
        try:
            run = backend.bind(problem, config)
            candidates[config.label] = Candidate(config.label, run, calls, chunk_of(backend, config))
        except IsokernError as error:
            faults.append(str(error)[:600])
    row, judged = _timed(bench, backend.name, candidates)
    row["extra"]["faults"] = faults + row["extra"]["faults"]
    row["backend"] = backend.name
    row["extra"]["judged"] = judged
    return row


def _found(verdict: Judgement) -> dict[str, Any]:
    return {"error": verdict.rel_o, "conforms": verdict.ok, "faults": list(verdict.faults)}


def _timed(bench: Bench, who: str, candidates: dict[str, Candidate]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The best of the candidates that do the cell's job; and what was found of each."""
    judged: dict[str, Any] = {}
    faults: list[str] = []
    right: dict[str, Candidate] = {}
    slow = False
    for label, candidate in candidates.items():
        bench.truth.restore()
        try:
            verdicts = [bench.truth.judge(candidate.launch(candidate.calls[0]), candidate.chunk)]
            if candidate.replayed is not None:
                verdicts.append(bench.truth.judge(bench.replayed(candidate), candidate.replayed.chunk))
        except IsokernError as error:
            faults.append(str(error)[:600])
            continue
        *by_host, judged[label] = map(_found, verdicts)  # of what is timed by graph, the replay's
        if by_host:
            judged[label]["by_host"] = by_host[0]
        wrong = [v for v in verdicts if not (v.rel_o <= SAME_JOB and (v.ok or who != OWN))]
        for verdict in wrong:
            faults.append(
                f"[{label}]: not the same job, relative error {verdict.rel_o:.3g}; {'; '.join(verdict.faults)}"
            )
        if not wrong:
            right[label] = candidate
    if not right:
        return timing_row(bench.cell.case, who, status="wrong", faults=faults), judged
    slow = min(bench.seconds_of_one(c) for c in right.values()) * 1e6 > _SLOW
    times: dict[str, float] = {}
    try:
        times = bench.graph_us(right, _GLANCE if len(right) > 1 else _ROUNDS, slow)
        if len(right) > 1 and times:
            few = sorted(times, key=lambda label: times[label])[:_BEST]
            times |= bench.graph_us({label: right[label] for label in few}, _ROUNDS, slow)
    except (IsokernError, RuntimeError) as error:
        faults.append(f"CUDA graph: {type(error).__name__}: {error}"[:600])
    by_host = {label: bench.eager_us(c, slow) for label, c in right.items()} if not times else {}
    ranked = times or by_host
    best = min(ranked, key=lambda label: ranked[label])
    eager = by_host.get(best)
    row = timing_row(
        bench.cell.case,
        who,
        config=best or None,
        graph_us=round(times[best], 2) if best in times else None,
        eager_us=round(bench.eager_us(right[best], slow) if eager is None else eager, 1),
        floor_us=None if bench.floor is None else round(bench.floor, 2),
        error=judged[best]["error"],
        status="timed" if times or bench.device == "cpu" else "no graph",
        conforms=judged[best]["conforms"],
        faults=faults,
        configs={label: round(us, 2) for label, us in ranked.items()},
    )
    return row, judged


def warm_up(
    cells: Sequence[Cell],
    device: str,
    store: Path,
    budget: float | None,
    say: Callable[[Any], None],
    modes: Sequence[str] = MODES,
) -> None:
    """Tune the cells' problems, without other libraries, into ``store``; what is known there is not tuned again.

    Under the policy in force, as the calls will be. ``modes``: launch modes to tune for.
    """
    only_own()
    kept = Store([Layer("explicit", store, writable=True)])
    registry.use_store(kept)
    own = registry.default
    environment = own.environment(device)
    planned = list(_planned(cells, device, environment, kept, modes))
    plan = WarmupPlan(
        (("peers", 1),), device, environment.threads or 1, tuple(planned), environment, own, kept,
        default_settings(device), "none",
    )  # fmt: skip
    report = run_warmup(plan, check=False, budget_s=budget)
    for problem in report.problems:
        chosen = problem.error if problem.entry is None else problem.entry.label
        what = f"{problem.planned.task.recipe.mode} {problem.planned.cases[0]}"
        say({"note": f"{what}: {chosen} ({problem.seconds:.1f} s)"})
    say({"note": f"warm-up: {len(report.problems)} problems, {len(report.skipped)} left, {report.seconds:.0f} s"})


def _planned(
    cells: Sequence[Cell], device: str, environment: Any, store: Store, modes: Sequence[str] = MODES
) -> Iterator[PlannedProblem]:
    """By graph, all cells; then from the host, those whose time so has a goal, and on a CPU all."""
    under = registry.default.dispatcher(OP).policy()
    seen = set()
    on_cpu = device == "cpu"
    for mode in (mode for mode in MODES if mode in modes and not (on_cpu and mode == "graph")):
        for cell in cells:
            if mode == "eager" and not on_cpu and not cell.eager_counts:
                continue
            recipe = ProblemRecipe(OP, cell.spec, adversarial_twin(cell.spec, 1), HOOKS, 0, device, mode, under)
            problem = describe(cell.spec, torch.device(device).type, arch_of(environment), mode, under)
            task = Task(recipe, problem)
            if (key := frozenset(task.key.items())) in seen:
                continue
            seen.add(key)
            admission = admit(registry.default, OP, problem)
            hit = known(registry.default, store, environment, task, admission)
            entry = hit.entry if hit else None
            yield PlannedProblem(
                task, (cell.case,), len(admission.candidates), len(admission.declined), entry, 0.0 if hit else 10.0
            )


def emit(line: Any) -> None:
    """One line of JSON on stdout, at once and in one piece: a profiler may be writing there as well."""
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()
