"""Failures of a launch are one typed error each, with the driver's words and what was being launched."""

import os
from dataclasses import replace

import pytest
import torch

from isokern.backends.launch import driver as drivers
from isokern.backends.launch import forks
from isokern.backends.launch.compiler import Layout, Variant
from isokern.backends.launch.image import Image
from isokern.backends.launch.launcher import Launcher
from isokern.backends.launch.recording import RecordingLibrary
from isokern.errors import BackendFailedError, ForkedProcessError, IsokernError, NotPreparedError
from isokern.registry.backend import Config
from isokern.registry.ops.fused_sigmoid_gating.call import TENSORS
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs
from isokern.registry.ops.fused_sigmoid_gating.validate import canonical_call

SPEC = CaseSpec("decode", (1, 1), k=8, v=8)
PROBLEM = describe(SPEC, "cuda", 90)
CONFIG = Config.of(v_tile=16)


def call_of(spec=SPEC):
    call = canonical_call(**make_inputs(spec).kwargs)
    call.out = torch.empty(call.v.shape, dtype=call.q.dtype)
    return call


class Compiler:
    """One pointer, the pool's."""

    expects = ()

    def __init__(self):
        self.codes = iter([b"code", b"another"])
        self.asked = []

    def layout(self, call):
        return Layout(bytes(16), ((TENSORS.index("pool"), 0),) * 1 + ((TENSORS.index("q"), 8),), (6, 1, 1))

    def expected(self):
        return self.expects

    def errors(self):
        return (ValueError,)

    def image(self, variant, fresh=False):
        self.asked.append(fresh)
        return Image(next(self.codes), "kernel", threads=256, shared=99_000)


def made(compiler=None, **codes):
    library = RecordingLibrary()
    library.codes.update(codes)
    return Launcher("planted", PROBLEM, CONFIG, compiler or Compiler(), library.driver()), library


def test_a_failed_launch_names_everything():
    launcher, library = made()
    call = call_of()
    before = call.pool.clone()
    pinned = launcher.pin(call)
    library.codes["cuLaunchKernelEx"] = 701
    for run in (lambda: launcher(call), lambda: pinned(tuple(getattr(call, name) for name in TENSORS))):
        with pytest.raises(BackendFailedError) as raised:
            run()
        error = raised.value
        assert (error.op, error.backend, error.config, error.stage) == (
            "fused_sigmoid_gating",
            "planted",
            "v_tile=16",
            "launch",
        )
        assert error.problem == PROBLEM.label
        for part in ("grid 6x1x1", "CUDA_ERROR_701 (701): the driver's own words"):
            assert part in str(error)
    assert torch.equal(call.pool, before)
    library.codes.clear()
    launcher(call)
    assert len(library.launches) == 1, "the next launch is none the worse"


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (400, "handle is stale"),
        (709, "device reset"),
        (700, "an earlier kernel on this device failed"),
        (901, "being captured is invalid"),
    ],
)
def test_known_codes_are_explained(code, words):
    launcher, _ = made(cuLaunchKernelEx=code)
    with pytest.raises(BackendFailedError, match=words):
        launcher(call_of())


@pytest.mark.parametrize("function", ["cuLibraryLoadData", "cuLibraryGetKernel", "cuKernelGetFunction", "cuFuncLoad"])
def test_a_kernel_that_does_not_load(function):
    launcher, library = made(**{function: 2})
    with pytest.raises(BackendFailedError, match="driver's own words") as raised:
        launcher(call_of())
    assert raised.value.stage == "load"
    assert library.launches == []


def test_a_runner_is_bound_while_a_gpu_of_another_architecture_is_current():
    """Its calls have their tensors on one that the code is for; those that do not say so."""
    compiler = Compiler()
    compiler.expects = (Variant(None, wide=True),)
    library = RecordingLibrary()
    library.device = 0
    library.codes["cuKernelGetFunction"] = 209  # no code for this GPU
    launcher = Launcher("planted", PROBLEM, CONFIG, compiler, library.driver())
    with pytest.raises(BackendFailedError, match="CUDA_ERROR_209"):
        launcher(call_of())
    library.codes.clear()
    launcher(call_of())
    assert len(library.launches) == 1
    assert compiler.asked == [False], "compiled once"


@pytest.mark.parametrize("function", ["cuKernelSetAttribute", "cuKernelGetFunction"])
def test_what_else_goes_wrong_while_a_runner_is_bound_is_said_then(function):
    compiler = Compiler()
    compiler.expects = (Variant(None, wide=True),)
    with pytest.raises(BackendFailedError, match="driver's own words"):
        made(compiler, **{function: 2})


