"""What reaches a kernel: every address, stride and scalar at its place, in each framework's layout.

Launches go to a driver that remembers them. What they should hold is worked out here from the kernels' own declarations
and from the call, not from the packers.
"""

import ctypes
import re
from dataclasses import replace

import pytest
import torch

from isokern.backends.launch.compiler import Variant
from isokern.backends.launch.image import Image
from isokern.backends.launch.launcher import Launcher
from isokern.backends.launch.recording import RecordingLibrary
from isokern.registry.ops.fused_sigmoid_gating.call import TENSORS
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

DECODE = CaseSpec("decode", (1,) * 4, k=32, v=16)
CASES = [
    DECODE,
    DECODE.but(name="vk, bf16 pool, int64", state_dtype="bfloat16", state_layout="vk", index_dtype="int64"),
    DECODE.but(name="batch", lengths=(3, 3), varlen=False),
    DECODE.but(name="prompts, rows", lengths=(5, 2, 0), strides="rows", cu_dtype="int64", update="separate"),
    DECODE.but(name="any stride", lengths=(5, 2), strides="any", scale=0.25, neg_eigval=True),
    DECODE.but(name="no pool", lengths=(5, 2), state_dtype=None, l2norm=False),
    DECODE.but(name="KDA", lengths=(5, 2), is_kda=True, lower_bound=-4.0, gate_dtype="float32", softplus_beta=2.0),
    DECODE.but(name="KDA, any stride", lengths=(5, 2), is_kda=True, strides="any", state_layout="vk"),
    DECODE.but(name="chain", lengths=(5, 2), verify="chain", update="disabled"),
    DECODE.but(name="tree, vk", lengths=(5, 2), verify="tree", state_layout="vk", intermediate_dtype="bfloat16"),
]
FRAMEWORKS = ["cupy", "numba_cuda", "triton"]


def call_of(spec):
    call = canonical_call(**make_inputs(spec).kwargs)
    call.out = torch.empty(call.v.shape, dtype=call.q.dtype)
    return call


def compiler_of(framework, problem):
    """The framework's compiler and default config for the problem as it would be on an H100."""
    problem = replace(problem, device="cuda", arch=90)
    match framework:
        case "cupy":
            from isokern.backends.cupy.backend import Cupy
            from isokern.backends.cupy.compiling import CupyCompiler
            from isokern.backends.cupy.specialization import Specialization

            config = Cupy().configs(problem)[0]
            return CupyCompiler(Specialization.of(problem, config), problem.arch), problem, config
        case "numba_cuda":
            from isokern.backends.numba_cuda.backend import NumbaCuda
            from isokern.backends.numba_cuda.launch import NumbaCompiler

            config = NumbaCuda().configs(problem)[0]
            return NumbaCompiler.of(problem, config), problem, config
        case "triton":
            from isokern.backends.triton.backend import Triton
            from isokern.backends.triton.compiling import TritonCompiler

            config = Triton().configs(problem)[0]
            return TritonCompiler(problem, config), problem, config


class Uncompiled:
    """A framework's compiler whose machine code is the variant's name: packing needs no other."""

    def __init__(self, compiler, threads=64):
        self.compiler, self.threads = compiler, threads
        self.made = []

    def layout(self, call):
        return self.compiler.layout(call)

    def expected(self):
        return ()

    def errors(self):
        return (RuntimeError,)

    def image(self, variant: Variant, fresh=False):
        self.made.append(variant)
        return Image(repr(variant).encode(), "kernel", self.threads)


def launcher_of(framework, call, library=None):
    compiler, problem, config = compiler_of(framework, call.problem("eager"))
    library = library or RecordingLibrary()
    return Launcher(framework, problem, config, Uncompiled(compiler), library.driver()), library


def launched(framework, call):
    launcher, library = launcher_of(framework, call)
    assert launcher(call) is call.out
    (launch,) = library.launches
    return launch


def given(call):
    return {name: getattr(call, name) for name in TENSORS}


# ---- CUDA C++: one structure, as its header declares it


def structure(name="Arguments"):
    """The header's structure as ctypes: read from the text that the compiler reads."""
    from isokern.backends.cupy.compiling import FOLDER

    text = re.sub(r"//[^\n]*", "", (FOLDER / "arguments.cuh").read_text())
    made = {"int64": ctypes.c_int64, "float": ctypes.c_float, "void": ctypes.c_uint64}
    for kind, body in re.findall(r"struct (\w+) \{(.*?)\n\};", text, re.DOTALL):
        fields = []
        for base, names in re.findall(r"(?:const )?(\w+)\b([\w*, ]+);", body):
            fields += [(x.strip(" *"), made[base]) for x in names.split(",")]
        made[kind] = type(kind, (ctypes.Structure,), {"_fields_": fields})
    return made[name]


#: The structure's name of each tensor, where it is another one.
OTHERWISE = {
    "intermediates": "steps",
    "read_slots": "read",
    "write_slots": "write",
    "intermediate_rows": "rows",
}


