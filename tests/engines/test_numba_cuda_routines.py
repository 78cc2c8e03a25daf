"""Device functions of the Numba kernels: compiled once for all kernels that have them in common, inlined in each."""

import re

import pytest
from numba.cuda.flags import CUDAFlags
from numba.cuda.target import CUDATargetContext

from isokern.backends.numba_cuda import compile as compiling
from isokern.backends.numba_cuda import routines
from isokern.backends.numba_cuda.space import configs_for
from isokern.backends.numba_cuda.variant import Variant
from isokern.registry.backend import Config
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe

PROMPTS = CaseSpec("prompts", (9, 4), k=32, v=32, state_layout="vk")


def adding(size, function=None):
    def add(out):
        for i in range(size):
            out[i] += size if function is None else 0

    return add


def test_a_function_is_another_ones_equal_if_code_and_closure_are():
    one = routines.routine(adding(1))
    assert one is routines.routine(adding(1))
    assert one is not routines.routine(adding(2))
    assert one is not routines.routine(adding(True)), "equal to 1, but another type"
    assert one is not routines.value(adding(1))


def test_functions_that_hold_equal_functions_are_equal():
    held = [adding(4, routines.routine(adding(size))) for size in (1, 1, 2)]
    first, second, third = map(routines.routine, held)
    assert first is second is not third


def test_flags_in_force_are_one_object_and_a_compilation_changes_its_own():
    kernel = CUDAFlags()
    shared = routines._inlining(kernel)
    assert shared is routines._inlining(CUDAFlags())
    assert shared.forceinline
    assert not kernel.forceinline
    own = routines._Flags(shared, shared)
    own.enable_ssa = False  # as Numba's inliner does
    assert own.copy() is shared is shared.copy()
    assert shared.enable_ssa


@pytest.fixture
def compiled(monkeypatch):
    """Names of the functions that are compiled from here on, and the flags of each."""
    made = {}
    compile_subroutine = CUDATargetContext._compile_subroutine_no_cache

    def counted(self, builder, function, *rest, **named):
        made[function.__qualname__] = named["flags"]
        return compile_subroutine(self, builder, function, *rest, **named)

    monkeypatch.setattr(CUDATargetContext, "_compile_subroutine_no_cache", counted)
    return made


def test_the_next_config_compiles_what_is_its_own_alone(compiled):
    problem = describe(PROMPTS, "cuda", 90)
    config = configs_for(problem)[0]
    wider = Config.from_dict({**config.to_dict(), "resident": int(config["resident"]) + 1})
    compiling._ptx(Variant.of(problem, config, wide=True))
    assert len(compiled) > 10
    assert len({id(flags) for flags in compiled.values()}) == len(compiled), "each its own"
    assert len({id(flags.copy()) for flags in compiled.values()}) == 1, "one in force"
    compiled.clear()
    compiling._ptx(Variant.of(problem, wider, wide=True))
    assert compiled == {}
    compiling._ptx(Variant.of(describe(PROMPTS.but(neg_eigval=True), "cuda", 90), config, wide=True))
    assert {name.split(".")[0] for name in compiled} == {"beta_function", "stage_beta_of", "_stage"}


def test_everything_is_inlined():
    problem = describe(PROMPTS, "cuda", 90)
    ptx = compiling._ptx(Variant.of(problem, configs_for(problem)[0], wide=True))
    assert not re.findall(r"\bcall(?:\.uni)?\b|\.func\b", ptx)
