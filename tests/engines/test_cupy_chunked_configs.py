"""The chunked CUDA C++ kernels' configs in the CPU engine: which change bits, and the sizes that the host computes.

Products of four warps (``group``) may sum in another order than a warp's own, and segments (``cut``) other parts of
the state; nothing else of a config changes a bit.
"""

import numpy as np
import pytest
import torch

from isokern.backends.cupy_chunked.arguments import crossing_bytes, record_bytes
from isokern.backends.cupy_chunked.compiling import source
from isokern.backends.cupy_chunked.configs import configs, cut_configs
from isokern.backends.cupy_chunked.resources import KERNELS
from isokern.backends.cupy_chunked.specialization import Specialization
from isokern.engines import load_engine
from isokern.engines.cuda_on_cpu.raw_kernel import CpuRawKernel
from isokern.registry.conformance.subject import Subject
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.checks.trial import Trial, bits
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.reference import reference

pytestmark = pytest.mark.engine("cuda_on_cpu")
NAMES = ("cupy_chunked", "cupy_chunked_bf16")
CUT = ("cupy_cut", "cupy_cut_bf16")
RAGGED = CaseSpec("ragged", (1, 63, 64, 65, 130, 0), h=1, hv=1, distribution="long_memory")
SPECS = {
    "K=96 V=192": RAGGED.but(k=96, v=192),
    "K=16 V=8": RAGGED.but(k=16, v=8, hv=2, state_layout="vk"),
    "K=V=256": RAGGED.but(k=256, v=256, lengths=(3, 66, 0)),
}


def subjects(name, spec):
    """The backend under every config that it offers on sm_90."""
    backend, engine = load_engine(name)
    return [Subject(backend, config, engine=engine) for config in backend.configs(Trial.of(spec).call.problem())]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        pytest.param(name, spec, id=f"{name}, {key}")
        for name in (*NAMES, *CUT)
        for key, spec in SPECS.items()
        if name == "cupy_chunked" or key == "K=96 V=192"
    ],
)
def test_all_configs_that_multiply_alike_give_the_same_bits(name, spec):
    first = {}
    tried = subjects(name, spec)
    for subject in tried:
        trial = Trial.of(spec)
        results = trial.run(subject)
        trial.check_untouched()
        kind = subject.config["group"], subject.config.to_dict().get("cut")
        if kind not in first:
            call = Trial.of(spec).call
            judged = judge(trial.call, trial.out, reference(call, chunk=subject.chunk(call)))
            assert judged.ok, (subject.config.label, judged.faults)
            first[kind] = results
        assert torch.equal(bits(results.o), bits(first[kind].o)), subject.config.label
        for state, expected in zip(results.states, first[kind].states, strict=True):
            assert torch.equal(bits(state), bits(expected)), subject.config.label
    assert {group for group, _ in first} == {True, False}
    assert any(cut for _, cut in first) == (name in CUT)
    assert len(tried) > len(first)


#: What the host computes: of the scan its chunks in flight, of the first kernel two tiles or what is solved there.
SIZES = {
    "scan": "SCAN_THREADS, (int)(Shape::STAGES * sizeof(Stage)), (int)sizeof(Record)",
    "local": "SCAN_THREADS, (int)(Shape::STAGES * sizeof(Stage)), (int)sizeof(Record)",
    "join": "JOIN_THREADS, 0, (int)sizeof(Record)",
    "prepare": "PREPARE_THREADS, (int)(sizeof(Small) + max(2 * sizeof(Tile<Shape::KEYS>), sizeof(Solve))), "
    "(int)sizeof(Record)",
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("name", NAMES)
def test_sizes_of_threads_and_memory_are_those_of_the_source(name, kernel):
    declarations, begin, _ = source(kernel).partition('extern "C" __global__')
    text = f"{declarations}{begin} void sizes(int* to) {{ const int found[] = {{{SIZES[kernel]}}};\n"
    text += "  for (int i = 0; i < 3; i++) to[i] = found[i];"
    text += "" if kernel == "prepare" else "  to[3] = (int)sizeof(Crossing);"
    text += " }"
    pieces = load_engine(name)[0].pieces
    for spec in (SPECS["K=16 V=8"], SPECS["K=96 V=192"].but(io_dtype="float32")):
        problem = describe(spec, "cuda", 90)
        offered = (configs if kernel in ("prepare", "scan") else cut_configs)(problem, pieces)
        for config in (offered[0], offered[-1]):  # with group products, and without
            special = Specialization.of(problem, config, pieces)
            found = np.zeros(4, np.int32)
            CpuRawKernel(text, "sizes", special.options(kernel, wide=False))(
                (1, 1, 1), (1, 1, 1), (torch.from_numpy(found),)
            )
            assert tuple(found[:3]) == (*special.block(kernel), record_bytes(pieces)), (spec.k, config.label)
            if kernel != "prepare":
                assert found[3] == crossing_bytes(spec.k, spec.v)
