"""Pinned runners: a repeated call changes addresses and the stream alone, and no call gets another's arguments."""

import ctypes
import gc
import threading
import weakref
from dataclasses import replace

import pytest
import torch

from isokern.backends.launch.compiler import Layout, Variant
from isokern.backends.launch.driver import address_of
from isokern.backends.launch.image import Image
from isokern.backends.launch.launcher import MOST_PINNED, Launcher
from isokern.backends.launch.recording import RecordingLibrary
from isokern.errors import BackendFailedError
from isokern.registry.backend import Config, Pinnable
from isokern.registry.ops.fused_sigmoid_gating.call import TENSORS
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

SPEC = CaseSpec("decode", (1, 1), k=8, v=8)
PROBLEM = describe(SPEC, "cuda", 90)
POOL, Q = TENSORS.index("pool"), TENSORS.index("q")


def call_of(spec=SPEC, seed=0):
    call = canonical_call(**make_inputs(spec, seed).kwargs)
    call.out = torch.empty(call.v.shape, dtype=call.q.dtype)
    return call


def tensors_of(call):
    return tuple(getattr(call, name) for name in TENSORS)


class Compiler:
    """Three pointers (q, pool, out) around q's token stride; pool and q must be aligned for the wide kernel."""

    def __init__(self, **image):
        self.image_fields = image
        self.compiled = []
        self.vectors = (Q, POOL)
        self.places = ((Q, 0), (POOL, 16), (TENSORS.index("out"), 24))
        self.scratch = None

    def layout(self, call):
        block = bytearray(40)
        block[8:16] = call.q.stride(1).to_bytes(8, "little")
        grid = (call.n * call.hv, 1, 1)
        return Layout(bytes(block), self.places, grid, self.vectors, key=call.q.stride(1), scratch=self.scratch)

    def expected(self):
        return (Variant(32, wide=True),) if self.image_fields.pop("expected", False) else ()

    def errors(self):
        return (RuntimeError,)

    def image(self, variant, fresh=False):
        self.compiled.append(variant)
        return Image(repr(variant).encode(), "kernel", threads=32, **self.image_fields)


def made(**image):
    library, compiler = RecordingLibrary(), Compiler(**image)
    return Launcher("planted", PROBLEM, Config(), compiler, library.driver()), library, compiler


def words(launch):
    return list(memoryview(launch.parameters).cast("q"))


def test_a_pinned_call_passes_what_the_unpinned_one_does():
    launcher, library, _ = made()
    assert isinstance(launcher, Pinnable)
    first, second = call_of(), call_of(seed=1)
    pinned = launcher.pin(first)
    for call in (first, second):
        launcher(call)
        pinned(tensors_of(call))
        assert library.launches[-1] == library.launches[-2]
        assert words(library.launches[-1])[:4] == [
            call.q.data_ptr(),
            call.q.stride(1),
            call.pool.data_ptr(),
            call.out.data_ptr(),
        ]


def test_whoever_has_the_addresses_may_launch_by_them_on_any_stream():
    launcher, library, _ = made()
    call = call_of()
    launcher.pin(call)(tensors_of(call))
    prepared = launcher.prepared(call)
    [step] = prepared.steps
    addresses = [tensors_of(call)[index].data_ptr() for index in step.order]
    [launch] = step.launches
    assert launch(addresses, 9, 0) is None, "no memory of its own"
    assert replace(library.launches[-1], stream=0) == library.launches[-2]
    assert library.launches[-1].stream == 9
    launch([*addresses[:-1], addresses[-1] + 64], 0, 0)
    assert words(library.launches[-1])[3] == call.out.data_ptr() + 64


def test_a_kernel_s_own_memory_is_handed_to_whoever_launches_it():
    launcher, library, compiler = made(scratch=40)
    compiler.scratch = 32
    call = call_of()
    [step] = launcher.prepared(call).steps
    memory = step.launches[0]([tensors_of(call)[index].data_ptr() for index in step.order], 0, 0)
    assert memory.numel() == 40 * call.n * call.hv
    assert words(library.launches[-1])[4] == memory.data_ptr()


