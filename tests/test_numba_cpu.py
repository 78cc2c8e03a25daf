"""numba_cpu: every argument of the contract, judged against the float64 reference, and the bits it promises."""

import os
import subprocess
import sys
import threading
from dataclasses import replace

import numba
import numpy as np
import pytest
import torch

from isokern.backends.numba_cpu import parameters
from isokern.backends.numba_cpu.backend import NumbaCpu
from isokern.backends.numba_cpu.formats import CODES
from isokern.backends.numba_cpu.kernel import Kernel
from isokern.backends.numba_cpu.launcher import Launcher
from isokern.backends.numba_cpu.rows import bounded_decay_row, decay_row, decode_row, encode_row
from isokern.registry.backend import Config
from isokern.registry.decision import RejectCode
from isokern.registry.ops.fused_sigmoid_gating.case import DISTRIBUTIONS, CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.gates import log_decay
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.judge import judge
from isokern.registry.ops.fused_sigmoid_gating.reference import reference
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

BACKEND = NumbaCpu()
BASE = CaseSpec("base", (35, 0, 6, 1), padded=(2,), k=48, v=40)
DTYPES = ("float32", "bfloat16", "float16")


def call_of(inputs):
    return canonical_call(**inputs.kwargs)


def run(call, v_tile=32):
    """Run on poisoned outputs; returns the output."""
    call.out = torch.full(call.v.shape, torch.nan, dtype=call.v.dtype) if call.out is None else call.out
    problem = call.problem()
    assert BACKEND.check(problem)
    return BACKEND.bind(problem, Config.of(v_tile=v_tile))(call)


def run_spec(spec, v_tile=32, **changes):
    """Output, pool and buffer of a made-up call, some of its arguments replaced."""
    inputs = make_inputs(spec)
    inputs.kwargs.update(changes)
    return run(call_of(inputs), v_tile), inputs.pool_storage, inputs.intermediate_storage


def same_bits(x, y):
    if x is None or y is None:
        return x is y
    bits = {2: torch.int16, 4: torch.int32}[x.element_size()]
    return x.shape == y.shape and torch.equal(x.contiguous().view(bits), y.contiguous().view(bits))


CASES = [
    *(BASE.but(name=d, distribution=d) for d in DISTRIBUTIONS),
    *(BASE.but(name=f"KDA {d}", distribution=d, is_kda=True) for d in DISTRIBUTIONS),
    *(BASE.but(name=f"io {d}", io_dtype=d) for d in DTYPES),
    *(BASE.but(name=f"pool {d} {x}", state_dtype=d, state_layout=x) for d in DTYPES for x in ("kv", "vk")),
    *(BASE.but(name=f"gates {d}", gate_dtype=d, A_log_dtype=d, dt_bias_dtype=d) for d in (*DTYPES, "float64")),
    BASE.but(name="mixed gate dtypes", gate_dtype="float16", A_log_dtype="bfloat16", dt_bias_dtype="float16"),
    *(BASE.but(name=f"chain {d}", verify="chain", intermediate_dtype=d) for d in DTYPES),
    *(BASE.but(name=f"chain {d} vk", verify="chain", intermediate_dtype=d, state_layout="vk") for d in DTYPES),
    *(BASE.but(name=f"tree {x}", verify="tree", state_layout=x) for x in ("kv", "vk")),
    # A tree is short; through a rounded state the output dtype's limits do not hold for long.
    *(
        BASE.but(name=f"tree {d} {x}", lengths=(7, 0, 5), verify="tree", intermediate_dtype=d, state_layout=x, v=32)
        for d in ("bfloat16", "float16")
        for x in ("kv", "vk")
    ),
    BASE.but(name="tree from a bfloat16 pool", verify="tree", state_dtype="bfloat16"),
    BASE.but(name="tree without a pool", verify="tree", state_dtype=None, padded=()),
    *(BASE.but(name=f"update {u}", update=u, fresh=(0,) if u == "separate" else ()) for u in ("separate", "disabled")),
    *(BASE.but(name=f"chain, {u}", verify="chain", update=u) for u in ("separate", "disabled")),
    BASE.but(name="no pool", state_dtype=None, padded=()),
    *(BASE.but(name=f"strides {s}", strides=s, extra_rows=3) for s in ("rows", "any")),
    *(BASE.but(name=f"strides {s} KDA vk", strides=s, is_kda=True, state_layout="vk") for s in ("rows", "any")),
    BASE.but(name="strides any, fp16 pool", strides="any", state_dtype="float16", io_dtype="float16"),
    BASE.but(name="lower bound", is_kda=True, lower_bound=-5.0),
    BASE.but(name="lower bound extreme", is_kda=True, lower_bound=-5.0, distribution="extreme"),
    BASE.but(name="negative eigenvalues", neg_eigval=True),
    BASE.but(name="negative eigenvalues, raw keys", neg_eigval=True, l2norm=False),
    BASE.but(name="scale", scale=0.7, l2norm=False),
    BASE.but(name="softplus", softplus_beta=0.5, softplus_threshold=3.0),
    BASE.but(name="softplus KDA", softplus_beta=2.5, softplus_threshold=8.0, is_kda=True),
    BASE.but(name="int64 indices", index_dtype="int64", cu_dtype="int64", verify="tree"),
    BASE.but(name="a layout, padding rows", as_layout=True, extra_rows=5),
    BASE.but(name="rows of a batch", varlen=False, lengths=(3, 3, 3)),
    BASE.but(name="rows of a batch, any strides", varlen=False, lengths=(3, 3, 3), strides="any"),
    *(
        BASE.but(name=f"K={k} V={v} HV/H={hv}/{h}", k=k, v=v, h=h, hv=hv, state_layout=x, lengths=(33, 2), padded=())
        for k, v, h, hv, x in (
            (96, 192, 1, 3, "kv"),
            (5, 5, 2, 4, "vk"),
            (1, 1, 1, 1, "kv"),
            (1, 33, 1, 2, "vk"),
            (33, 1, 3, 3, "vk"),
            (256, 17, 1, 8, "vk"),
            (16, 256, 1, 1, "kv"),
        )
    ),
]


