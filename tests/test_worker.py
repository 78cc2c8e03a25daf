"""A worker survives nothing, and the tuner survives every worker."""

from __future__ import annotations

import importlib.util
import json
import socket
import subprocess
import sys
import time
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from isokern.autotune import session
from isokern.autotune.channel import Channel, ChannelClosedError
from isokern.autotune.measure_cuda import CudaBench
from isokern.autotune.recipe import Origin, ProblemRecipe, find_backend, origin_of
from isokern.autotune.tuner import Workers
from isokern.autotune.worker import CandidateFailure, Limits, Worker
from isokern.errors import RegistrationError
from isokern.registry.core import Registry
from isokern.registry.decision import RejectCode
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.concrete import adversarial_twin
from isokern.registry.ops.fused_sigmoid_gating.describe import describe

OP = "fused_sigmoid_gating"
HOOKS = f"isokern.registry.ops.{OP}.timing"
PLANTED = Path(__file__).with_name("planted_backends.py")
TINY = CaseSpec("tiny", (3, 5, 2), h=1, hv=2, k=8, v=8, as_layout=True)
RECIPE = ProblemRecipe(OP, TINY, adversarial_twin(TINY), HOOKS)
LIMITS = Limits(call=3.0)


def candidate(attribute: str, name: str) -> dict:
    origin = Origin("planted_backends", str(PLANTED), attribute)
    return {"name": name, "backend": name, "config": {}, "origin": origin.to_dict()}


def run(worker: Worker, attribute: str, name: str) -> dict:
    worker.request("bind", LIMITS.bind, **candidate(attribute, name))
    return worker.request("first_call", LIMITS.call, name=name, calls=2, policy={})


@pytest.fixture(scope="module")
def worker():
    with Worker("cpu", 1, LIMITS) as worker:
        yield worker


@pytest.fixture
def loaded(worker):
    """The worker, with the tiny problem loaded; started again by the first test after one that killed it."""
    worker.request("load", LIMITS.load, problem=RECIPE.to_dict())
    return worker


# ---- what travels


def test_a_recipe_survives_json():
    assert ProblemRecipe.from_dict(json.loads(json.dumps(RECIPE.to_dict()))) == RECIPE


def test_the_worker_builds_the_problem_that_was_described(worker):
    loaded = worker.request("load", LIMITS.load, problem=RECIPE.to_dict())
    assert loaded["key"] == describe(TINY, "cpu").key()


def test_builtin_backends_need_no_origin_and_others_name_their_file():
    registry = Registry(load_plugins=False)
    assert origin_of(registry.backends(OP)["torch_reference"]) is None
    spec = importlib.util.spec_from_file_location("planted_for_origin", PLANTED)
    module = importlib.util.module_from_spec(spec)
    sys.modules["planted_for_origin"] = module
    try:
        spec.loader.exec_module(module)
        assert origin_of(module.Honest()) == Origin("planted_for_origin", str(PLANTED), "Honest")
    finally:
        del sys.modules["planted_for_origin"]