def test_pinning_runs_nothing_and_keeps_no_tensor():
    launcher, library, _ = made()
    call = call_of()
    pool = weakref.ref(call.pool)
    pinned = launcher.pin(call)
    assert library.launches == []
    del call
    gc.collect()
    assert pool() is None
    assert pinned is not None


def test_each_launch_goes_to_the_stream_that_is_current_then():
    launcher, library, _ = made()
    pinned = launcher.pin(call_of())
    for stream in (7, 2**40, 0):
        library.stream = stream
        pinned(tensors_of(call_of()))
        assert library.launches[-1].stream == stream


def test_tensors_on_another_device_launch_there():
    launcher, library, _ = made()
    pinned = launcher.pin(call_of())  # tensors of a CPU: device None
    library.device = 3
    pinned(tensors_of(call_of()))
    assert library.launches[-1].device is None
    assert library.device == 3, "the caller's device is current again"


CHANGES = {
    "another stride of q": lambda call: call.replace(q=torch.empty(1, 2, 2, 16, dtype=call.q.dtype)[..., :8]),
    "a stride of the pool": lambda call: call.replace(pool=torch.empty(9, 4, 8, 16)[..., ::2]),
    "a stride of the output": lambda call: call.replace(out=torch.empty(1, 2, 4, 16, dtype=call.q.dtype)[..., :8]),
    "a dtype of indices": lambda call: call.replace(read_slots=call.read_slots.long()),
    "another scale": lambda call: call.replace(scale=0.5),
    "no pool": lambda call: call.replace(pool=None, read_slots=None),
    "another number of sequences": lambda call: call_of(SPEC.but(lengths=(1, 1, 1))),
    "a lower bound": lambda call: call.replace(lower_bound=0.0),
    "another state layout": lambda call: call.replace(state_layout="vk"),
    "no normalisation": lambda call: call.replace(use_qk_l2norm=False),
    "other draft steps": lambda call: call.replace(parents=torch.empty(2, 3, dtype=torch.int32)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_different_call_is_packed_anew(change):
    launcher, _, compiler = made()
    compiler.places, compiler.vectors = compiler.places[:1], ()
    packed = []
    layout = compiler.layout
    compiler.layout = lambda call: packed.append(call) or layout(call)
    call = call_of()
    launcher(call)
    launcher(call)
    assert len(packed) == 1
    launcher(CHANGES[change](call))
    assert len(packed) == 2
    launcher(call)
    assert len(packed) == 2


def test_every_stride_of_every_tensor_tells_calls_apart():
    launcher, _, compiler = made()
    compiler.vectors = ()
    packed = []
    layout = compiler.layout
    compiler.layout = lambda call: packed.append(call) or layout(call)
    call = call_of(SPEC.but(lengths=(2, 2), verify="tree", update="separate", is_kda=True))
    launcher(call)
    flipped = 0
    for name, t in call.tensors().items():
        for axis in range(t.dim()):
            strides = [stride + (i == axis) for i, stride in enumerate(t.stride())]
            other = torch.zeros(4 * t.numel() + 64, dtype=t.dtype).as_strided(t.shape, strides)
            flipped += 1
            launcher(call.replace(**{name: other}))
            assert len(packed) == 1 + flipped, f"{name}, axis {axis}"


def test_every_dtype_and_absence_tells_calls_apart():
    launcher, _, compiler = made()
    compiler.vectors, compiler.places = (), ((Q, 0), (TENSORS.index("k"), 8))
    packed = []
    layout = compiler.layout
    compiler.layout = lambda call: packed.append(call) or layout(call)
    call = call_of(SPEC.but(lengths=(2, 2), verify="tree", update="separate", is_kda=True))
    launcher(call)
    others = [
        {name: t.to(torch.float64 if t.is_floating_point() else torch.int64)} for name, t in call.tensors().items()
    ]
    others += [{name: None} for name in ("pool", "read_slots", "write_slots", "intermediates", "parents")]
    for number, other in enumerate(others, start=1):
        launcher(call.replace(**other))
        assert len(packed) == 1 + number, other


def test_forms_of_unpinned_calls_are_bounded():
    launcher, _, _ = made()
    for n in range(MOST_PINNED + 3):
        launcher(call_of().replace(scale=float(n)))
    assert len(launcher._forms) == MOST_PINNED


def test_an_output_is_allocated_only_if_none_is_given():
    launcher, library, _ = made()
    call = call_of()
    assert launcher(call) is call.out
    call.out = None
    made_out = launcher(call)
    assert (made_out.shape, made_out.dtype) == (call.v.shape, call.q.dtype)
    assert words(library.launches[-1])[3] == made_out.data_ptr()
    assert call.out is None


# ---- alignment


def shifted(t):
    """The same shape and strides, one element off alignment."""
    storage = torch.zeros(t.numel() + 1, dtype=t.dtype)
    return storage[1:].view(t.shape)


@pytest.mark.parametrize("name", ["q", "pool"])
def test_unaligned_tensors_take_the_other_kernel_and_back(name):
    launcher, library, compiler = made()
    call = call_of()
    off = call.replace(**{name: shifted(getattr(call, name))})
    pinned = launcher.pin(call)
    assert compiler.compiled == [Variant(16, wide=True)]
    for one, wide in ((call, True), (off, False), (call, True), (off, False)):
        pinned(tensors_of(one))
        assert library.launches[-1].code == repr(Variant(16, wide)).encode()
        assert words(library.launches[-1])[2] == one.pool.data_ptr()
    assert len(compiler.compiled) == 2, "each compiled once"


@pytest.mark.parametrize("count", range(1, 8))
def test_each_of_however_many_tensors_must_be_aligned(count):
    launcher, library, compiler = made()
    names = ("q", "k", "v", "a", "b", "pool", "out")
    compiler.places = tuple((TENSORS.index(name), 8 * at) for at, name in enumerate(names))
    compiler.vectors = tuple(TENSORS.index(name) for name in names[-count:])
    layout = compiler.layout
    compiler.layout = lambda call: replace(layout(call), block=bytes(8 * len(names)))
    call = call_of()
    pinned = launcher.pin(call)
    for name in names:
        for one, wide in (
            (call, True),
            (call.replace(**{name: shifted(getattr(call, name))}), name not in names[-count:]),
        ):
            pinned(tensors_of(one))
            assert library.launches[-1].code == repr(Variant(16, wide)).encode(), name
            assert words(library.launches[-1]) == [getattr(one, place).data_ptr() for place in names]


def test_what_an_unaligned_example_needs_is_compiled_when_pinned():
    launcher, _, compiler = made()
    call = call_of()
    launcher.pin(call.replace(pool=shifted(call.pool)))
    assert compiler.compiled == [Variant(16, wide=False)]


def test_tensors_that_are_read_one_by_one_need_no_alignment():
    launcher, library, compiler = made()
    compiler.vectors = (POOL,)
    call = call_of()
    pinned = launcher.pin(call)
    pinned(tensors_of(call.replace(q=shifted(call.q))))
    assert library.launches[-1].code == repr(Variant(16, wide=True)).encode()


# ---- threads


def test_threads_share_no_memory_that_is_written():
    """A launch in one thread, stopped before the driver reads it, sees nothing of another thread's."""
    launcher, library, _ = made()
    mine, other = call_of(), call_of(seed=1)
    pinned = launcher.pin(mine)
    launch = library.cuLaunchKernelEx
    places = []

    def slowly(config, handle, params, extra):
        places.append(address_of(config))
        if threading.current_thread() is threading.main_thread():
            library.stream = 2
            worker = threading.Thread(target=pinned, args=(tensors_of(other),))
            worker.start()
            worker.join()
        return launch(config, handle, params, extra)

    library.stream = 1
    library.cuLaunchKernelEx = slowly
    again = launcher.pin(mine)
    pinned = again
    again(tensors_of(mine))
    theirs, ours = library.launches
    assert (words(ours)[0], ours.stream) == (mine.q.data_ptr(), 1)
    assert (words(theirs)[0], theirs.stream) == (other.q.data_ptr(), 2)
    assert len(set(places)) == 2


def test_a_thread_without_a_context_gets_one_and_launches_again():
    launcher, library, _ = made()
    launch, tried = library.cuLaunchKernelEx, []

    def refused_once(*arguments):
        tried.append(library.device)
        return 201 if len(tried) == 1 else launch(*arguments)

    library.cuLaunchKernelEx = refused_once
    awake = []
    driver = replace(library.driver(), awake=lambda device: awake.append(device) or library._on(device))
    call = call_of()
    Launcher("planted", PROBLEM, Config(), launcher.compiler, driver).pin(call)(tensors_of(call))
    assert len(tried) == 2
    assert len(awake) == 2, "when the kernel was loaded, and now"
    assert len(library.launches) == 1


def test_a_context_that_is_gone_is_an_error_after_one_more_try():
    launcher, library, _ = made()
    library.codes["cuLaunchKernelEx"] = 201
    with pytest.raises(BackendFailedError, match="handle is stale"):
        launcher(call_of())


# ---- what the driver is told


def attribute(launch, index):
    """Id and first three words of the value of one CUlaunchAttribute."""
    raw = launch.attributes[72 * index : 72 * (index + 1)]
    return int.from_bytes(raw[:4], "little"), [int.from_bytes(raw[i : i + 4], "little") for i in (8, 12, 16)]


def test_attributes_of_an_image_reach_the_driver():
    driver = pytest.importorskip("cuda.bindings.driver", reason="names the driver's constants")
    which = driver.CUlaunchAttributeID
    launcher, library, _ = made(shared=1024, cluster=2, cooperative=True, overlaps=True)
    launcher(call_of())
    (launch,) = library.launches
    assert launch.grid == (2 * 2 * 4, 1, 1), "blocks of all clusters"
    assert launch.shared == 1024
    assert [attribute(launch, i) for i in range(len(launch.attributes) // 72)] == [
        (which.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION.value, [1, 0, 0]),
        (which.CU_LAUNCH_ATTRIBUTE_COOPERATIVE.value, [1, 0, 0]),
        (which.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION.value, [2, 1, 1]),
        (
            which.CU_LAUNCH_ATTRIBUTE_CLUSTER_SCHEDULING_POLICY_PREFERENCE.value,
            [driver.CUclusterSchedulingPolicy.CU_CLUSTER_SCHEDULING_POLICY_SPREAD.value, 0, 0],
        ),
    ]


def test_the_launch_config_is_the_drivers_structure():
    driver = pytest.importorskip("cuda.bindings.driver", reason="knows the driver's structures")
    launcher, library, _ = made(shared=512)
    library.stream = 0x1234
    seen = []

    def look(config, handle, params, extra):
        theirs = driver.CUlaunchConfig(_ptr=address_of(config))
        seen.append((theirs.gridDimX, theirs.blockDimX, theirs.sharedMemBytes, int(theirs.hStream), theirs.numAttrs))
        return 0

    library.cuLaunchKernelEx = look
    launcher(call_of())
    assert seen == [(8, 32, 512, 0x1234, 0)]


def test_kernels_are_told_what_they_need_beyond_the_usual():
    launcher, library, _ = made(shared=100_000, cluster=16)
    launcher(call_of())
    assert library.settings == [(8, 100_000), (14, 1)]
    launcher(call_of())
    assert len(library.settings) == 2, "once"


def test_scratch_memory_is_allocated_for_each_launch():
    launcher, library, compiler = made(scratch=256)
    compiler.scratch = 32
    launcher(call_of())
    launcher(call_of())
    assert all(words(launch)[4] for launch in library.launches)


def test_equal_machine_code_is_loaded_once():
    library, compiler = RecordingLibrary(), Compiler()
    driver = library.driver()
    for _ in range(3):
        Launcher("planted", PROBLEM, Config(), compiler, driver)(call_of())
    assert len(library.loaded) == 1


def test_the_expected_kernel_is_compiled_when_bound():
    _, library, compiler = made(expected=True)
    assert compiler.compiled == [Variant(32, wide=True)]
    assert len(library.loaded) == 1


def test_a_frame_lies_still():
    """The driver is given addresses: the words they point into must not move."""
    launcher, library, _ = made()
    places = []
    library.cuLaunchKernelEx = lambda config, handle, params, extra: (
        places.append((address_of(config), address_of(extra))) or 0
    )
    pinned = launcher.pin(call_of())
    kept = [ctypes.create_string_buffer(4096) for _ in range(50)]
    for _ in range(3):
        pinned(tensors_of(call_of()))
        kept.append(ctypes.create_string_buffer(4096))
    assert len(set(places)) == 1
