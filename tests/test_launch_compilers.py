"""Machine code for a GPU that is not there: what each compiler is told, and that its kernels take what is packed."""

import re
import struct
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from isokern.backends.launch import cubins
from isokern.backends.launch.compiler import Variant
from isokern.backends.launch.sketch import sketch
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

DECODE = CaseSpec("decode", (1,) * 4, k=32, v=16, state_layout="vk")
PROMPTS = DECODE.but(name="prompts", lengths=(9, 4))
BATCH = PROMPTS.but(name="batch", lengths=(3, 3), varlen=False)
TREE = PROMPTS.but(name="tree", verify="tree", update="disabled")
CASES = [
    DECODE,
    PROMPTS.but(name="kv", state_layout="kv"),
    BATCH,
    TREE,
    PROMPTS.but(name="KDA", is_kda=True, lower_bound=-5.0),
    PROMPTS.but(name="no pool", state_dtype=None),
    PROMPTS.but(name="separate", update="separate", index_dtype="int64", cu_dtype="int64"),
    PROMPTS.but(name="one head", h=1, hv=1),
]


@pytest.fixture(autouse=True)
def _kernels_of_this_test(monkeypatch, tmp_path):
    monkeypatch.setattr(cubins, "directory", lambda: tmp_path)


def call_of(spec):
    call = canonical_call(**make_inputs(spec).kwargs)
    call.out = torch.empty(call.v.shape, dtype=call.q.dtype)
    return call


def problem_of(spec):
    return describe(spec, "cuda", 90)


# ---- a call from its description


@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_a_sketched_call_is_described_as_its_problem(spec):
    problem = problem_of(spec)
    drawn = sketch(problem)
    if drawn.cu_seqlens is not None:
        drawn.cu_seqlens = torch.zeros(drawn.n + 1, dtype=drawn.cu_seqlens.dtype)
    found = drawn.problem("eager")
    same = {"device": "cuda", "arch": 90, "profile": problem.profile, "lengths_on_host": problem.lengths_on_host}
    assert replace(found, **same) == problem


# ---- Triton


def triton_compiler(spec):
    from isokern.backends.triton.compiling import TritonCompiler
    from isokern.backends.triton.configs import configs

    problem = problem_of(spec)
    return TritonCompiler(problem, configs(problem)[0])


@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_binding_compiles_what_packed_tensors_need(spec):
    compiler = triton_compiler(spec)
    (expected,) = compiler.expected()
    assert expected == Variant(compiler.layout(call_of(spec)).key, wide=True)


def test_strides_of_an_engines_rows_need_nothing_else():
    """q, k and v as slices of one projection's rows, a and b of another's: what serving engines pass."""
    spec = DECODE.but(k=128, v=128, h=16, hv=32)
    call = call_of(spec)
    row = torch.empty(1, 4, 16 * 128 * 2 + 32 * 128, dtype=call.q.dtype)
    q, k, v = (x.unflatten(-1, (-1, 128)) for x in row.split((2048, 2048, 4096), dim=-1))
    b, a = torch.empty(1, 4, 64, dtype=call.q.dtype).chunk(2, dim=-1)
    compiler = triton_compiler(spec.but(strides="rows"))
    layout = compiler.layout(call.replace(q=q, k=k, v=v, a=a, b=b))
    assert compiler.expected() == (Variant(layout.key, wide=True),)