def test_a_decorated_function_is_found_by_importing_its_file_again(tmp_path):
    source = tmp_path / "my_kernel.py"
    source.write_text(
        "from isokern import registry\n"
        f"@registry.backend({OP!r}, 'decorated', priority=3)\n"
        "def run(call):\n    return call.out\n"
        "if __name__ == '__main__':\n    raise SystemExit('a worker must not run the script')\n"
    )
    code = (
        "from isokern import registry\nfrom isokern.autotune.recipe import Origin, find_backend\n"
        f"found = find_backend(registry.default, {OP!r}, 'decorated', Origin('__main__', {str(source)!r}))\n"
        "print(found.priority)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "3"


def test_a_backend_that_nothing_brings_is_an_error_naming_the_file(tmp_path):
    empty = tmp_path / "empty_module.py"
    empty.write_text("")
    with pytest.raises(RegistrationError, match="empty_module"):
        find_backend(Registry(load_plugins=False), OP, "absent", Origin("empty_module", str(empty), "Absent"))


# ---- the channel


def test_a_message_arrives_whole_however_it_is_cut():
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    theirs.sendall(b'{"a": 1}\n{"b"')
    assert channel.receive(1.0) == {"a": 1}
    with pytest.raises(TimeoutError):
        channel.receive(0.05)
    theirs.sendall(b": 2}\n")
    assert channel.receive(1.0) == {"b": 2}
    theirs.close()
    with pytest.raises(ChannelClosedError):
        channel.receive(1.0)
    channel.close()


# ---- candidates that misbehave


def test_what_a_candidate_prints_is_no_answer_and_an_exit_is_a_crash_that_quotes_it(loaded):
    with pytest.raises(CandidateFailure) as caught:
        run(loaded, "PrintsAndExits", "prints_and_exits")
    failure = caught.value
    assert failure.verdict.code is RejectCode.CRASH
    assert failure.died
    assert "exited with status 3" in failure.verdict.reason
    assert "kernel says goodbye" in failure.verdict.reason


def test_a_raising_candidate_leaves_the_worker_alive(loaded):
    with pytest.raises(CandidateFailure) as caught:
        run(loaded, "Raises", "raises")
    assert caught.value.verdict.code is RejectCode.RAISED
    assert caught.value.verdict.reason == "IndexError: tile 7 of 4"
    assert not caught.value.died
    assert loaded.alive


def test_failing_to_bind_is_a_compile_error(loaded):
    with pytest.raises(CandidateFailure) as caught:
        run(loaded, "FailsToBind", "fails_to_bind")
    assert caught.value.verdict.code is RejectCode.COMPILE
    assert "ptxas" in caught.value.verdict.reason


def test_running_out_of_memory_has_its_own_code(loaded):
    with pytest.raises(CandidateFailure) as caught:
        run(loaded, "Greedy", "greedy")
    assert caught.value.verdict.code is RejectCode.MEMORY


def test_a_forked_child_does_not_speak_and_the_fork_is_a_crash(loaded):
    with pytest.raises(CandidateFailure) as caught:
        run(loaded, "Forks", "forks")
    assert caught.value.verdict.code is RejectCode.CRASH
    assert "os.fork()" in caught.value.verdict.reason
    # the next answer is the answer to the next question
    assert loaded.request("unload", LIMITS.load) == {}


def test_a_segfault_names_its_signal(loaded):
    with pytest.raises(CandidateFailure) as caught:
        run(loaded, "Segfaults", "segfaults")
    assert caught.value.verdict.code is RejectCode.CRASH
    assert "SIGSEGV" in caught.value.verdict.reason


def test_a_hang_is_killed_with_everything_it_started(loaded):
    loaded.request("bind", LIMITS.bind, **candidate("HangsWithChild", "hangs_with_child"))
    pid = loaded.pid
    with pytest.raises(CandidateFailure) as caught:
        loaded.request("first_call", 1.0, name="hangs_with_child", calls=2, policy={})
    assert caught.value.verdict.code is RejectCode.TIMEOUT
    assert not psutil.pid_exists(pid)
    assert not [p for p in psutil.process_iter(["cmdline"]) if "planted-child" in (p.info["cmdline"] or [])]


def test_after_a_death_the_next_request_has_a_fresh_worker(worker):
    worker.kill()
    before = worker.spawned
    worker.request("unload", LIMITS.load)  # boots, passes the canary, answers
    assert worker.spawned == before + 1


def test_a_worker_does_not_outlive_its_tuner_even_while_a_candidate_hangs():
    code = (
        "import os, threading\nfrom isokern.autotune.worker import Worker\n"
        f"w = Worker()\nw.request('load', 60, problem={RECIPE.to_dict()!r})\n"
        f"w.request('bind', 60, **{candidate('Hangs', 'hangs')!r})\nprint(w.pid, flush=True)\n"
        "threading.Timer(0.5, os.kill, (os.getpid(), 9)).start()\n"
        "w.request('first_call', 60, name='hangs', calls=2, policy={})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the worker is still there"
        time.sleep(0.05)
    assert done.returncode == -9


def test_two_workers_that_begin_together_serve_from_their_first_processes():
    with Workers("cpu", 1) as both:
        both.start(["json", "no_such_module"])
        pids = (both.examiner.pid, both.timer.pid)
        for worker in (both.examiner, both.timer):
            assert worker.request("import", LIMITS.call, modules=["no_such_module"])["failed"]["no_such_module"]
        assert (both.examiner.pid, both.timer.pid) == pids
        assert both.spawned == 2


def test_a_rehearsal_goes_through_the_gate_and_leaves_the_worker_as_it_was(worker):
    verdict = worker.request("rehearse", LIMITS.gate, problem=RECIPE.to_dict())
    assert verdict["code"] is None


# ---- what is kept between problems


class TestKeeping:
    """References cost many times what the kernels do, and each problem comes once per launch mode."""

    BY_GRAPH = replace(RECIPE, mode="graph")
    OTHERS = tuple(replace(RECIPE, seed=seed) for seed in range(1, 5))

    @pytest.fixture
    def keep(self, monkeypatch):
        """What a session on a GPU with 1000 free bytes keeps for a recipe."""
        monkeypatch.setattr(session, "_free_bytes", lambda device: 1000)
        monkeypatch.setattr(session, "_KEPT_SHARE", 1.0)
        on_gpu = session.Session("cpu", torch.get_num_threads())
        on_gpu.device = "cuda:0"
        return on_gpu._keep

    def test_launch_modes_share(self, keep):
        assert keep(RECIPE) is keep(self.BY_GRAPH)
        assert keep(RECIPE) is not keep(self.OTHERS[0])

    def test_the_oldest_are_given_up_for_a_new_one(self, keep):
        first, second, third = (keep(recipe) for recipe in self.OTHERS[:3])
        for kept in (first, second, third):
            kept.get("it", lambda: Held(300))
        assert keep(self.OTHERS[0]) is first, "used last"
        keep(self.OTHERS[3])
        assert keep(self.OTHERS[0]) is first
        assert keep(self.OTHERS[1]) is not second

    def test_all_together_hold_a_share_of_what_is_free(self, keep):
        keep(self.OTHERS[0]).get("it", lambda: Held(400))
        newest = keep(self.OTHERS[1])
        newest.get("large", lambda: Held(700))
        assert newest.bytes == 0
        newest.get("small", lambda: Held(600))
        assert newest.bytes == 600

    def test_a_cpu_keeps_nothing_beyond_a_problem(self, keep):
        on_cpu = keep.__self__
        on_cpu.device = "cpu"
        on_cpu.load(RECIPE)
        on_cpu._kept.get("it", lambda: Held(300))
        kept = weakref.ref(on_cpu._kept)
        on_cpu.perform("unload", {}, print)
        assert kept() is None


class TestFirstCallsOnAGpu:
    """Timed as they will be raced, unless a call that is waited for takes hopelessly long; not on a GPU here."""

    @pytest.fixture
    def first_call(self):
        """First calls that take these seconds, waited for, and so much in the bench's hands."""

        def first_call(*waited, glance=1e-4, rotates=True, mode="graph", best_s=1e-4):
            made = session.Session("cpu", torch.get_num_threads())
            made.load(RECIPE)
            made.device = "cuda:0"
            times = iter(waited)
            made._once = lambda *_: next(times)
            made._bound["it"] = SimpleNamespace(runner=None)
            made._bench = Glancing.taking(glance, rotates)
            answer = made.first_call("it", 5, session.MeasurePolicy(mode=mode), best_s)
            assert next(times, None) is None, "no call more or less than expected"
            return answer

        return first_call

    def test_ranked_by_the_bench(self, first_call):
        assert first_call(9.0, 3e-4) == {"seconds": [1e-4], "least_s": 1e-4}
        assert first_call(9.0, 3e-4, mode="eager") == {"seconds": [1e-4], "least_s": None}

    def test_what_finds_the_cache_cold_in_graphs_alone_says_nothing_of_eager_calls(self, first_call):
        assert first_call(9.0, 3e-4, rotates=False)["least_s"] is None

    def test_a_hopeless_one_is_called_once_more_and_not_glanced_at(self, first_call):
        slow = first_call(9.0, 0.3, 0.2005, glance=None)
        assert slow["seconds"] == [0.2005]
        assert slow["least_s"] == pytest.approx(0.1)
        assert first_call(9.0, 0.3, 0.2, mode="eager", glance=None)["least_s"] is None

    def test_a_host_that_stumbles_once_loses_nobody(self, first_call):
        assert first_call(9.0, 0.3, 3e-4)["seconds"] == [1e-4]


class Glancing(CudaBench):
    @classmethod
    def taking(cls, seconds, rotates):
        made = cls.__new__(cls)
        made.seconds, made._calls = seconds, (None,) * (1 + rotates)
        return made

    def glance(self, name, runner, waited_s):
        assert self.seconds is not None
        return self.seconds

    def forget(self, name):
        pass


class Held:
    """Something of so many bytes."""

    def __init__(self, size):
        self.tensor = torch.zeros(size, dtype=torch.uint8)

    def lasting(self):
        return (self.tensor,)

    def places(self):
        return ()
