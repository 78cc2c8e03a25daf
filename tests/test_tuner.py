"""From planted backends to a published entry: nothing wrong wins, nothing finished is done twice."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isokern.autotune.candidates import admit
from isokern.autotune.contest import Contest
from isokern.autotune.examine import GatePolicy
from isokern.autotune.policy import MeasurePolicy, RacePolicy, ScreenPolicy, TunePolicy
from isokern.autotune.progress import Progress
from isokern.autotune.prove import prove
from isokern.autotune.recipe import ProblemRecipe
from isokern.autotune.select import select
from isokern.autotune.simulate import Noise, SyntheticDevice
from isokern.autotune.tuner import (
    NothingProvenError,
    Settings,
    Shared,
    Task,
    Workers,
    journal_path,
    known,
    tune_problem,
)
from isokern.autotune.worker import CandidateFailure, Limits, WorkerError
from isokern.cache import Layer, Store
from isokern.registry.core import Registry
from isokern.registry.decision import RejectCode, Rejected
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.concrete import adversarial_twin
from isokern.registry.ops.fused_sigmoid_gating.describe import describe

OP = "fused_sigmoid_gating"
HOOKS = f"isokern.registry.ops.{OP}.timing"
PLANTED = Path(__file__).with_name("planted_backends.py")
TINY = CaseSpec("tiny", (3, 5, 2), h=1, hv=2, k=8, v=8, as_layout=True)
SETTINGS = Settings(
    TunePolicy(
        screen=ScreenPolicy(first_samples=3),
        # A restless machine must not decide whether these tests pass.
        race=RacePolicy(rounds=(5, 5), sentinel_drift=0.99, wall_cap_s=3.0),
        measure=MeasurePolicy(min_sample_us=50.0),
    ),
    GatePolicy(max_token_heads=1 << 16, hopeless_ratio=10.0),  # nor spare a fault the gate for a moment's stall
    Limits(call=2.0, gate=30.0),
)


def load_planted():
    spec = importlib.util.spec_from_file_location("planted_backends", PLANTED)
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_backends"] = module
    spec.loader.exec_module(module)
    return module


planted = load_planted()


def registry_of(*kinds) -> Registry:
    """Only the planted backends: a tuner's tests must not depend on how fast the real ones are."""
    registry = Registry(load_plugins=False)
    for name in tuple(registry.backends(OP)):
        registry.unregister_backend(OP, name)
    for kind in kinds:
        registry.register_backend(kind())
    return registry


def task_of(case: CaseSpec = TINY) -> Task:
    return Task(ProblemRecipe(OP, case, adversarial_twin(case), HOOKS), describe(case, "cpu"))


def store_at(path: Path) -> Store:
    return Store([Layer("explicit", path, writable=True)])


class Tuning:
    """One registry, one store, workers that are shared by the module's tests."""

    def __init__(self, registry: Registry, root: Path, workers: Workers) -> None:
        self.registry = registry
        self.root = root
        self.store = store_at(root)
        self.workers = workers
        self.environment = registry.environment("cpu")

    def tune(
        self,
        task: Task | None = None,
        progress: Progress | None = None,
        settings: Settings = SETTINGS,
        shared: Shared | None = None,
    ):
        return tune_problem(
            task or task_of(),
            registry=self.registry,
            store=self.store,
            environment=self.environment,
            workers=self.workers,
            settings=settings,
            progress=progress,
            shared=shared,
        )

    def journal(self) -> list[dict]:
        path = journal_path(self.store, self.environment, OP, 1, task_of().key)
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@pytest.fixture(scope="module")
def workers():
    registry = Registry(load_plugins=False)
    with Workers("cpu", registry.environment("cpu").threads, SETTINGS.limits) as workers:
        yield workers


# ---- nothing wrong can win