@pytest.mark.parametrize("spec", CASES, ids=lambda s: s.name)
def test_results_are_within_the_bound_and_nothing_else_is_touched(spec):
    inputs = make_inputs(spec)
    before, again = inputs.clone(), inputs.clone()
    call = call_of(inputs)
    exact = reference(call)
    out = run(call)
    verdict = judge(call, out, exact)
    assert verdict.ok, verdict
    end = call.offsets[-1]
    assert torch.isnan(out.flatten(0, 1)[end:]).all()
    for name, value in inputs.kwargs.items():
        if isinstance(value, torch.Tensor) and name not in (
            "initial_state_source",
            "intermediate_states_buffer",
        ):
            assert torch.equal(value, before.kwargs[name]), name
    for storage, old, named in (
        (inputs.pool_storage, before.pool_storage, written_slots(call)),
        (inputs.intermediate_storage, before.intermediate_storage, call.intermediate_rows),
    ):
        if storage is not None:
            spared = [s for s in range(len(storage)) if named is None or s - 1 not in named.tolist()]
            assert same_bits(storage[spared], old[spared])
    second = call_of(again)
    assert same_bits(run(second), out)
    assert same_bits(again.pool_storage, inputs.pool_storage)
    assert same_bits(again.intermediate_storage, inputs.intermediate_storage)


def written_slots(call):
    if call.write_slots is None:
        return None
    lengths = call.offsets[1:]
    busy = [n for n in range(call.n) if lengths[n] > call.offsets[n]]
    return call.write_slots[busy]


def test_steps_beyond_a_sequence_are_not_stored():
    spec = BASE.but(lengths=(2, 0, 3), verify="chain", padded=())
    inputs = make_inputs(spec)
    before = inputs.clone().kwargs["intermediate_states_buffer"]
    call = call_of(inputs)
    run(call)
    for row, length in zip(call.intermediate_rows.tolist(), spec.lengths, strict=True):
        assert same_bits(call.intermediates[row, length:], before[row, length:])


@pytest.mark.parametrize(
    "spec",
    [
        BASE.but(v=200),
        BASE.but(v=200, state_layout="vk", state_dtype="float16", is_kda=True),
        BASE.but(v=200, verify="tree", intermediate_dtype="bfloat16", lengths=(6, 3), padded=()),
    ],
    ids=["kv", "vk", "tree"],
)
def test_a_config_changes_no_bit(spec):
    problem = call_of(make_inputs(spec)).problem()
    configs = BACKEND.configs(problem)
    assert len(configs) == 4
    first = run_spec(spec, configs[0]["v_tile"])
    for config in configs[1:]:
        for x, y in zip(run_spec(spec, config["v_tile"]), first, strict=True):
            assert same_bits(x, y)


