"""Several tuners share a workload: members on this host, ranks under torchrun, actors of Ray, and the logic of it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from isokern.autotune import fleet_cli, fleet_process, fleet_ranks
from isokern.autotune.fleet import member_config, plan_for, run_fleet
from isokern.autotune.fleet_cli import Venue, find_venue, run_on
from isokern.autotune.fleet_member import Member, MemberConfig
from isokern.autotune.fleet_process import ProcessLauncher, Slot, local_slots
from isokern.autotune.fleet_ranks import process_group, run_ranks
from isokern.autotune.fleet_ray import RayLauncher
from isokern.autotune.merge import save_plan, take_over
from isokern.autotune.plain import from_plain
from isokern.autotune.progress import Progress
from isokern.autotune.recipe import ProblemRecipe
from isokern.autotune.report import plan_summary, report_summary
from isokern.autotune.tuner import Settings
from isokern.autotune.warmup import PlannedProblem, plan_shards, shards_of
from isokern.autotune.worker import WorkerError
from isokern.autotune.worth import Kind, deal, kind_of, makespan, most_valuable_first, units
from isokern.cache import Entry, Layer, Plan, Store
from isokern.cache.store import CacheWarning
from isokern.errors import ArgumentValueError

HERE = Path(__file__)
SLOTS = (Slot("left", "cpu", None, "cpu-left"), Slot("right", "cpu", None, "cpu-right"))
CASES = ("decode N=1", "decode N=2", "prefill short 1x8", "verify 2x2")


def load(name: str):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, HERE.with_name(f"{name}.py"))
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


warmup_tests = load("test_warmup")
planted = warmup_tests.planted
plan_at = warmup_tests.plan_at


@pytest.fixture(scope="module", autouse=True)
def locks_of_their_own(tmp_path_factory):
    """A tuner at work on this machine must not make these tests wait."""
    folder = str(tmp_path_factory.mktemp("locks"))
    before, tempfile.tempdir, os.environ["TMPDIR"] = (tempfile.tempdir, os.environ.get("TMPDIR")), folder, folder
    yield
    tempfile.tempdir = before[0]
    if before[1] is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before[1]


# ---- order and shares


@dataclasses.dataclass(frozen=True)
class Batch:
    name: str
    lengths: tuple[int, ...]
    verify: str = "none"


def problem(name, lengths, seconds=1.0, cases=1, mode="eager", entry=None):
    recipe = SimpleNamespace(case=Batch(name, lengths), mode=mode)
    return PlannedProblem(SimpleNamespace(recipe=recipe), (name,) * cases, 1, 0, entry, seconds)


def names(work):
    return [p.cases[0] for unit in work for p in unit.problems]


@pytest.mark.parametrize(
    ("lengths", "verify", "kind"),
    [
        ((1, 1), "none", Kind.DECODE),
        ((), "none", Kind.DECODE),
        ((1, 0, 1), "none", Kind.DECODE),
        ((1, 300), "none", Kind.MIXED),
        ((300, 20), "none", Kind.PREFILL),
        ((4, 4), "chain", Kind.VERIFY),
        ((1, 1), "tree", Kind.VERIFY),
    ],
)
def test_what_a_batch_is_follows_from_its_lengths(lengths, verify, kind):
    assert kind_of(lengths, verify) is kind


def test_what_serving_spends_its_steps_on_comes_first():
    work = units([problem("prompt", (512,), 9), problem("mixed", (1, 512), 5), problem("step", (1, 1), 2)])
    assert names(work) == ["step", "mixed", "prompt"]


def test_of_equal_value_the_longest_comes_first_and_a_problem_of_several_cases_before_both():
    work = units([problem("a", (1,), 2), problem("b", (1, 1), 7), problem("c", (1, 1, 1), 1, cases=2)])
    assert names(work) == ["c", "b", "a"]


def test_the_launch_modes_of_one_case_stay_together_and_known_ones_are_no_work():
    both = [problem("x", (1,), 2, mode=mode) for mode in ("eager", "graph")]
    work = units([*both, problem("y", (1, 1), 3), problem("z", (1,), 3, entry=object())])
    assert [len(unit.problems) for unit in work] == [2, 1]
    assert [p.task.recipe.mode for p in work[0].problems] == ["graph", "eager"]
    assert work[0].seconds == 4


def test_known_problems_stay_in_front_in_their_order():
    problems = [
        problem("p", (9,)),
        problem("k2", (1,), entry=object()),
        problem("d", (1,)),
        problem("k1", (1,), entry=1),
    ]
    assert [p.cases[0] for p in most_valuable_first(problems)] == ["k2", "k1", "d", "p"]


def test_hands_are_dealt_to_whoever_has_least():
    work = units([problem(name, (1,) * 4, seconds) for name, seconds in zip("abcde", (5, 4, 3, 3, 1), strict=True)])
    hands = deal(work, 2)
    assert [names(hand) for hand in hands] == [["a", "d"], ["b", "c", "e"]]
    assert makespan(work, 2) == 8
    assert makespan(work, 1) == 16
    assert makespan((), 3) == 0
    assert deal(work[:1], 3)[1:] == ((), ())


def test_settings_survive_the_journey():
    there = json.loads(json.dumps(dataclasses.asdict(warmup_tests.SETTINGS)))
    assert from_plain(Settings, there) == warmup_tests.SETTINGS
    with pytest.raises(TypeError, match="no fields surprise"):
        from_plain(Settings, {"surprise": 1})


def test_this_hosts_slots():
    assert local_slots("cpu") == (Slot("cpu", "cpu", None, "cpu"),)
    with pytest.raises(ArgumentValueError, match="one CPU"):
        local_slots("cpu", (0, 1))
    with pytest.raises(ArgumentValueError, match="CUDA devices of this host"):
        local_slots("cuda", (99,))


# ---- two members of this host


class Spying(ProcessLauncher):
    """Remembers who was sent what."""

    def __init__(self, *args):
        super().__init__(*args)
        self.sent: list[tuple[int, str, tuple[str, ...]]] = []
        self.killed: list[int] = []
        self.kill_first = False

    def submit(self, member, do, **arguments):
        self.sent.append((member, do, tuple(r["case"]["name"] for r in arguments.get("recipes", ()))))
        super().submit(member, do, **arguments)
        if do == "tune" and self.kill_first and not self.killed:
            self.killed.append(member)
            self._processes[member].kill()


class Notes(Progress):
    def __init__(self):
        self.lines = []

    def note(self, text):
        self.lines.append(text)


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    root = tmp_path_factory.mktemp("fleet")
    plan = plan_at(root, CASES, kinds=(planted.Honest, planted.FastAndWrong))
    launcher = Spying(SLOTS, member_config(plan))
    return root, plan, launcher, run_fleet(plan, launcher)


def test_both_members_take_part_and_each_problem_is_tuned_once(shared):
    _, _, launcher, _ = shared
    tuned = [(member, names) for member, do, names in launcher.sent if do == "tune"]
    assert {member for member, _ in tuned} == {0, 1}
    assert sorted(names[0] for _, names in tuned) == sorted(CASES)
    assert {tuned[0][1][0], tuned[1][1][0]} == {"decode N=1", "decode N=2"}, "the most valuable first"


def test_the_results_are_one_report_and_one_store(shared):
    root, _, _, [report] = shared
    assert report.ok, report.errors
    assert [p.planned.cases[0] for p in report.problems] == list(CASES)
    assert all(p.proof is not None and p.proof.ok for p in report.problems)
    assert all(p.rejected == {"wrong": 1} for p in report.problems)
    again = plan_at(root, CASES, kinds=(planted.Honest, planted.FastAndWrong))
    assert all(p.known for p in again.problems), "what members wrote is what this process finds"
    assert {p.entry.key_hash for p in report.problems} == {p.entry.key_hash for p in again.problems}
    assert not list(root.rglob("*.jsonl")), "nothing is left to resume"


def test_no_process_is_left(shared):
    mine = psutil.Process().children(recursive=True)
    assert not [p for p in mine if "isokern.autotune" in " ".join(p.cmdline())]


def test_one_file_holds_the_choices_of_the_workload(shared, tmp_path):
    _, plan, _, _ = shared
    saved = save_plan(plan, tmp_path / "plan.json")
    assert len(saved.choices) == len(CASES)
    assert Plan.load(tmp_path / "plan.json", plan.environment) == saved
    plan.registry.pin(tmp_path / "plan.json", saved.content_hash)
    decision = plan.registry.dispatcher(warmup_tests.OP).decide(plan.problems[0].task.problem)
    plan.registry.pin(None)
    assert (decision.rule.value, decision.backend) == ("plan", "honest")


def test_a_killed_members_work_goes_to_another(tmp_path):
    plan = plan_at(tmp_path, CASES[:2])
    launcher = Spying(SLOTS, member_config(plan))
    launcher.kill_first = True
    notes = Notes()
    [report] = run_fleet(plan, launcher, notes)
    assert report.ok, report.errors
    assert len(report.problems) == 2
    assert launcher.killed
    assert any("is out: its process is gone (status -9)" in line for line in notes.lines)


_RUN = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("test_fleet", {file!r})
module = importlib.util.module_from_spec(spec)
sys.modules["test_fleet"] = module
spec.loader.exec_module(module)
module.{function}(*sys.argv[1:])
"""