FAULTS = {
    "wrong_head": {RejectCode.WRONG},
    "wrong_later": {RejectCode.NOT_REPEATABLE},
    "nan_tail": {RejectCode.NON_FINITE},
    "hangs": {RejectCode.TIMEOUT},
    "exits": {RejectCode.CRASH},
    "prints_and_exits": {RejectCode.CRASH},
    "raises": {RejectCode.RAISED},
    "fails_to_bind": {RejectCode.COMPILE},
    "segfaults": {RejectCode.CRASH},
    "modifies_input": {RejectCode.INPUT_MODIFIED},
    "writes_foreign_slot": {RejectCode.CANARY},
    "fast_and_wrong": {RejectCode.WRONG},
}


@pytest.fixture(scope="module")
def faulty(workers, tmp_path_factory):
    kinds = [kind for kind in planted.Planted.__subclasses__() if kind.name in FAULTS]
    tuning = Tuning(registry_of(planted.Honest, *kinds), tmp_path_factory.mktemp("faulty"), workers)
    return tuning.tune()


@pytest.mark.parametrize("name", FAULTS)
def test_each_fault_is_rejected_with_its_code_and_a_reason(faulty, name):
    [record] = [c for c in faulty.candidates if c.backend == name]
    assert record.status == "rejected"
    assert RejectCode(record.code) in FAULTS[name], record.reason
    assert record.reason


def test_the_honest_backend_wins_however_fast_the_wrong_ones_are(faulty):
    assert faulty.backend == "honest"
    assert faulty.chosen.tags == ("conformant", "repeatable")


def test_two_crashes_quarantine_a_candidate(faulty):
    [record] = [c for c in faulty.candidates if c.backend == "segfaults"]
    assert "2 times, so quarantined" in record.reason
    assert "SIGSEGV" in record.reason


def test_a_crowd_of_crashing_candidates_costs_the_others_no_sample(faulty):
    assert len(faulty.chosen.samples_us) == SETTINGS.policy.screen.first_samples


def test_nothing_is_published_when_nothing_is_proven(workers, tmp_path):
    tuning = Tuning(registry_of(planted.FastAndWrong), tmp_path, workers)
    with pytest.raises(NothingProvenError, match="fast_and_wrong") as caught:
        tuning.tune()
    assert [(name, code) for name, code, _ in caught.value.rejections] == [("fast_and_wrong[default]", "wrong")]
    assert not list(tuning.store.entries())


# ---- what wins


def test_a_correct_and_much_faster_third_party_wins_and_a_fresh_process_dispatches_it(workers, tmp_path):
    tuning = Tuning(registry_of(planted.Sluggish, planted.Swift), tmp_path, workers)
    entry = tuning.tune()
    assert entry.backend == "swift"
    assert entry.margin_over_default > 1.0
    [proof] = prove(tuning.store, tuning.registry, [(task_of().recipe, entry)], threads=tuning.environment.threads)
    assert proof.ok, proof.error
    assert proof.rule == "tuned-user"

    # The proof can fail: here the entry is not in the store that the fresh process opens.
    elsewhere = store_at(tmp_path / "empty")
    [proof] = prove(elsewhere, tuning.registry, [(task_of().recipe, entry)], threads=tuning.environment.threads)
    assert not proof.ok
    assert "not by the store" in proof.error


class SimulatedWorker:
    """Stands for the timing worker: answers its requests from a synthetic device."""

    def __init__(self, times: dict[str, float], floor_s: float = 0.0) -> None:
        self.device = SyntheticDevice(times, Noise(outlier_rate=0.0), seed=3)
        self.limits = Limits()
        self.alive, self.pid = False, None
        self.floor_s = floor_s
        self.crashes: dict[str, int] = {}

    def request(self, do, limit_s, **arguments):
        self.alive, self.pid = True, self.pid or 1
        if do == "load":
            return {"key": KEY}
        if do == "bench":
            return {"floor_s": self.floor_s, "method": "simulated"}
        if do == "floor":
            return {"floor_s": self.floor_s}
        if do == "bind":
            return {"fingerprint": "f"}
        assert do == "time_block"
        for name in arguments["names"]:
            if self.crashes.get(name, 0):
                self.crashes[name] -= 1
                raise CandidateFailure(Rejected(RejectCode.CRASH, "the worker died"), name, died=True)
        seconds = {name: self.device.time(name) for name in arguments["names"]}
        return {
            "seconds": seconds,
            "launches": dict.fromkeys(seconds, 1),
            "sentinel_s": 1e-3,
            "wall_s": sum(seconds.values()),
        }

    def kill(self):
        self.alive, self.pid = False, (self.pid or 1) + 1


