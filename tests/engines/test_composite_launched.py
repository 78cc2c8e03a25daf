"""Composites through a GPU's launcher, the engine in the driver's place: what is launched by address is computed."""

from functools import partial

import numpy as np
import pytest
import torch

from isokern.backends.composite.backend import Composite
from isokern.backends.cupy.compiling import NAME, CupyCompiler
from isokern.backends.cupy.compiling import source as cupy_source
from isokern.backends.cupy.specialization import Specialization as CupySpecialization
from isokern.backends.cupy_chunked.arguments import workspace
from isokern.backends.cupy_chunked.compiling import ChunkedCompiler, entry, source
from isokern.backends.cupy_chunked.specialization import Specialization
from isokern.backends.launch.chain import Chain
from isokern.backends.launch.image import Image
from isokern.backends.launch.launcher import Launcher
from isokern.backends.launch.recording import RecordingLibrary
from isokern.engines.cuda_on_cpu.backend import CupyOnCpu
from isokern.engines.cuda_on_cpu.chunked import CupyChunkedOnCpu
from isokern.engines.cuda_on_cpu.raw_kernel import CpuRawKernel
from isokern.registry.conformance.gate import gate
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.checks.trial import Trial, bits
from isokern.registry.ops.fused_sigmoid_gating.describe import describe

pytestmark = pytest.mark.engine("cuda_on_cpu")
OP = "fused_sigmoid_gating"
SPEC = CaseSpec("rows and prompts", (1,) * 5 + (70, 40), h=1, hv=2, k=16, v=24, as_layout=True)


class Running(RecordingLibrary):
    """A driver whose kernels are the engine's: machine code is a kernel's number."""

    def __init__(self):
        super().__init__()
        self.kernels = []

    def image(self, kernel, entry, threads, shared):
        self.kernels.append(kernel)
        return Image(str(len(self.kernels) - 1).encode(), entry, threads, shared)

    def cuLaunchKernelEx(self, *arguments):
        super().cuLaunchKernelEx(*arguments)
        launch = self.launches[-1]
        argument = np.frombuffer(launch.parameters, np.dtype((np.void, len(launch.parameters))))
        self.kernels[int(launch.code)](launch.grid, launch.block, (argument,), launch.shared)
        return 0


class WalkCompiler(CupyCompiler):
    """The product's own layouts; kernels by the engine's compiler."""

    library = Running()

    def expected(self):
        return ()

    def image(self, variant, fresh=False):
        kernel = CpuRawKernel(cupy_source(), NAME, self.specialization.options())
        return self.library.image(kernel, NAME, self.specialization.threads, 0)


class ChunkCompiler(ChunkedCompiler):
    library = WalkCompiler.library

    def expected(self):
        return ()

    def image(self, variant, fresh=False):
        special, name = self.specialization, entry(self.kernel)
        kernel = CpuRawKernel(source(self.kernel), name, special.options(self.kernel, variant.wide))
        return self.library.image(kernel, name, *special.block(self.kernel))


class Walks(CupyOnCpu):
    def bind(self, problem, config):
        compiler = WalkCompiler(CupySpecialization.of(problem, config), 90)
        return Launcher(self.name, problem, config, compiler, compiler.library.driver())


class Chunks(CupyChunkedOnCpu):
    def bind(self, problem, config):
        special = Specialization.of(problem, config, self.pieces)
        compilers = [ChunkCompiler(kernel, special, 90, dense=False) for kernel in special.kernels]
        driver = ChunkCompiler.library.driver()
        launchers = [Launcher(self.name, problem, config, each, driver) for each in compilers]
        return Chain(launchers, partial(workspace, pieces=self.pieces, span=special.cut))


def launched():
    parts = {part.name: part for part in (Walks(), Chunks())}
    return Composite(lambda: parts)


def results(run, spec, seed=0):
    """What a run leaves of a batch."""
    call = Trial.of(spec, seed).call
    run(call)
    return [None if t is None else bits(t) for t in (call.out, call.pool, call.intermediates)]


@pytest.mark.parametrize(
    "spec",
    [
        SPEC,
        SPEC.but(lengths=(1, 40) * 4),
        SPEC.but(lengths=(70, 40, 1, 0, 2), update="separate", extra_rows=3, padded=(3,)),
        SPEC.but(lengths=(1, 2, 3)),
        SPEC.but(lengths=(70, 40)),
        SPEC.but(strides="any", state_layout="vk", index_dtype="int64", cu_dtype="int64"),
    ],
    ids=["two runs", "eight runs", "prompts first", "short only", "long only", "strided"],
)
def test_by_addresses_and_by_views_leave_the_same_bits(spec):
    composite = launched()
    config = composite.configs(describe(SPEC, "cpu"))[0]
    assert (config["short"], config["long"].partition("[")[0]) == ("cupy", "cupy_chunked")
    runner = composite.bind(Trial.of(spec).call.problem(), config)
    for seed in (0, 1):
        want, got = results(runner._by_views, spec, seed), results(runner, spec, seed)
        for one, other in zip(want, got, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
    [kind] = runner._kinds._recent
    assert None not in [plan for _, plan in kind._plans], "by addresses"


def test_the_launched_composite_passes_the_gate():
    composite = launched()
    config = composite.configs(describe(SPEC, "cpu"))[0]
    result = gate(OP, composite, config, SPEC, adversarial=SPEC.but(lengths=(1,) * 5 + (66, 44)))
    assert result.ok, result.reason