def test_a_device_without_the_shared_memory():
    launcher, _ = made(cuKernelSetAttribute=1)
    with pytest.raises(BackendFailedError, match="256 threads and 99000 bytes of dynamic shared memory"):
        launcher(call_of())


def test_machine_code_that_the_driver_refuses_is_compiled_once_more():
    compiler = Compiler()
    launcher, library = made(compiler, cuLibraryLoadData=200)
    load = library.cuLibraryLoadData

    def refuse_first(library_at, code, *options):
        assert load(library_at, code, *options) == 200
        return 200 if code == b"code" else 0

    library.cuLibraryLoadData = refuse_first
    launcher(call_of())
    assert compiler.asked == [False, True]
    assert library.launches[0].code == b"another"


def test_machine_code_refused_twice_is_an_error():
    compiler = Compiler()
    launcher, _ = made(compiler, cuLibraryLoadData=209)
    with pytest.raises(BackendFailedError) as raised:
        launcher(call_of())
    assert (raised.value.stage, compiler.asked) == ("load", [False, True])


def test_a_kernel_that_does_not_compile():
    class Broken(Compiler):
        expects = (Variant(None, wide=True),)

        def image(self, variant, fresh=False):
            raise ValueError("line 7: what is this?")

    with pytest.raises(BackendFailedError, match=r"ValueError: line 7: what is this\?") as raised:
        made(Broken())
    assert raised.value.stage == "compile"


def test_an_error_of_ours_is_not_taken_for_the_compilers():
    class Broken(Compiler):
        def image(self, variant, fresh=False):
            raise KeyError("a bug")

    with pytest.raises(KeyError):
        made(Broken())[0](call_of())


def test_a_grid_that_is_too_large():
    compiler = Compiler()
    compiler.layout = lambda call: replace(Compiler().layout(call), grid=(2**31, 1, 1))
    launcher, library = made(compiler)
    with pytest.raises(BackendFailedError, match="more blocks than a grid holds"):
        launcher(call_of())
    assert library.launches == []


# ---- CUDA graphs


def test_in_a_capture_nothing_is_compiled_or_loaded():
    compiler = Compiler()
    launcher, library = made(compiler)
    library.capturing = True
    with pytest.raises(NotPreparedError, match=r"op\.prepare\(\.\.\.\).*`isokern warmup`") as raised:
        launcher(call_of())
    assert raised.value.config == "v_tile=16"
    assert (compiler.asked, library.loaded, library.launches) == ([], {}, [])


def test_in_a_capture_what_is_loaded_launches():
    launcher, library = made()
    pinned = launcher.pin(call_of())
    library.capturing = True
    pinned(tuple(getattr(call_of(), name) for name in TENSORS))
    launcher(call_of())
    assert len(library.launches) == 2


# ---- fork


def in_child(work):
    """The error that ``work()`` raises in a forked child, by name and text; empty if none."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            work()
            said = ""
        except IsokernError as error:
            said = f"{type(error).__name__}: {error}"
        os.write(write, said.encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return said


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_child_is_refused_before_the_driver_is_asked():
    forks.watch()
    launcher, library = made()
    call = call_of()
    pinned = launcher.pin(call)
    library.cuLaunchKernelEx = lambda *_: os._exit(1)  # what CUDA would do: anything
    fresh = made()[0]
    works = {
        "pinned": lambda: pinned(tuple(getattr(call, name) for name in TENSORS)),
        "called": lambda: launcher(call),
        "first call": lambda: fresh(call),
        "bound": lambda: made(),
    }
    for name, work in works.items():
        assert in_child(work).startswith("ForkedProcessError"), name
    assert not forks.process.forked, "the parent goes on"
    with pytest.raises(ForkedProcessError, match="'spawn'"):
        raise forks.error("op")


# ---- no driver


def test_a_machine_without_a_driver_says_so(monkeypatch):
    def no_driver():
        raise OSError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr("isokern.backends.launch.launcher.gpu", no_driver)
    with pytest.raises(BackendFailedError, match="libcuda") as raised:
        Launcher("planted", PROBLEM, CONFIG, Compiler())
    assert raised.value.stage == "load"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_no_driver_is_opened_before_one_is_needed():
    assert drivers.gpu.cache_info().currsize == 0