def test_threads_change_no_bit():
    spec = BASE.but(lengths=(70, 3, 40), hv=8, k=64, v=128, padded=())
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(run_spec(spec))
    finally:
        torch.set_num_threads(threads)
    assert all(same_bits(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.parametrize("kda", [False, True])
def test_a_packed_sequence_equals_the_sequence_alone(kda):
    spec = BASE.but(lengths=(35, 1, 6), padded=(), is_kda=kda)
    inputs = make_inputs(spec)
    kwargs = inputs.kwargs
    alone = inputs.clone().kwargs
    out = run(call_of(inputs))
    at = 0
    for n, length in enumerate(spec.lengths):
        rows = {x: alone[x][:, at : at + length] for x in ("q", "k", "v", "a", "b")}
        one = {**alone, **rows, "cu_seqlens": None, "initial_state_indices": alone["initial_state_indices"][n : n + 1]}
        assert same_bits(run(canonical_call(**one)), out[:, at : at + length])
        at += length
    assert same_bits(alone["initial_state_source"], kwargs["initial_state_source"])


@pytest.mark.parametrize("cuts", [(1,) * 40, (32, 8), (33, 7)])
def test_a_sequence_cut_up_with_its_state_carried_equals_the_whole(cuts):
    spec = BASE.but(lengths=(40,), padded=())
    whole, parts = make_inputs(spec), make_inputs(spec).kwargs
    out = run(call_of(whole))
    at = 0
    for length in cuts:
        rows = {x: parts[x][:, at : at + length] for x in ("q", "k", "v", "a", "b")}
        assert same_bits(run(canonical_call(**{**parts, **rows, "cu_seqlens": None})), out[:, at : at + length])
        at += length
    assert same_bits(parts["initial_state_source"], whole.kwargs["initial_state_source"])


def test_layouts_and_update_modes_agree_in_bits():
    spec = BASE.but(v=48)
    inputs = make_inputs(spec)
    out, pool = run(call_of(inputs)), inputs.kwargs["initial_state_source"]
    other = make_inputs(spec).kwargs
    other["initial_state_source"] = other["initial_state_source"].transpose(-1, -2).contiguous()
    other["state_layout"] = "vk"
    assert same_bits(run(canonical_call(**other)), out)
    assert same_bits(other["initial_state_source"].transpose(-1, -2), pool)
    for changes in ({"verify": "chain"}, {"update": "disabled"}):
        assert same_bits(run_spec(spec.but(**changes))[0], out)


def test_columns_and_heads_are_independent():
    spec = BASE.but(lengths=(35, 2), padded=(), h=2, hv=4)
    inputs = make_inputs(spec)
    kwargs, pool = make_inputs(spec).kwargs, make_inputs(spec).kwargs["initial_state_source"]
    out = run(call_of(inputs))
    order = torch.randperm(spec.v, generator=torch.Generator().manual_seed(1))
    shuffled = {**kwargs, "v": kwargs["v"][..., order], "initial_state_source": pool[..., order].contiguous()}
    assert same_bits(run(canonical_call(**shuffled)), out[..., order])
    upper = {x: kwargs[x][:, :, 2:] for x in ("v", "a", "b")}
    upper |= {x: kwargs[x][:, :, 1:] for x in ("q", "k")}
    upper |= {x: kwargs[x][2:] for x in ("A_log", "dt_bias")}
    one = {**kwargs, **upper, "initial_state_source": pool[:, 2:].contiguous()}
    assert same_bits(run(canonical_call(**one)), out[:, :, 2:])


@pytest.mark.parametrize("factor", [4.0, 2.0**-5, -1.0])
def test_values_and_state_scale_exactly(factor):
    spec = BASE.but(io_dtype="float32", padded=())
    out, pool, _ = run_spec(spec)
    kwargs = make_inputs(spec).kwargs
    state = kwargs["initial_state_source"] * factor
    got, *_ = run_spec(spec, v=kwargs["v"] * factor, initial_state_source=state)
    assert torch.equal(got, out * factor)
    assert torch.equal(state, pool[1:-1] * factor)


def test_a_not_a_number_stays_in_its_column_and_infinity_does_not_crash():
    spec = BASE.but(lengths=(5, 4), padded=(), l2norm=True)
    v = make_inputs(spec).kwargs["v"]
    v[0, 2, 1, 7] = torch.nan
    out, *_ = run_spec(spec, v=v)
    expected = torch.zeros(out.shape, dtype=torch.bool)
    expected[0, 2:5, 1, 7] = True
    assert torch.equal(torch.isnan(out), expected)
    for name, value in (("a", torch.inf), ("a", -torch.inf), ("b", torch.inf), ("k", torch.inf), ("q", torch.nan)):
        changed = make_inputs(spec).kwargs[name]
        changed[0, 0] = value
        out, *_ = run_spec(spec, **{name: changed})
        assert not torch.isnan(out[0, 5:]).any(), "the other sequence is unaffected"


def test_sequences_may_read_one_slot_and_write_their_own():
    spec = BASE.but(lengths=(6, 5), padded=(), update="separate", extra_slots=0)
    read, write = torch.tensor([1, 1], dtype=torch.int32), torch.tensor([0, 2], dtype=torch.int32)
    inputs = make_inputs(spec)
    inputs.kwargs.update(initial_state_indices=read, output_state_indices=write)
    call = call_of(inputs)
    exact = reference(call)
    assert judge(call, run(call), exact).ok


@pytest.mark.parametrize("lengths", [(), (0,), (0, 0)])
def test_nothing_to_do_is_done(lengths):
    spec = BASE.but(lengths=lengths, padded=())
    inputs = make_inputs(spec)
    before = inputs.clone()
    assert run(call_of(inputs)).shape == (1, 0, spec.hv, spec.v)
    assert same_bits(inputs.pool_storage, before.pool_storage)


def test_a_strided_out_is_written_in_place_and_no_out_means_a_new_one():
    spec = BASE.but(extra_rows=2)
    expected, *_ = run_spec(spec)
    call = call_of(make_inputs(spec))
    wide = torch.full((*call.v.shape, 2), torch.nan, dtype=call.v.dtype)
    call.out = wide[..., 0]
    assert run(call) is call.out
    assert same_bits(wide[:, :-2, ..., 0], expected[:, :-2])
    assert torch.isnan(wide[..., 1]).all()
    fresh = call_of(make_inputs(spec))
    made = BACKEND.bind(fresh.problem(), Config.of(v_tile=32))(fresh)
    assert same_bits(made[:, :-2], expected[:, :-2])


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"device": "cuda"}, RejectCode.DEVICE),
        ({"io_dtype": "float64"}, RejectCode.DTYPE),
        ({"state_dtype": "float64"}, RejectCode.DTYPE),
        ({"intermediate_dtype": "float64"}, RejectCode.DTYPE),
        ({"grad": True}, RejectCode.GRAD),
    ],
)
def test_what_is_declined(changes, code):
    problem = call_of(make_inputs(BASE)).problem()
    assert BACKEND.check(problem)
    verdict = BACKEND.check(replace(problem, **changes))
    assert not verdict
    assert verdict.code is code