def tokens(t):
    return dict(zip(("batch", "time", "head", "element"), (*t.stride(), 0), strict=False))


def states(t, layout):
    if t is None:
        return dict.fromkeys(("slot", "step", "head", "key", "value"), 0)
    inner = dict(zip(("key", "value") if layout == "kv" else ("value", "key"), t.stride()[-2:], strict=True))
    step = t.stride(1) if t.dim() == 5 else 0
    return {"slot": t.stride(0), "step": step, "head": t.stride(-3), **inner}


def vector(t):
    return {"head": t.stride(0), "element": t.stride(1) if t.dim() == 2 else 0}


def as_dict(structure):
    values = ((name, getattr(structure, name)) for name, *_ in structure._fields_)
    return {name: as_dict(x) if isinstance(x, ctypes.Structure) else x for name, x in values}


def single(x):
    return ctypes.c_float(x).value


@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_cuda_source_gets_its_structure(spec):
    call = call_of(spec)
    found = as_dict(structure().from_buffer_copy(launched("cupy", call).parameters))
    data = {OTHERWISE.get(name, name): 0 if t is None else t.data_ptr() for name, t in given(call).items()}
    assert found == {
        "data": data,
        **{name: tokens(getattr(call, name)) for name in ("q", "k", "v", "a", "b", "out")},
        "A_log": vector(call.A_log),
        "dt_bias": vector(call.dt_bias),
        "pool": states(call.pool, call.state_layout),
        "steps": states(call.intermediates, call.state_layout),
        "parent_stride": 0 if call.parents is None else call.parents.stride(0),
        "n": spec.n,
        "length": call.q.shape[1],
        "scale": single(spec.scale or spec.k**-0.5),
        "softplus_beta": spec.softplus_beta,
        "softplus_threshold": spec.softplus_threshold,
        "lower_bound": spec.lower_bound or 0.0,
        "beta_factor": 2.0 if spec.neg_eigval else 1.0,
        "softplus_unit": single(1 / spec.softplus_beta),
    }


def test_cuda_addresses_are_one_block_that_the_structure_begins_with():
    launcher, _ = launcher_of("cupy", call_of(CASES[0]))
    places = [at for _, at in launcher.compiler.layout(call_of(CASES[0])).places]
    assert places == sorted(places)
    assert places[-1] < ctypes.sizeof(structure("Addresses"))
    assert structure().data.offset == 0


# ---- Numba: 8-byte integers by name, then floats


@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_numba_gets_its_integers_and_floats(spec):
    from isokern.backends.numba_cuda.parameters import FLOATS, NUMBERS, POINTERS, STRIDES

    call = call_of(spec)
    block = launched("numba_cuda", call).parameters
    names = [*POINTERS, *STRIDES, *NUMBERS]
    words = dict(zip(names, memoryview(block)[: 8 * len(names)].cast("q"), strict=True))
    floats = dict(zip(FLOATS, memoryview(block)[8 * len(names) :].cast("f"), strict=True))

    read_by_kernel = {name: t for name, t in given(call).items() if t is not None}
    for name in POINTERS:
        expected = read_by_kernel[name].data_ptr() if name in read_by_kernel else 0
        assert words[name] == expected, name
    for name in STRIDES:
        if words[name]:  # strides that the kernel has built in, or has no use for, stay 0
            assert words[name] == stride_in_bytes(call, name), name
    always = "q_token k_token v_token a_token b_token out_token".split()
    always += ["pool_slot"] * (call.pool is not None) + ["steps_row", "steps_step"] * (call.intermediates is not None)
    assert all(words[name] for name in always)
    if spec.strides == "any":
        assert all(words[name] for name in ("q_inner", "k_inner", "v_inner", "out_inner", "A_log_head"))
    assert words["sequences"] == call.n
    assert words["length"] == call.q.shape[1]
    assert words["parent_steps"] == (0 if call.parents is None else call.parents.shape[1])
    widths = {
        "wide_read": call.read_slots,
        "wide_write": call.write_slots,
        "wide_cu": call.cu_seqlens,
        "wide_rows": call.intermediate_rows,
        "wide_parents": call.parents,
    }
    for name, t in widths.items():
        assert words[name] == (t is not None and t.dtype == torch.int64), name
    assert floats == {
        "scale": single(spec.scale or spec.k**-0.5),
        "softplus_beta": spec.softplus_beta,
        "softplus_threshold": spec.softplus_threshold,
        "lower_bound": spec.lower_bound or 0.0,
    }


def stride_in_bytes(call, name):
    owner, which = name.rsplit("_", 1)
    tensor = getattr(call, {"steps": "intermediates"}.get(owner, owner))
    if owner in ("pool", "steps"):
        axes = {"slot": 0, "row": 0, "step": 1, "head": -3}
        axes |= {"k": -2, "v": -1} if call.state_layout == "kv" else {"k": -1, "v": -2}
    elif owner in ("A_log", "dt_bias"):
        axes = {"head": 0, "inner": 1}
    else:
        axes = {"batch": 0, "token": 1, "head": 2, "inner": 3}
    return tensor.stride(axes[which]) * tensor.element_size()