def run_until_interrupted(root: str) -> None:
    from isokern.autotune.policy import ScreenPolicy
    from isokern.autotune.warmup import Interrupted

    endless = replace(warmup_tests.SETTINGS.policy, screen=ScreenPolicy(first_samples=1000))
    settings = replace(warmup_tests.SETTINGS, policy=endless)
    plan = plan_at(Path(root), CASES[:2], kinds=(planted.Sluggish,), settings=settings)

    class Announcing(ProcessLauncher):
        def submit(self, member, do, **arguments):
            super().submit(member, do, **arguments)
            print(do, flush=True)

    try:
        run_fleet(plan, Announcing(SLOTS, member_config(plan)))
    except Interrupted as interrupted:
        print(interrupted.signal.name, len(psutil.Process().children(recursive=True)), flush=True)


def test_a_signal_ends_all_members_and_their_workers(tmp_path):
    code = _RUN.format(file=str(HERE), function="run_until_interrupted")
    process = subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True)
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if lines.count("tune") == 2 and lines[-1] == "tune":
            time.sleep(2.0)  # members are starting workers now, or waiting for them
            os.kill(process.pid, signal.SIGTERM)
    assert process.wait(60) == 0
    assert lines[-1] == "SIGTERM 0"


# ---- the coordinator on scripted members