def test_the_default_config_follows_length_and_width():
    def default(**changes):
        return BACKEND.configs(call_of(make_inputs(BASE.but(padded=(), **changes))).problem())[0]["v_tile"]

    assert default(v=128, lengths=(1, 1)) == 128
    assert default(v=128, lengths=(8, 4)) == 128
    assert default(v=128, lengths=(64,)) == 32
    assert default(v=16, lengths=(1, 1)) == 16


class Worker:
    """Stands for compiled code where only the parameter block matters."""

    address = 0


def test_scratch_does_not_grow_with_the_prompt():
    seen = []

    def record(_address, integers, _reals):
        seen.append(int(integers[parameters.SCRATCH]))

    kernel = Kernel(Worker(), record, record, threads=2, exclusive=False, process=-1)
    for tokens in (64, 4096):
        Launcher(kernel, 32)(call_of(make_inputs(BASE.but(lengths=(tokens,), padded=(), k=8, v=8))))
    assert seen[0] == seen[1] > 0


# --- conversions and gates, on their own -----------------------------------------------------------------------------


@numba.njit
def decoded(target, source, stride, code):
    decode_row(target.ctypes.data, source.ctypes.data, stride, target.size, code)
    return target[0], source[0]


@numba.njit
def encoded(target, source, stride, code):
    encode_row(target.ctypes.data, stride, source.ctypes.data, source.size, code)
    return target[0], source[0]


