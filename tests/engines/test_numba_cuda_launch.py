"""Everything of a launch that needs no GPU: kernels kept on disk, the driver's structures, failures with a type."""

import ctypes
import threading

import pytest
import torch

from isokern.backends.numba_cuda import cubins, launch
from isokern.backends.numba_cuda.backend import NumbaCuda
from isokern.backends.numba_cuda.compile import Cubin, _resources
from isokern.backends.numba_cuda.parameters import FLOATS, INTEGERS
from isokern.backends.numba_cuda.space import default_for
from isokern.backends.numba_cuda.variant import Variant
from isokern.errors import BackendFailedError
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe

PROBLEM = describe(CaseSpec("x", (1,) * 4), "cuda", 90)
VARIANT = Variant.of(PROBLEM, default_for(PROBLEM), wide=True)


@pytest.fixture
def compiled(monkeypatch, tmp_path):
    """Stands for the compiler; counts what it is asked for. Kernels are kept in a folder of the test's own."""
    asked = []

    def compile_variant(variant, arch):
        asked.append((variant, arch))
        return Cubin(b"code", "entry", "report")

    monkeypatch.setattr(cubins, "compile_variant", compile_variant)
    monkeypatch.setattr(cubins, "directory", lambda: tmp_path / "kernels")
    return asked


def test_a_kernel_is_compiled_once_for_all_processes(compiled):
    assert cubins.cubin(VARIANT, 90) == cubins.cubin(VARIANT, 90) == Cubin(b"code", "entry", "report")
    assert compiled == [(VARIANT, 90)]
    cubins.cubin(VARIANT, 100)
    assert len(compiled) == 2, "another architecture is another kernel"


@pytest.mark.parametrize("damage", ["", "{", '{"entry": 1, "unknown": 2}'])
def test_a_damaged_kernel_is_compiled_again(compiled, tmp_path, damage):
    cubins.cubin(VARIANT, 90)
    (about,) = (tmp_path / "kernels").glob("*.json")
    about.write_text(damage)
    cubins.cubin(VARIANT, 90)
    cubins.cubin(VARIANT, 90)
    assert len(compiled) == 2


def test_a_folder_that_cannot_be_written_costs_the_saving_alone(compiled, tmp_path, caplog):
    (tmp_path / "kernels").write_text("a file where the folder should be")
    assert cubins.cubin(VARIANT, 90).code == b"code"
    assert "cannot write" in caplog.text


def test_structures_are_laid_out_as_the_driver_wants_them():
    assert ctypes.sizeof(launch._LaunchConfig) == 56
    assert launch._LaunchConfig.stream.offset == 32
    assert launch._Parameters.floats.offset == 8 * INTEGERS
    assert ctypes.sizeof(launch._Parameters) == 8 * INTEGERS + 4 * len(FLOATS)


def test_a_thread_has_a_parameter_block_of_its_own():
    frame = launch._Frame(96)
    places = [ctypes.addressof(frame.parameters)]
    other = threading.Thread(target=lambda: places.append(ctypes.addressof(frame.parameters)))
    other.start()
    other.join()
    assert len(set(places)) == 2
    assert frame.config.block_x == 96


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a driver the kernel loads")
def test_a_kernel_that_cannot_be_loaded_raises_one_typed_error(compiled):
    with pytest.raises(BackendFailedError) as raised:
        NumbaCuda().bind(PROBLEM, default_for(PROBLEM))
    assert raised.value.stage == "compile"
    assert raised.value.backend == "numba_cuda"


def test_an_assembler_that_reports_nothing_is_told():
    with pytest.raises(RuntimeError, match="report lacks"):
        _resources("nothing of use")