class Scripted:
    """Members in this process: each answer is made when it is waited for.

    Args:
        environments: one per member. breaks: case names whose tuning ends the member.
        fails: whether nothing is proven for a recipe. garbles: case names whose entries nobody can read.
        unproven: how many proofs are left out.
    """

    def __init__(self, plan, environments, breaks=(), fails=lambda recipe: False, garbles=(), unproven=0):
        self.fails = fails
        self.garbles = set(garbles)
        self.unproven = unproven
        self.plan = plan
        self.environments = list(environments)
        self.names = tuple(f"m{i}" for i in range(len(self.environments)))
        self.breaks = set(breaks)
        self.inbox: deque = deque()
        self.tuned: dict[int, list[str]] = {i: [] for i in range(len(self.names))}
        self.closed = 0

    def start(self):
        pass

    def submit(self, member, do, **arguments):
        self.inbox.append((member, do, arguments))

    def wait(self):
        member, do, arguments = self.inbox.popleft()
        return member, getattr(self, do)(member, **arguments)

    def hello(self, member):
        return {"result": {"environment": self.environments[member].to_dict()}}

    def tune(self, member, recipes):
        if self.breaks & {r["case"]["name"] for r in recipes}:
            return {"fault": "the device fell off the bus"}
        results = []
        for recipe in map(ProblemRecipe.from_dict, recipes):
            if self.fails(recipe):
                results.append({"entry": None, "error": "no candidate is proven", "seconds": 1.0})
                continue
            self.tuned[member].append(recipe.case.name)
            key = next(p.task.key for p in self.plan.problems if p.task.recipe == recipe)
            entry = an_entry(key, self.environments[member]).to_dict()
            if recipe.case.name in self.garbles:
                del entry["rule"]
            results.append({"entry": entry, "error": "", "seconds": 1.0})
        return {"result": {"results": results, "notes": ["hot"], "spawned": 2}}

    def prove(self, member):
        proof = {"problem": "", "expected": "", "dispatched": "", "rule": "tuned-user"}
        return {"result": {"proofs": [proof] * (len(self.tuned[member]) - self.unproven)}}

    def close(self):
        self.closed += 1