@pytest.mark.parametrize("spec", [spec for spec in CASES if spec is not TREE], ids=lambda spec: spec.name)
def test_the_chunked_triton_kernels_share_a_workspace_that_is_no_tensor_of_the_call(spec):
    from isokern.backends.triton_chunked.backend import TritonChunked
    from isokern.backends.triton_chunked.launcher import compilers

    problem = problem_of(spec)
    config = TritonChunked().configs(problem)[0]
    call = call_of(spec)
    made = compilers(problem, config, TritonChunked.pieces)
    assert [compiler.form.function.__name__ for compiler in made] == ["prepare", "scan"]
    for compiler in made:
        layout = compiler.layout(call)
        (expected,) = compiler.expected()
        assert expected == Variant(layout.key, wide=True)
        named = zip(compiler.form.function.arg_names, layout.key.types, strict=True)
        pointers = [name for name, kind in named if kind.startswith("*")]  # the first of its parameters
        assert layout.scratch == 8 * pointers.index("workspace")
        assert layout.scratch not in [at for _, at in layout.places]
    grids = [compiler.layout(call).grid for compiler in made]
    assert grids[0] == (_slots(spec) * spec.hv, 1, 1)
    assert grids[1][1] == len(spec.lengths)


def _slots(spec):
    if spec.varlen:
        return sum(spec.lengths) // 64 + len(spec.lengths)
    return len(spec.lengths) * -(-spec.lengths[0] // 64)


@pytest.mark.parametrize("series", ["lengths and their number", "slots", "batches"])
def test_the_chunked_triton_kernels_serve_any_lengths(series):
    from isokern.backends.triton_chunked.backend import TritonChunked
    from isokern.backends.triton_chunked.launcher import compilers

    problem = problem_of(SERIES[series][0])
    for compiler in compilers(problem, TritonChunked().configs(problem)[0], TritonChunked.pieces):
        assert len({compiler.layout(call_of(spec)).key for spec in SERIES[series]}) == 1


SERIES = {
    "lengths and their number": [PROMPTS.but(lengths=n) for n in ((9, 4), (16,), (1, 7, 33, 2, 2), (32,) * 3, (1,))],
    "slots": [PROMPTS, PROMPTS.but(extra_slots=40), PROMPTS.but(padded=(1,))],
    "batches": [BATCH.but(lengths=n) for n in ((3, 3), (16, 16), (1,), (5, 5, 5))],
    "trees": [TREE.but(lengths=n) for n in ((9, 4), (15, 4), (16,), (1, 3))],
}


@pytest.mark.parametrize("series", SERIES)
def test_one_triton_kernel_serves_all(series):
    compiler = triton_compiler(SERIES[series][0])
    assert len({compiler.layout(call_of(spec)).key for spec in SERIES[series]}) == 1


@pytest.mark.parametrize("spec", [DECODE, PROMPTS, BATCH, TREE, PROMPTS.but(is_kda=True)], ids=lambda s: s.name)
def test_one_triton_kernel_serves_any_number_of_heads_of_one_ratio(spec):
    """Odd numbers too: a stride of few elements is no multiple of 16 where one of many is."""
    config = triton_compiler(spec).config
    compilers = [replace(triton_compiler(spec.but(h=h, hv=2 * h)), config=config) for h in (1, 3, 16)]
    kernels = {(c.expected(), repr(c._constants())) for c in compilers}
    assert len(kernels) == 1


def test_another_dtype_or_an_odd_stride_is_another_triton_kernel():
    compiler, call = triton_compiler(PROMPTS), call_of(PROMPTS)
    odd = torch.empty(1, 13, 2 * 32 + 1, dtype=call.q.dtype)[..., :64].unflatten(-1, (2, 32))
    calls = [call, call.replace(read_slots=call.read_slots.long()), call.replace(q=odd)]
    assert len({compiler.layout(c).key for c in calls}) == 3


@pytest.mark.parametrize("spec", [DECODE, PROMPTS.but(is_kda=True, strides="any", verify="tree")], ids=["dense", "any"])
def test_triton_is_told_what_its_own_launch_would_tell_it(spec):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from isokern.backends.triton.arguments import constants, integers, options, pointers, reals
    from isokern.backends.triton.kernel import recurrent

    compiler, call = triton_compiler(spec), call_of(spec)
    backend = make_backend(GPUTarget("cuda", 90, 32))
    binder = create_function_from_signature(recurrent.signature, recurrent.params, backend)
    fixed = constants(compiler.problem, compiler.config)
    told = options(compiler.config)
    arguments, special, given = binder(
        *pointers(call, call.out), *reals(call), *integers(call, call.out), **fixed, **told
    )
    _, signature, constexprs, attributes = recurrent._pack_args(backend, fixed | told, arguments, special, given)

    assert told["enable_fp_fusion"] is False, "bits follow from the source alone"
    key = compiler.layout(call).key
    wide, narrow = compiler.source(key, wide=True), compiler.source(key, wide=False)
    assert wide.signature == narrow.signature == signature
    assert wide.constants == narrow.constants == constexprs
    divisible = {path for path, what in attributes.items() if what}
    names = recurrent.arg_names
    left_out = {names[i] for (i,) in divisible - set(wide.attrs)}
    scalars = {"A_log", "read_slots", "write_slots", "offsets", "step_rows", "parents", "b"}
    assert left_out <= scalars | ({"a", "dt_bias"} if not spec.is_kda else set())
    assert set(wide.attrs) <= divisible
    assert {names[i] for (i,) in set(wide.attrs) - set(narrow.attrs)} >= {"q", "k", "v", "out"}
    assert not any(signature[names[i]].startswith("*") for (i,) in narrow.attrs)


@pytest.mark.parametrize("wide", [True, False])
def test_a_triton_kernel_takes_the_parameters_that_are_packed(wide):
    """Sizes from the PTX that Triton made; the launcher itself refuses a kernel where they differ."""
    from isokern.backends.triton import compiling

    compiler = triton_compiler(DECODE)
    call = call_of(DECODE)
    layout = compiler.layout(call)
    seen = []
    read = compiling.parameter_bytes
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "parameter_bytes", lambda ptx: seen.append(ptx) or read(ptx))
        image = compiler.image(Variant(layout.key, wide))
    sizes = read(seen[0])
    at = 0
    for size in sizes:
        at += -at % size + size
    assert at == len(layout.block)
    pointers = re.findall(r"\.param \.u64 \.ptr", seen[0])
    assert len(pointers) == len(layout.places) + 2
    assert image.code.startswith(b"\x7fELF")
    assert image.entry.encode() in image.code
    assert image.threads == 32 * int(compiler.config["warps"])
    assert (image.cluster, image.cooperative, image.overlaps, image.scratch) == (1, False, False, 0)