# ---- Triton: its own parameter list, without what is compiled in


def triton_values(call):
    """Every argument of the kernel by name, as its docstring has them."""
    kv = call.state_layout == "kv"

    def strides(prefix, dims, t):
        return dict(zip((f"{prefix}_{d}" for d in dims), (0,) * 9 if t is None else (*t.stride(), 0), strict=False))

    def held(prefix, dims, t):
        found = strides(prefix, dims, t)
        if not kv:
            found[f"{prefix}_k"], found[f"{prefix}_v"] = found[f"{prefix}_v"], found[f"{prefix}_k"]
        return found

    tensors = {"offsets": call.cu_seqlens, "steps": call.intermediates, "step_rows": call.intermediate_rows}
    tensors |= {n: getattr(call, n) for n in "q k v a b out A_log dt_bias pool read_slots write_slots parents".split()}
    numbers = {"N": call.n, "T": call.q.shape[1]}
    for name in ("q", "k", "v", "a"):
        numbers |= strides(name, "bthd", getattr(call, name))
    numbers["g_t"] = 0 if call.is_kda else numbers["a_t"]
    numbers["a_t"] -= numbers["g_t"]
    numbers |= strides("b", "bth", call.b) | strides("o", "bthd", call.out) | strides("A", "h", call.A_log)
    numbers |= (
        strides("dt", "hd", call.dt_bias) | held("pool", "shkv", call.pool) | held("step", "rthkv", call.intermediates)
    )
    numbers |= strides("parent", "nt", call.parents)
    bound = 0.0 if call.lower_bound is None else call.lower_bound
    reals = {"scale": call.scale, "softplus_beta": call.softplus_beta}
    reals |= {"softplus_threshold": call.softplus_threshold, "lower_bound": bound}
    return tensors, numbers, reals


@pytest.mark.parametrize("spec", CASES, ids=lambda spec: spec.name)
def test_triton_gets_the_parameters_that_are_not_compiled_in(spec):
    from isokern.backends.triton.kernel import recurrent

    call = call_of(spec)
    block = launched("triton", call).parameters
    tensors, numbers, reals = triton_values(call)
    at = 0

    def read(kind):
        nonlocal at
        at += -at % ctypes.sizeof(kind)
        value = kind.from_buffer_copy(block, at).value
        at += ctypes.sizeof(kind)
        return value

    always_there = {p.name for p in recurrent.params if p.do_not_specialize}
    for parameter in recurrent.params:
        name = parameter.name
        if tensors.get(name) is not None:
            assert read(ctypes.c_uint64) == tensors[name].data_ptr(), name
        elif name in reals:
            assert read(ctypes.c_float) == single(reals[name]), name
        elif name in numbers and (numbers[name] != 1 or name in always_there):
            assert read(ctypes.c_int32) == numbers[name], name
        else:
            assert parameter.is_constexpr or numbers.get(name) == 1 or tensors[name] is None
    assert read(ctypes.c_uint64) == read(ctypes.c_uint64) == 0, "no scratch memory"
    assert at == len(block)


def test_triton_passes_large_strides_in_eight_bytes():
    call = call_of(DECODE)
    row = 2**31 + 64
    call = call.replace(pool=torch.empty(4 * 32 * 16).as_strided((1, 4, 32, 16), (row, 512, 16, 1)))
    block = launched("triton", call).parameters
    assert row.to_bytes(8, "little") in block


# ---- the launch itself


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_the_launch_is_the_kernels(framework):
    call = call_of(DECODE.but(lengths=(2, 1, 4)))
    compiler, *_ = compiler_of(framework, call.problem("eager"))
    launch = launched(framework, call)
    assert launch.block == (64, 1, 1)
    assert launch.grid == compiler.layout(call).grid
    x, y, z = launch.grid
    assert (x % call.hv, y, z) == (0, 3, 1)
    assert launch.shared == 0
    assert launch.attributes == b""


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_grid_lays_sequences_along_y_and_then_z(framework):
    few, many = (
        call_of(DECODE.but(lengths=(1,) * n, h=2, hv=2, k=4, v=4, state_dtype=None, extra_slots=0)) for n in (4, 70_000)
    )
    compiler, *_ = compiler_of(framework, few.problem("eager"))
    x, y, z = compiler.layout(few).grid
    assert (x % 2, y, z) == (0, 4, 1)
    assert compiler.layout(many).grid == (x, 65535, 2)


@pytest.mark.parametrize("framework", FRAMEWORKS)
@pytest.mark.parametrize("spec", [DECODE.but(lengths=()), DECODE.but(lengths=(0, 0), varlen=False)], ids=["N=0", "T=0"])
def test_nothing_is_launched_for_nothing(framework, spec):
    call = call_of(spec)
    launcher, library = launcher_of(framework, call)
    launcher(call)
    launcher.pin(call)(tuple(given(call).values()))
    assert library.launches == []