def an_entry(key, environment, created="2026-01-01T00:00:00+00:00") -> Entry:
    from isokern.cache import CandidateRecord

    measured = {"policy": "eager", "method": "none", "launches": 0, "seconds": 1.0, "created": created, "isokern": "0"}
    candidates = (CandidateRecord("honest", {}, "ok", median_us=1.0),)
    return Entry(warmup_tests.OP, 1, dict(key), "honest", {}, None, None, "", candidates, measured, environment.hash)


def test_a_problem_that_ends_two_members_is_given_up_and_the_rest_is_done(tmp_path):
    plan = plan_at(tmp_path, CASES)
    launcher = Scripted(plan, [plan.environment] * 3, breaks=["decode N=1"])
    [report] = run_fleet(plan, launcher)
    failed = [p for p in report.problems if p.error]
    assert [p.planned.cases[0] for p in failed] == ["decode N=1"]
    assert "2 members of the fleet were lost while tuning it" in failed[0].error
    assert "fell off the bus" in failed[0].error
    assert len([p for p in report.problems if p.entry]) == 3
    assert launcher.closed


def test_work_without_a_member_left_is_an_error_that_says_why(tmp_path):
    plan = plan_at(tmp_path, CASES)
    with pytest.raises(WorkerError, match=r"no member is left for .* problems: m0: the device fell off the bus"):
        run_fleet(plan, Scripted(plan, [plan.environment], breaks=["decode N=1"]))


def test_each_environment_is_tuned_by_its_own_members(tmp_path):
    plan = plan_at(tmp_path, CASES[:2])
    other = replace(plan.environment, threads=plan.environment.threads + 6)
    launcher = Scripted(plan, [plan.environment, other, other])
    reports = run_fleet(plan, launcher)
    assert [r.plan.environment for r in reports] == [plan.environment, other]
    assert sorted(launcher.tuned[0]) == sorted(CASES[:2])
    assert sorted(launcher.tuned[1] + launcher.tuned[2]) == sorted(CASES[:2])
    for environment in (plan.environment, other):
        assert len(list(plan.store.entries(environment))) == 2
    assert all(r.ok for r in reports)


def two_sizes(root):
    """A plan whose cases each stand for two problems, of two tensor-parallel sizes."""
    store = Store([Layer("explicit", root, writable=True)])
    registry = warmup_tests.registry_of(planted.Honest)
    cases = [warmup_tests.parse_case(case) for case in CASES]
    shards = shards_of([warmup_tests.MODEL], [4, 8])
    return plan_shards(shards, cases, store=store, registry=registry, settings=warmup_tests.SETTINGS)


def test_problems_that_share_a_cases_name_are_reported_each_for_itself(tmp_path):
    plan = two_sizes(tmp_path)
    names = [p.task.recipe.case.name for p in plan.problems]
    assert sorted(names) == sorted(2 * CASES)
    heads = max(p.task.recipe.case.h for p in plan.problems)
    [report] = run_fleet(plan, Scripted(plan, [plan.environment], fails=lambda recipe: recipe.case.h == heads))
    assert not report.ok
    assert len(report.errors) == len(CASES)
    for one in report.problems:
        failed = one.planned.task.recipe.case.h == heads
        assert bool(one.error) == failed
        assert (one.entry is None) == failed
        assert failed or (one.entry.key == one.planned.task.key and one.proof.ok)


def test_a_proof_that_did_not_come_is_none(tmp_path):
    plan = plan_at(tmp_path, CASES)
    [report] = run_fleet(plan, Scripted(plan, [plan.environment], unproven=1))
    assert not report.ok
    assert len(report.errors) == len(CASES), "whose proof is missing cannot be told"
    assert "m0 sent 3 proofs for 4 problems" in report.errors[0]


def test_a_member_whose_entry_cannot_be_read_proves_the_others(tmp_path):
    plan = plan_at(tmp_path, CASES)
    [report] = run_fleet(plan, Scripted(plan, [plan.environment], garbles=["decode N=2"]))
    [error] = report.errors
    assert "decode N=2: m0 sent an entry that cannot be read: field 'rule' is missing" in error
    assert [p.proof is not None and p.proof.ok for p in report.problems] == [name != "decode N=2" for name in CASES]