def test_a_triton_that_packs_another_way_is_refused(monkeypatch):
    from isokern.backends.triton import compiling

    monkeypatch.setattr(compiling, "parameter_bytes", lambda ptx: [8])
    compiler = triton_compiler(DECODE)
    with pytest.raises(RuntimeError, match="another way"):
        compiler.image(compiler.expected()[0])


def test_ptx_without_a_kernel_is_an_error():
    from isokern.backends.triton.compiling import parameter_bytes

    assert parameter_bytes(".visible .entry f(\n\t.param .u64 .ptr .global .align 1 a,\n\t.param .f32 b\n)\n") == [8, 4]
    assert parameter_bytes(".entry f()") == []
    with pytest.raises(ValueError, match="no kernel"):
        parameter_bytes(".func f()")


# ---- CUDA C++


def cupy_compiler(spec, arch=90):
    from isokern.backends.cupy.backend import Cupy
    from isokern.backends.cupy.compiling import CupyCompiler
    from isokern.backends.cupy.specialization import Specialization

    problem = problem_of(spec)
    return CupyCompiler(Specialization.of(problem, Cupy().configs(problem)[0]), arch)


def test_nvrtc_keeps_subnormal_numbers_and_fuses_nothing_unasked():
    import triton

    image = cupy_compiler(DECODE).image(Variant(None, wide=True))
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    file = cubins.directory() / "kernel.cubin"
    file.write_bytes(image.code)
    sass = subprocess.run([tool, "-c", file], capture_output=True, text=True, check=True, timeout=60).stdout
    assert "FFMA" in sass
    assert not re.findall(r"\b(?:FADD|FMUL|FFMA|FMNMX|FSETP)[.\w]*\.FTZ", sass)