KEY = {"the": "problem"}


def contest_between(worker, *kinds, protected=(), events=(), record=None):
    candidates = [replace(c, fingerprint="f") for c in admit(registry_of(*kinds), OP, task_of().problem).candidates]
    recorded = [] if record is None else record
    contest = Contest(
        worker, task_of().recipe, KEY, candidates, protected, TunePolicy(), Progress(), events, recorded.append
    )
    return contest, recorded


def name_of(kind) -> str:
    return f"{kind.name}[default]"


@pytest.mark.parametrize(("gain", "winner"), [(0.01, planted.Honest), (0.2, planted.Swift)])
def test_a_challenger_must_be_clearly_faster(gain, winner):
    times = {name_of(planted.Honest): 1e-3, name_of(planted.Swift): 1e-3 / (1 + gain)}
    contest, _ = contest_between(
        SimulatedWorker(times), planted.Honest, planted.Swift, protected=[name_of(planted.Honest)]
    )
    assert select(contest.run().raced, default=name_of(planted.Honest)).winner == name_of(winner)


def test_one_that_is_faster_than_memory_is_impossible():
    times = {name_of(planted.Honest): 1e-3, name_of(planted.Swift): 1e-5}
    contest, _ = contest_between(SimulatedWorker(times, floor_s=1e-4), planted.Honest, planted.Swift)
    standing = contest.run()
    assert standing.failed[name_of(planted.Swift)].code is RejectCode.IMPOSSIBLE
    assert standing.raced.survivors == (name_of(planted.Honest),)


def test_one_crash_while_timing_is_forgiven_and_two_are_not():
    times = {name_of(planted.Honest): 1e-3, name_of(planted.Swift): 0.9e-3}
    worker = SimulatedWorker(times)
    worker.crashes = {name_of(planted.Honest): 1, name_of(planted.Swift): 2}
    standing = contest_between(worker, planted.Honest, planted.Swift)[0].run()
    assert set(standing.failed) == {name_of(planted.Swift)}
    assert standing.failed[name_of(planted.Swift)].code is RejectCode.CRASH
    assert len(standing.screened.samples[name_of(planted.Honest)]) == TunePolicy().screen.first_samples


# ---- nothing finished is done twice


class Killed(Exception):
    pass


class KilledAfter:
    """A record that takes ``events`` and then dies, as a process would."""

    def __init__(self, events: int) -> None:
        self.left = events
        self.kept: list[dict] = []

    def append(self, event) -> None:
        if self.left == 0:
            raise Killed
        self.left -= 1
        self.kept.append(json.loads(json.dumps(event)))


def test_a_contest_killed_anywhere_continues_after_its_last_block():
    times = {name_of(planted.Honest): 1e-3, name_of(planted.Swift): 0.985e-3}
    contest, full = contest_between(SimulatedWorker(times), planted.Honest, planted.Swift)
    contest.run()
    assert len(full) > 20
    for cut in (1, 4, 6, 7, 15):
        record = KilledAfter(cut)
        contest, _ = contest_between(SimulatedWorker(times), planted.Honest, planted.Swift, record=record)
        with pytest.raises(Killed):
            contest.run()
        contest, rest = contest_between(SimulatedWorker(times), planted.Honest, planted.Swift, events=record.kept)
        standing = contest.run()
        blocks = sum("block" in e for e in (*record.kept, *rest))
        assert blocks == len(standing.raced.table) + standing.raced.discarded
        passes = sum("pass" in e for e in (*record.kept, *rest))
        assert passes == TunePolicy().screen.first_samples + 1
        assert standing.launches == 2 * (blocks + passes)