def bits_of(tensor):
    return tensor.view(torch.int16 if tensor.element_size() == 2 else torch.int32).numpy()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_pattern_decodes_exactly(dtype, stride):
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    source = torch.zeros(2**16, stride, dtype=torch.int16)
    source[:, 0] = patterns
    target = np.zeros(2**16, np.float32)
    decoded(target, source.numpy().reshape(-1), stride, CODES[str(dtype).removeprefix("torch.")])
    expected = patterns.view(dtype).float().numpy()
    assert np.array_equal(target, expected, equal_nan=True)
    assert np.array_equal(np.signbit(target), np.signbit(expected))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_encoding_rounds_to_nearest_even(dtype):
    exact = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
    finite = exact[torch.isfinite(exact)].sort().values
    ties = ((finite[1:].double() + finite[:-1].double()) / 2).float()
    around = torch.cat([torch.nextafter(ties, x * torch.ones(())) for x in (torch.inf, -torch.inf)])
    generator = torch.Generator().manual_seed(0)
    wild = torch.randint(-(2**31), 2**31 - 1, (1 << 16,), generator=generator, dtype=torch.int64).int()
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 65519.9, 65520.0, 3.4e38, 1e-45, -0.0, 2.0**-25])
    source = torch.cat([exact, ties, around, wild.view(torch.float32), special])
    target = np.zeros(source.numel(), np.int16)
    encoded(target, source.numpy(), 1, CODES[str(dtype).removeprefix("torch.")])
    got, expected = torch.from_numpy(target).view(dtype), source.to(dtype)
    nan = torch.isnan(source)
    assert torch.isnan(got[nan]).all()
    assert same_bits(got[~nan], expected[~nan])


@numba.njit
def decays(row, bias, A_log, beta, threshold):
    decay_row(row.ctypes.data, bias.ctypes.data, row.size, A_log, beta, threshold)
    return row[0], bias[0]


@numba.njit
def bounded_decays(row, bias, A_log, lower_bound):
    bounded_decay_row(row.ctypes.data, bias.ctypes.data, row.size, A_log, lower_bound)
    return row[0], bias[0]


@pytest.mark.parametrize("A_log", [-100.0, -6.0, 0.0, 2.5, 60.0, 88.0, 800.0])
@pytest.mark.parametrize(("beta", "threshold"), [(1.0, 20.0), (0.5, 3.0), (8.0, 40.0)])
def test_the_decay_is_float32_accurate_everywhere(A_log, beta, threshold):
    grid = torch.linspace(-120, 120, 4800)
    row = torch.cat([grid, grid / 100, torch.tensor([-1e30, 1e30, 0.0, -0.0, -1e-30, 1e-30] + [0.0] * 10)])
    expected = torch.exp(log_decay(torch.tensor(A_log).double(), row.double(), beta, threshold, None)).float()
    got = row.clone().numpy()
    decays(got, np.zeros_like(got), A_log, beta, threshold)
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1.3e-7, atol=1.5e-45)


@pytest.mark.parametrize("A_log", [-6.0, 0.0, 6.0, 800.0])
def test_the_bounded_decay_is_float32_accurate_everywhere(A_log):
    row = torch.linspace(-60, 60, 4800)
    expected = torch.exp(log_decay(torch.tensor(A_log).double(), row.double(), 1.0, 20.0, -5.0)).float()
    got = row.clone().numpy()
    bounded_decays(got, np.zeros_like(got), A_log, -5.0)
    torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1.3e-7, atol=0)


# --- calls from several threads --------------------------------------------------------------------------------------

TWO_THREADS = """
import threading, sys
import numba, torch
from isokern.backends.numba_cpu.backend import NumbaCpu
from isokern.registry.backend import Config
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call
torch.set_num_threads(2)
spec = CaseSpec("two", (64, 3), h=2, hv=4, k=64, v=64)
def work():
    for _ in range(30):
        call = canonical_call(**make_inputs(spec).kwargs)
        call.out = torch.empty_like(call.v)
        NumbaCpu().bind(call.problem(), Config.of(v_tile=32))(call)
threads = [threading.Thread(target=work) for _ in range(3)]
[t.start() for t in threads]
[t.join() for t in threads]
print(numba.threading_layer())
"""


def test_the_workqueue_layer_is_never_entered_twice_at_once():
    environment = {**os.environ, "NUMBA_THREADING_LAYER": "workqueue", "NUMBA_NUM_THREADS": "2"}
    done = subprocess.run(
        [sys.executable, "-c", TWO_THREADS], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "workqueue"


def test_threads_of_one_process_may_call_at_once():
    specs = [BASE.but(lengths=(40, 9), padded=(), k=64, v=64, seed=s) for s in range(3)]
    expected = [run_spec(s)[0] for s in specs]
    wrong = []

    def work(i):
        for _ in range(10):
            if not same_bits(run_spec(specs[i])[0], expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_importing_the_backend_compiles_and_imports_nothing():
    code = "import sys, isokern.backends.numba_cpu.backend; print('numba' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_the_fingerprint_covers_every_file_of_the_backend():
    names = {path.name for path in BACKEND.sources()}
    assert {"passes.py", "rows.py", "sequence.py", "launcher.py", "kernel.py", "formats.py"} <= names
    assert set(BACKEND.toolchain()) == {"numba", "llvmlite"}