def test_nvrtcs_code_is_whole():
    code = cupy_compiler(DECODE).image(Variant(None, wide=True)).code
    (headers_at,) = struct.unpack_from("<Q", code, 32)
    size, number = struct.unpack_from("<HH", code, 54)
    assert headers_at + size * number <= len(code)


def test_nvrtcs_log_is_the_error():
    compiler = cupy_compiler(DECODE)
    broken = replace(compiler, specialization=replace(compiler.specialization, io="no_such_type"))
    with pytest.raises(compiler.errors(), match="no_such_type"):
        broken.image(Variant(None, wide=True))
    with pytest.raises(compiler.errors(), match="arch"):
        replace(compiler, arch=1).image(Variant(None, wide=True))


def test_a_kernel_is_found_again_by_source_options_architecture(monkeypatch):
    from isokern.backends.cupy import compiling

    made = []
    monkeypatch.setattr(compiling, "cubin", lambda text, name, options: made.append(options) or b"code")
    compiler = cupy_compiler(DECODE)
    for arch in (90, 90, 100):
        replace(compiler, arch=arch).image(Variant(None, wide=True))
    assert len(made) == 2
    compiler.image(Variant(None, wide=True), fresh=True)
    assert len(made) == 3
    monkeypatch.setattr(compiling, "source", lambda: "another source")
    compiler.image(Variant(None, wide=True))
    assert len(made) == 4


def test_the_chunked_kernels_are_compiled_once_for_what_each_looks_at(monkeypatch):
    """The first kernel is one per number of heads, for all other settings and pools; the second does not look at it."""
    from isokern.backends.cupy_chunked import compiling
    from isokern.backends.cupy_chunked.backend import CupyChunked, CupyCut
    from isokern.backends.cupy_chunked.launcher import compilers

    made = []
    monkeypatch.setattr(compiling, "cubin", lambda text, name, options: made.append(name) or b"code")
    for spec in (DECODE, DECODE.but(state_dtype="bfloat16")):
        problem = problem_of(spec)
        for config in CupyChunked().configs(problem):
            for compiler in compilers(problem, config, CupyChunked.pieces):
                for variant in compiler.expected():
                    image = compiler.image(variant)
                    assert (image.threads, image.shared) == compiler.specialization.block(compiler.kernel)
    configs = CupyChunked().configs(problem_of(DECODE))
    assert made.count("prepare.cu") == len({config["heads"] for config in configs}) == 2
    scans = {tuple((key, value) for key, value in config.items if key != "heads") for config in configs}
    assert made.count("scan.cu") == 2 * len(scans) > 2
    made.clear()
    cut = CupyCut().configs(problem_of(DECODE))[0]
    kernels = [compiler.kernel for compiler in compilers(problem_of(DECODE), cut, CupyCut.pieces)]
    assert kernels == ["prepare", "local", "join", "scan"]
    for compiler in compilers(problem_of(DECODE), cut, CupyCut.pieces):
        for variant in compiler.expected():
            image = compiler.image(variant)
            assert image.entry == ("scan" if compiler.kernel == "local" else compiler.kernel)
    assert made == ["scan.cu", "join.cu", "scan.cu"], "the first kernel is there already"
    odd = compilers(problem_of(DECODE.but(strides="any")), configs[0], CupyChunked.pieces)
    assert [compiler.expected() for compiler in odd] == [(), ()]


# ---- Numba


def numba_compiler(spec):
    from isokern.backends.numba_cuda.backend import NumbaCuda
    from isokern.backends.numba_cuda.launch import NumbaCompiler

    problem = problem_of(spec)
    return NumbaCompiler.of(problem, NumbaCuda().configs(problem)[0])