_TUNE = """
import sys, torch
torch.set_num_threads({threads})  # as in this process: the number is part of the environment
sys.path.insert(0, {tests!r})
import importlib.util
spec = importlib.util.spec_from_file_location("tests_of_tuner", {file!r})
module = importlib.util.module_from_spec(spec)
sys.modules["tests_of_tuner"] = module
spec.loader.exec_module(module)
from pathlib import Path
module.tune_slowly(Path(sys.argv[1]))
"""


class Announcing(Progress):
    def advance(self, detail: str) -> None:
        print("step", detail, flush=True)


def slow_settings() -> Settings:
    race = RacePolicy(rounds=(40,), sentinel_drift=0.99, wall_cap_s=30.0)
    # However restless the machine, both candidates reach the race.
    screen = ScreenPolicy(first_samples=3, drop_ratio=1e3, abandon_ratio=1e4)
    policy = replace(SETTINGS.policy, race=race, screen=screen)
    return replace(SETTINGS, policy=policy, gate=replace(SETTINGS.gate, hopeless_ratio=1e4))


def tune_slowly(root: Path, progress: Progress | None = None):
    """A race of two near equals that takes its time; run in a process of its own that gets killed."""
    registry = registry_of(planted.Honest, planted.Swift)
    with Workers("cpu", registry.environment("cpu").threads, SETTINGS.limits) as workers:
        return Tuning(registry, root, workers).tune(progress=progress or Announcing(), settings=slow_settings())


def test_a_run_killed_with_sigkill_resumes_from_its_journal(tmp_path, workers):
    code = _TUNE.format(tests=str(PLANTED.parent), file=__file__, threads=torch.get_num_threads())
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    blocks = 0
    for line in process.stdout:
        blocks += " left" in line
        if blocks == 10:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    process.stdout.close()

    tuning = Tuning(registry_of(planted.Honest, planted.Swift), tmp_path, workers)
    before = tuning.journal()
    kinds = [r["kind"] for r in before]
    assert kinds.count("verdict") == 2
    blocks_before = sum("block" in r.get("event", {}) for r in before)
    assert blocks_before >= 9

    examined = workers.examiner.spawned
    workers.examiner.kill()
    entry = tuning.tune(settings=slow_settings())
    assert workers.examiner.spawned == examined, "every verdict was in the journal"
    assert entry.backend in ("honest", "swift")
    samples = len(entry.chosen.samples_us)
    assert samples >= blocks_before - 1, "the blocks from before the kill are among the samples"
    assert tuning.journal() == [], "published, so there is nothing to resume"


def test_what_is_published_is_known_and_starts_no_worker(tmp_path, workers):
    tuning = Tuning(registry_of(planted.Honest), tmp_path, workers)
    first = tuning.tune()
    with Workers("cpu", 1) as none:
        again = Tuning(tuning.registry, tmp_path, none)
        assert again.tune() == first
        assert none.spawned == 0


def test_a_new_backend_reopens_the_problem_and_the_old_verdicts_stand(tmp_path, workers):
    first = Tuning(registry_of(planted.Sluggish, planted.FastAndWrong), tmp_path, workers)
    old = first.tune()
    assert old.backend == "sluggish"

    class Steps(Progress):
        gated = ()

        def advance(self, detail: str) -> None:
            self.gated += (detail,) if "proven" in detail or "wrong" in detail else ()

    steps = Steps()
    second = Tuning(registry_of(planted.Sluggish, planted.FastAndWrong, planted.Swift), tmp_path, workers)
    admission = admit(second.registry, OP, task_of().problem)
    assert known(second.registry, second.store, second.environment, task_of(), admission) is None
    new = second.tune(progress=steps)
    assert steps.gated == ("swift[default]: proven",), "only what is new was gated"
    assert new.backend == "swift"
    assert {c.backend: c.code for c in new.candidates}["fast_and_wrong"] == "wrong"