def test_another_environments_plan_asks_its_own_predicates_and_store(tmp_path):
    plan = plan_at(tmp_path, CASES[:1])
    other = replace(plan.environment, threads=77)
    take_over(plan.store, [(an_entry(plan.problems[0].task.key, plan.environment), plan.environment)])
    assert not plan_for(plan, other).problems[0].known
    assert plan_for(plan, plan.environment) is plan


def test_a_spent_budget_leaves_problems_and_says_which(tmp_path):
    plan = plan_at(tmp_path, CASES)
    [report] = run_fleet(plan, Scripted(plan, [plan.environment]), budget_s=0.0)
    assert [p.cases[0] for p in report.skipped] == list(CASES)


def test_merging_keeps_the_newer_measurement_and_survives_a_disk_that_cannot_be_written(tmp_path):
    plan = plan_at(tmp_path / "store", CASES[:1])
    key, here = plan.problems[0].task.key, plan.environment
    for created in ("2026-01-03", "2026-01-02"):
        take_over(plan.store, [(an_entry(key, here, created), here)])
    [kept] = plan.store.entries(here)
    assert kept.entry.measured["created"] == "2026-01-03"

    (tmp_path / "file").write_text("in the way")
    broken = Store([Layer("explicit", tmp_path / "file", writable=True)])
    with pytest.warns(CacheWarning, match="cannot write the store"):
        take_over(broken, [(an_entry(key, here), here)])
    assert [item.layer_name for item in broken.entries()] == ["memory"]


# ---- Ray, of which only what the launcher uses is there


class FakeRay:
    """Actors in this process. An actor made under ``doomed`` is lost at its second request."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, gpus=0, doomed=()):
        self.gpus = gpus
        self.doomed = set(doomed)
        self.initialised = []
        self.needs = []
        self.actors = []
        self.killed = []

    def init(self, **options):
        self.initialised.append(options)

    def cluster_resources(self):
        return {"CPU": 8.0, **({"GPU": float(self.gpus)} if self.gpus else {})}

    def remote(self, **needs):
        self.needs.append(needs)
        ray = self

        def decorate(kind):
            class Remote:
                @staticmethod
                def remote(*args):
                    number = len(ray.actors)
                    state = SimpleNamespace(made=None, asked=0)

                    def ask(do, arguments):
                        state.asked += 1
                        if number in ray.doomed and state.asked > 1:
                            return lambda: ray._raise()
                        state.made = state.made or kind(*args)
                        return lambda: state.made.perform(do, arguments)

                    ray.actors.append(SimpleNamespace(perform=SimpleNamespace(remote=ask), state=state))
                    return ray.actors[-1]

            return Remote

        return decorate

    def _raise(self):
        raise self.exceptions.RayError("the actor died\nwith a long story")

    def wait(self, refs, num_returns):
        return refs[:num_returns], refs[num_returns:]

    def get(self, ref):
        return ref()

    def kill(self, actor):
        self.killed.append(actor)
        if actor.state.made is not None:
            actor.state.made._member.close()


@pytest.fixture
def unchanged_registry(monkeypatch):
    """Actors share this process here: their registry is one made for them, not everybody's."""
    from isokern import registry

    monkeypatch.setattr(registry, "default", warmup_tests.registry_of(planted.Honest))


def test_ray_actors_tune_into_their_own_store_and_the_results_come_back(tmp_path, monkeypatch, unchanged_registry):
    monkeypatch.setenv("ISOKERN_CACHE", str(tmp_path / "theirs"))
    plan = plan_at(tmp_path / "ours", CASES[:2])
    ray = FakeRay(doomed=[1])
    launcher = RayLauncher(member_config(plan, share_store=False), members=2, ray=ray)
    notes = Notes()
    [report] = run_fleet(plan, launcher, notes)
    assert report.ok, report.errors
    assert len(list(plan.store.entries())) == 2
    assert list((tmp_path / "theirs").rglob("entries/*/*.json"))
    assert ray.initialised == [{"address": "auto", "ignore_reinit_error": True}]
    assert ray.needs == [{"num_gpus": 0, "num_cpus": 2}]
    assert len(ray.killed) == 2
    assert "ray:1 is out: RayError: the actor died" in notes.lines


