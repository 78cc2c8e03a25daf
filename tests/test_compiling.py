"""Compiling ahead: in processes of its own that see no GPU, each kernel once, and never in the way of a verdict."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from isokern import registry as package
from isokern.autotune.candidates import Candidate, admit
from isokern.autotune.compiling import Compilers, compilations, processors
from isokern.autotune.recipe import ProblemRecipe, origin_of
from isokern.autotune.tuner import Task
from isokern.autotune.warmup import HOOKS, OP
from isokern.registry import Config
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.concrete import adversarial_twin
from isokern.registry.ops.fused_sigmoid_gating.describe import describe

FILE = Path(__file__).with_name("compiling_backends.py")
DECODE = CaseSpec("decode", (1,) * 4, h=2, hv=4, k=128, v=128, as_layout=True)
PROMPT = DECODE.but(name="prompt", lengths=(9, 3))


@pytest.fixture(scope="module")
def module():
    spec = importlib.util.spec_from_file_location("compiling_backends", FILE)
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["compiling_backends"] = loaded
    spec.loader.exec_module(loaded)
    yield loaded
    del sys.modules["compiling_backends"]


@pytest.fixture
def traces(tmp_path, monkeypatch, module):
    monkeypatch.setenv(module.TRACES, str(tmp_path))
    return lambda: [json.loads(path.read_text()) for path in sorted(tmp_path.iterdir())]


def task(case, mode="graph"):
    recipe = ProblemRecipe(OP, case, adversarial_twin(case), HOOKS, 0, "cuda", mode)
    return Task(recipe, describe(case, "cuda", 90, mode))


def candidate(backend, config=None):
    return Candidate(backend.name, config or Config(), "0" * 16, origin_of(backend))


class TestWork:
    def test_launch_modes_share_their_kernels(self, module):
        one = candidate(module.Traced())
        [work] = compilations([(task(DECODE, "graph"), [one]), (task(DECODE, "eager"), [one])])
        assert work.recipes == (task(DECODE, "eager").recipe,)

    def test_problems_that_share_kernels_are_compiled_in_one_process(self, module):
        one = candidate(module.Traced())
        more = DECODE.but(name="more", lengths=(1,) * 64, h=4, hv=8)
        works = compilations([(task(case), [one]) for case in (DECODE, PROMPT, more)])
        assert [[recipe.case.name for recipe in work.recipes] for work in works] == [["decode", "more"], ["prompt"]]

    def test_what_changes_the_code_does_not_share(self, module):
        one = candidate(module.Traced())
        cases = (DECODE, DECODE.but(k=64), DECODE.but(state_layout="vk"), DECODE.but(io_dtype="float16"))
        assert len(compilations([(task(case), [one]) for case in cases])) == 4

    def test_every_config_is_its_own_work(self, module):
        fields = [(task(DECODE), [candidate(module.Traced(), Config.of(tile=t)) for t in (1, 2, 4)])]
        assert [work.candidate.config["tile"] for work in compilations(fields)] == [1, 2, 4]

    def test_backends_take_turns_problem_by_problem(self, module):
        ours, theirs = ([candidate(kind(), Config.of(tile=t)) for t in (1, 2)] for kind in (module.Traced, module.Dies))
        works = compilations([(task(DECODE), [*ours, *theirs]), (task(PROMPT), ours)])
        turns = [(w.candidate.backend, w.candidate.config["tile"], w.recipes[0].case.name) for w in works]
        assert turns[:4] == [
            ("traced", 1, "decode"),
            ("dies", 1, "decode"),
            ("traced", 2, "decode"),
            ("dies", 2, "decode"),
        ]
        assert [case for _, _, case in turns[4:]] == ["prompt", "prompt"]


class TestCompilers:
    def test_compiles_for_the_architecture_of_the_problem_without_a_gpu(self, module, traces):
        with Compilers(1) as compilers:
            compilers.submit(compilations([(task(DECODE), [candidate(module.Traced())])]))
            compilers.wait()
        [trace] = traces()
        assert (trace["device"], trace["arch"], trace["sees"]) == ("cuda", 90, "")
        assert trace["nice"] > 0
        assert compilers.failures == []

    def test_as_many_processes_as_jobs_and_as_there_is_work(self, module, traces):
        configs = [candidate(module.Traced(), Config.of(tile=t)) for t in range(6)]
        with Compilers(2) as compilers:
            assert compilers.idle
            compilers.submit(compilations([(task(DECODE), configs)]))
            assert not compilers.idle
            compilers.wait()
            assert compilers.idle
        assert len(traces()) == 6
        assert len({trace["pid"] for trace in traces()}) <= 2

    def test_a_problem_is_ready_while_others_are_compiled(self, module, traces):
        decode, prompt = (task(DECODE), [candidate(module.Traced())]), (task(PROMPT), [candidate(module.Dawdles())])
        with Compilers(2) as compilers:
            compilers.submit(compilations([decode, prompt]))
            assert compilers.ready([prompt]) is None
            assert compilers.first_ready([prompt, decode]) == 1
            assert not compilers.idle

    def test_a_problem_waits_for_its_own_candidates_only(self, module, traces):
        """One that is a candidate in the other launch mode alone may come last of all."""
        both = candidate(module.Traced())
        graph, eager = (task(DECODE, "graph"), [both]), (task(DECODE, "eager"), [both, candidate(module.Dawdles())])
        with Compilers(2) as compilers:
            compilers.submit(compilations([graph, eager]))
            assert compilers.first_ready([eager, graph]) == 1

    def test_a_problem_does_not_wait_for_another_with_the_same_candidate(self, module, traces):
        long, short = DECODE.but(name="long", lengths=(1,) * module.DAWDLES_AT), DECODE.but(name="short", lengths=(1,))
        fields = [(task(case), [candidate(module.DawdlesAtOne())]) for case in (short, long)]
        with Compilers(1) as compilers:
            compilers.submit(compilations(fields))
            assert compilers.first_ready(fields) == 0
            assert compilers.ready(fields[1:]) is None

    def test_nothing_submitted_is_ready(self, module):
        assert Compilers(0).first_ready([(task(DECODE), [candidate(module.Traced())])]) == 0

    @pytest.mark.parametrize(("fault", "said"), [("Refuses", "no such instruction"), ("Dies", "status 7")])
    def test_a_failure_is_told_and_stops_nobody(self, module, traces, fault, said):
        both = [candidate(getattr(module, fault)()), candidate(module.Traced())]
        with Compilers(1) as compilers:
            compilers.submit(compilations([(task(DECODE), both)]))
            compilers.wait()
        [failure] = compilers.failures
        assert said in failure
        assert failure.startswith(both[0].name)
        assert len(traces()) == 1

    def test_closing_ends_what_is_under_way(self, module, traces):
        began = time.monotonic()
        with Compilers(1) as compilers:
            compilers.submit(compilations([(task(DECODE), [candidate(module.Dawdles())])]))
            while not traces():
                time.sleep(0.05)
            assert not compilers.idle
        assert time.monotonic() - began < 300
        compilers.close()

    def test_leaves_processors_to_those_who_measure(self):
        assert 1 <= Compilers().jobs <= max(1, processors() - 1)


@pytest.mark.parametrize("name", ["cupy", "triton", "numba_cuda"])
def test_what_is_compiled_ahead_is_what_calls_need(name):
    """Down to the file that the kernel is kept in, for every config and for both layouts of lengths that are gated."""
    from isokern.backends.launch.compiler import Variant
    from isokern.registry.ops.fused_sigmoid_gating.call import TENSORS
    from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
    from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

    compiler_of = _compilers()[name]
    for case in (DECODE, PROMPT, DECODE.but(state_layout="vk"), PROMPT.but(verify="tree", update="disabled")):
        problem = task(case).problem
        calls = [canonical_call(**make_inputs(c).kwargs) for c in (case, adversarial_twin(case))]
        for config in package.default.backends(OP)[name].configs(problem):
            compiler = compiler_of(problem, config)
            for call in calls:
                layout = compiler.layout(call)
                tensors = [getattr(call, TENSORS[i]) for i in layout.vectors]
                wide = layout.wide and all(t is None or t.data_ptr() % 16 == 0 for t in tensors)
                assert Variant(layout.key, wide) in compiler.expected(), f"{case.name} [{config.label}]"


def _compilers():
    from isokern.backends.cupy.launcher import compiler
    from isokern.backends.numba_cuda.launch import NumbaCompiler
    from isokern.backends.triton.compiling import TritonCompiler

    return {"cupy": compiler, "triton": TritonCompiler, "numba_cuda": NumbaCompiler.of}


def test_backends_without_kernels_to_keep_compile_nothing():
    problem = replace(task(DECODE).problem, device="cpu", arch=0)
    for candidate in admit(package.default, OP, problem).candidates:
        package.default.backends(OP)[candidate.backend].compile(problem, candidate.config)