def test_the_tunings_of_one_run_gate_a_candidate_once(tmp_path, workers, monkeypatch):
    """A second tuning of the same values, as in another launch mode: what was proven is called and timed again."""
    asked = []
    request = workers.examiner.request

    def noted(do, limit_s, **arguments):
        asked.append((do, arguments.get("name", "").partition("[")[0]))
        return request(do, limit_s, **arguments)

    monkeypatch.setattr(workers.examiner, "request", noted)
    shared = Shared()
    kinds = (planted.Honest, planted.Swift, planted.FastAndWrong)
    one, other = (Tuning(registry_of(*kinds), tmp_path / name, workers) for name in ("one", "other"))
    one.tune(shared=shared)
    assert {name for do, name in asked if do == "gate"} == {"honest", "swift", "fast_and_wrong"}
    assert {name for _, name, _ in shared.proven} == {"honest[default]", "swift[default]"}
    asked.clear()
    entry = other.tune(shared=shared)
    assert {name for do, name in asked if do == "first_call"} == {"honest", "swift", "fast_and_wrong"}
    assert {name for do, name in asked if do == "gate"} == {"fast_and_wrong"}
    assert entry.chosen.tags == ("conformant", "repeatable")


def test_what_was_slow_by_graph_is_not_called_eagerly(tmp_path, workers):
    by_graph = Task(replace(task_of().recipe, mode="graph"), describe(TINY, "cpu", 0, "graph"))
    settings = replace(SETTINGS, gate=replace(SETTINGS.gate, hopeless_ratio=1.5, settings=0))
    tuning, shared = Tuning(registry_of(planted.Honest, planted.SluggishRival), tmp_path, workers), Shared()
    with pytest.raises(WorkerError, match="expected eager on a CPU"):  # after first calls, which are made in any mode
        tuning.tune(by_graph, settings=settings, shared=shared)
    found = {name: seconds for (_, name, _), seconds in shared.by_graph.items()}
    assert 0 < found["honest[default]"] < found["sluggish_rival[default]"]
    entry = tuning.tune(settings=settings, shared=shared)
    assert {name: seconds for (_, name, _), seconds in shared.by_graph.items()} == found, "an eager launch adds nothing"
    slow = next(c for c in entry.candidates if c.backend == "sluggish_rival")
    assert (slow.code, slow.median_us) == ("slow", None)
    assert slow.reason.startswith("not called: in graphs it takes")


def test_when_the_winner_changes_its_slow_rivals_race_again(tmp_path, workers):
    kinds = (planted.Honest, planted.SluggishRival)
    first = Tuning(registry_of(*kinds), tmp_path, workers)
    old = first.tune()
    assert old.backend == "honest"
    assert {c.backend: c.code for c in old.candidates}["sluggish_rival"] == "slow"

    second = Tuning(registry_of(*kinds), tmp_path, workers)
    changed = planted.Honest()
    changed.toolchain = lambda: {"compiler": "newer"}
    second.registry.register_backend(changed, replace=True)
    entry = second.tune()
    # Workers see the class as it is in its file, so the "newer" kernel is refused there and only the rival is left.
    assert {c.backend: c.code for c in entry.candidates} == {"honest": "compile", "sluggish_rival": None}


def test_a_changed_policy_starts_afresh(tmp_path, workers):
    tuning = Tuning(registry_of(planted.FastAndWrong), tmp_path, workers)
    with pytest.raises(NothingProvenError):
        tuning.tune()
    assert [r["kind"] for r in tuning.journal()] == ["start", "verdict"]
    changed = replace(SETTINGS, gate=GatePolicy(seeds=1, max_token_heads=1 << 16))
    with pytest.raises(NothingProvenError):
        tuning.tune(settings=changed)
    assert [r["kind"] for r in tuning.journal()] == ["start", "verdict"]


def test_declined_backends_are_published_with_their_reason(tmp_path, workers):
    class Declines(planted.Planted):
        name = "declines"

        def check(self, problem):
            return Rejected(RejectCode.FEATURE, "no tiny problems")

    entry = Tuning(registry_of(planted.Honest, Declines), tmp_path, workers).tune()
    [record] = [c for c in entry.candidates if c.backend == "declines"]
    assert (record.status, record.code, record.reason) == ("rejected", "feature", "no tiny problems")


def test_time_is_recorded(faulty):
    assert faulty.measured["seconds"] > 0
    assert faulty.measured["launches"] > 0
    assert faulty.created.timestamp() <= time.time()