def test_one_actor_per_gpu_unless_told_otherwise():
    config = MemberConfig("op", "cuda", "cuda", 1, (("user", "/x", True),), (), {}, {})
    launcher = RayLauncher(config, ray=FakeRay(gpus=3))
    assert launcher.names == ("ray:0", "ray:1", "ray:2")
    assert launcher.config.layers is None
    with pytest.raises(ArgumentValueError, match="at most the cluster's 3 GPUs"):
        RayLauncher(config, members=4, ray=FakeRay(gpus=3))
    with pytest.raises(WorkerError, match="no GPU"):
        RayLauncher(config, ray=FakeRay())


def test_members_share_the_processors_to_compile_with(monkeypatch):
    """Each sees its own GPU alone, and cannot count the others."""
    config = MemberConfig("op", "cuda", "cuda", 1, None, (), {}, {})
    monkeypatch.setattr(fleet_process, "processors", lambda: 32)
    slots = [Slot(f"cuda:{i}", "cuda", str(i), f"cuda:{i}") for i in range(8)]
    assert ProcessLauncher(slots, config).config.processors == 4
    assert ProcessLauncher(slots[:1], config).config.processors == 32
    for resources, each in (({"GPU": 3, "CPU": 96.0}, 32), ({"GPU": 3, "CPU": 2.0}, None), ({"GPU": 3}, None)):
        ray = FakeRay(gpus=3)
        monkeypatch.setattr(ray, "cluster_resources", lambda said=resources: said)
        assert RayLauncher(config, ray=ray).config.processors == each
    monkeypatch.setattr(fleet_ranks, "processors", lambda: 32)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert fleet_ranks._compilers() is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert fleet_ranks._compilers() == 3


def test_without_ray_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(WorkerError, match=r"isokern\[ray\]"):
        RayLauncher(MemberConfig("op", "cpu", "cpu", 1, None, (), {}, {}))


# ---- ranks


def run_rank(root: str) -> None:
    """One rank of two warm-ups in a row, into stores that no other rank sees; in the second one rank 1 breaks."""
    rank = int(os.environ["RANK"])
    tempfile.tempdir = f"{root}/locks{rank}"
    Path(tempfile.tempdir).mkdir(exist_ok=True)
    with process_group() as exchange:
        told = {name: one_warm_up(Path(root) / name, rank, exchange) for name in ("whole", "broken")}
    (Path(root) / f"rank{rank}.json").write_text(json.dumps(told))