def test_numba_compiles_the_narrow_kernel_ahead_where_views_may_need_it():
    assert [v.wide for v in numba_compiler(DECODE).expected()] == [True]
    assert [v.wide for v in numba_compiler(DECODE.but(strides="rows")).expected()] == [True, False]
    assert [v.wide for v in numba_compiler(DECODE.but(strides="any")).expected()] == [False]
    assert [v.wide for v in numba_compiler(DECODE.but(state_dtype=None)).expected()] != []


@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_numba_calls_find_what_was_compiled_ahead(spec):
    compiler = numba_compiler(spec)
    layout = compiler.layout(call_of(spec))
    assert Variant(layout.key, layout.wide) in compiler.expected()


def test_a_slot_stride_that_is_not_aligned_needs_numbas_narrow_kernel():
    compiler, call = numba_compiler(DECODE.but(strides="rows")), call_of(DECODE)
    slots = call.pool.shape[0]
    pool = torch.empty(slots, 4 * 16 * 32 + 1)[:, :-1].unflatten(1, (4, 16, 32))
    assert compiler.layout(call).wide
    assert not compiler.layout(call.replace(pool=pool)).wide


def test_an_assembler_that_reports_nothing_is_told():
    from isokern.backends.numba_cuda.compile import Cubin

    with pytest.raises(RuntimeError, match="report lacks"):
        assert Cubin(b"code", "entry", "nothing of use").resources


def test_numba_kernels_are_kept_on_disk(monkeypatch):
    from isokern.backends.numba_cuda import launch
    from isokern.backends.numba_cuda.backend import NumbaCuda
    from isokern.backends.numba_cuda.compile import Cubin
    from isokern.backends.numba_cuda.launch import NumbaCompiler

    made = []
    monkeypatch.setattr(launch, "compile_variant", lambda *what: made.append(what) or Cubin(b"code", "entry", "report"))
    compiler = numba_compiler(DECODE)
    images = {compiler.image(Variant(None, wide=True)) for _ in range(3)}
    assert len(made) == 1
    (image,) = images
    assert (image.code, image.entry, image.threads) == (b"code", "entry", compiler.variant.threads)
    compiler.image(Variant(None, wide=False))
    replace(compiler, arch=100).image(Variant(None, wide=True))
    assert [arch for _, arch in made] == [90, 90, 100]
    other_heads = replace(problem_of(DECODE), h=1, hv=2)
    NumbaCompiler.of(other_heads, NumbaCuda().configs(problem_of(DECODE))[0]).image(Variant(None, wide=True))
    assert len(made) == 3, "the same ratio, the same kernel"


# ---- kernels that start before the one before them ends


def overlap_images(arch):
    """Whether each kernel's launch asks for it, of the chain of ``cupy_cut``."""
    from isokern.backends.cupy_chunked.backend import CupyCut
    from isokern.backends.cupy_chunked.launcher import compilers

    problem = replace(problem_of(PROMPTS.but(lengths=(1500,))), arch=arch)
    of_chain = compilers(problem, CupyCut().configs(problem)[0], CupyCut.pieces)
    assert [compiler.kernel for compiler in of_chain] == ["prepare", "local", "join", "scan"]
    return [compiler.image(Variant(None, True)).overlaps for compiler in of_chain]


def test_only_the_first_of_a_chain_waits_for_what_came_before_it():
    """What the others do before they wait is in order because all before the chain has ended when its second begins."""
    assert overlap_images(90) == [False, True, True, True]


def test_chips_without_the_instructions_are_not_asked():
    assert overlap_images(80) == [False] * 4


@pytest.mark.parametrize(("version", "allowed"), [(12020, False), (12030, True), (13000, True)])
def test_drivers_that_cannot_capture_such_launches_are_not_asked(monkeypatch, version, allowed):
    from isokern.backends.cupy_chunked import overlap

    monkeypatch.setattr(overlap, "_driver", lambda: version)
    assert overlap.can_overlap(90) is allowed
    assert overlap_images(90) == [False, allowed, allowed, allowed]