def one_warm_up(folder: Path, rank: int, exchange) -> dict:
    plan = plan_at(folder / f"store{rank}", CASES)
    begun = []

    class Begun(Progress):
        def begin(self, problem, index, total):
            begun.append(problem)
            if (rank, folder.name) == (1, "broken"):
                raise WorkerError("this rank's device is broken")

    try:
        report = run_ranks(plan, exchange, Begun())
    except WorkerError as error:
        told = {"raised": str(error)}
    else:
        told = {
            "ok": report.ok,
            "problems": [p.planned.cases[0] for p in report.problems],
            "proven": [p.proof is not None and p.proof.ok for p in report.problems],
            "skipped": [p.cases[0] for p in report.skipped],
        }
    return told | {"begun": begun, "stored": sorted(item.entry.key_hash for item in plan.store.entries())}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What two ranks that torchrun started say of their warm-ups."""
    root = tmp_path_factory.mktemp("ranks")
    script = root / "rank.py"
    script.write_text(_RUN.format(file=str(HERE), function="run_rank"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, root]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((root / f"rank{rank}.json").read_text()) for rank in range(2)]


def test_ranks_deal_the_work_out_and_each_ends_with_everything(ranks):
    both = [rank["whole"] for rank in ranks]
    assert Counter(name for rank in both for name in rank["begun"]) == Counter(CASES), "each problem once"
    assert all(rank["begun"] for rank in both)
    for rank in both:
        assert rank["ok"]
        assert rank["problems"] == list(CASES)
        assert rank["proven"] == [True] * 4
        assert len(rank["stored"]) == 4
    assert both[0]["stored"] == both[1]["stored"]


def test_a_rank_that_fails_still_takes_part_and_then_raises(ranks):
    first, second = (rank["broken"] for rank in ranks)
    assert second["raised"] == "this rank's device is broken"
    assert sorted(first["problems"] + first["skipped"]) == sorted(CASES)
    assert first["problems"] == [name for name in CASES if name in first["begun"]]
    assert first["stored"] == second["stored"], "the failed rank's host, too, has what the other tuned"


# ---- the command's options


def test_where_to_tune_follows_from_the_options(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert find_venue("cpu", None, None) == Venue()
    assert find_venue("cpu", "all", None) == Venue(slots=local_slots("cpu"))
    assert find_venue("auto", None, "auto") == Venue(ray="auto")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert find_venue("cpu", None, None) == Venue(ranks=True)
    with pytest.raises(ArgumentValueError, match="none under torchrun"):
        find_venue("cpu", "all", None)


@pytest.mark.parametrize("text", ["", "0,", "a", "0,0", "-1"])
def test_device_lists_are_checked(text):
    with pytest.raises(ArgumentValueError, match="indices such as"):
        find_venue("cuda", text, None)


def test_a_rank_sees_its_own_gpu_only(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "1")
    for visible, mine in (("4,6", "6"), (None, "1")):
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        find_venue("cuda", None, None)
        assert os.environ["CUDA_VISIBLE_DEVICES"] == mine


def test_a_rank_takes_no_gpu_that_is_hidden_from_it(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    for visible in ("4,5", "", "4,5,-1,6"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        with pytest.raises(ArgumentValueError, match="--nproc-per-node") as refused:
            find_venue("cuda", None, None)
        assert refused.value.argument == "CUDA_VISIBLE_DEVICES"
        assert repr(visible) in refused.value.given
        assert os.environ["CUDA_VISIBLE_DEVICES"] == visible


def test_ranks_from_which_all_gpus_are_hidden_may_tune_on_the_cpu(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert find_venue("auto", None, None) == Venue(ranks=True)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.fixture
def runs(monkeypatch):
    """What run_on starts, on a host with eight GPUs."""
    started = []
    for name in ("TORCHELASTIC_RUN_ID", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # so that what is set is taken back
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(fleet_cli, "run_warmup", lambda plan, *a, **k: started.append("here"))
    monkeypatch.setattr(fleet_cli, "run_fleet", lambda plan, launcher, *a, **k: started.append(launcher.names) or ())
    return started


def test_the_one_device_that_is_named_is_the_first_of_this_process(tmp_path, monkeypatch, runs):
    venue = find_venue("cuda", "3", None)
    assert [slot.name for slot in venue.slots] == ["cuda:3"]
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "3", "whoever asks for 'cuda' from here on, to plan or to tune"
    run_on(venue, plan_at(tmp_path, CASES[:1]), Progress(), None)
    assert runs == ["here"]


def test_the_index_of_a_named_device_counts_what_is_visible(monkeypatch, runs):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    find_venue("auto", "1", None)
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "6"


def test_a_slot_that_this_process_does_not_see_alone_is_a_fleet_of_one(tmp_path, monkeypatch, runs):
    venue = Venue(slots=local_slots("cuda", (3,)))
    run_on(venue, plan_at(tmp_path, CASES[:1]), Progress(), None)
    assert runs == [("cuda:3",)]


def test_several_devices_are_a_fleet_and_leave_this_process_as_it_is(tmp_path, runs):
    venue = find_venue("cuda", "0,3", None)
    assert "CUDA_VISIBLE_DEVICES" not in os.environ
    run_on(venue, plan_at(tmp_path, CASES[:1]), Progress(), None)
    assert runs == [("cuda:0", "cuda:3")]


def test_the_summary_divides_the_time_among_the_devices_and_compares_it_afterwards(tmp_path, shared):
    plan = plan_at(tmp_path, CASES)
    assert "on 2 devices" in plan_summary(plan, 2)
    _, _, _, [report] = shared
    assert "x the estimate" in report_summary(report, 2)


def test_a_member_refuses_what_it_does_not_know(tmp_path, unchanged_registry):
    plan = plan_at(tmp_path, CASES[:1])
    with Member(member_config(plan).to_dict(), warmup_tests.registry_of(planted.Honest)) as member:
        with pytest.raises(ValueError, match="none that a member knows"):
            member.perform("dance", {})
        assert member.perform("prove", {}) == {"proofs": []}
