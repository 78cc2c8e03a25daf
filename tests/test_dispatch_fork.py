"""After a fork: a child never hangs in, or crashes on, what the parent's use of the op left behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")

PROGRAM = """
import os, signal, sys, torch
torch.set_num_threads(int(sys.argv[1]))
from isokern import registry
from isokern.errors import ForkedProcessError
from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs

op = registry.get("fused_sigmoid_gating")
dispatcher = registry.default.dispatcher("fused_sigmoid_gating")
case = CaseSpec("case", (1,) * 8, h=4, hv=8)
on_gpu = describe(case, "cuda", 90)
run = lambda backend: op(**make_inputs(case).kwargs, backend=backend)
backends = ("numba_cpu", "torch_reference", "torch_vectorized", "torch_chunked")
expected = {b: run(b) for b in backends}

def tried(function):
    try:
        return function()
    except ForkedProcessError as error:
        return str(error)

def same(backend):
    return tried(lambda: "same" if torch.equal(run(backend), expected[backend]) else "different")

def child(name, function):
    pid = os.fork()
    if not pid:
        signal.alarm(60)  # a hang ends here
        print(name, "|", function(), flush=True)
        os._exit(0)
    if os.waitpid(pid, 0)[1]:
        print(name, "| hung or crashed", flush=True)

def grandchild():
    child("torch in a grandchild", lambda: same("torch_vectorized"))
    return "forked"

def with_one_thread():
    torch.set_num_threads(1)
    return same("torch_vectorized")

for b in backends:
    child(b, lambda: same(b))
child("torch with one thread", with_one_thread)
child("child", grandchild)
child("gpu, never used", lambda: tried(lambda: dispatcher.resolve(on_gpu, "torch_vectorized").decision.backend))
dispatcher.prepare(on_gpu, "torch_vectorized")  # as a call would
child("gpu, used before", lambda: tried(lambda: dispatcher.resolve(on_gpu, "torch_vectorized").decision.backend))
print("parent |", [same(b) for b in backends])
"""


def outcomes(threads: int) -> dict[str, str]:
    """What each child of a process with so many CPU threads printed."""
    command = [sys.executable, "-c", PROGRAM, str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    return dict(line.split(" | ", 1) for line in done.stdout.splitlines())


@pytest.fixture(scope="module")
def threaded():
    return outcomes(2)


@pytest.fixture(scope="module")
def single():
    return outcomes(1)


def test_numba_goes_on_without_its_threads(threaded):
    assert threaded["numba_cpu"] == "same"


@pytest.mark.parametrize("name", ["torch_reference", "torch_vectorized", "torch_chunked", "torch in a grandchild"])
def test_torch_s_threads_are_refused_before_they_hang(threaded, name):
    assert "torch's CPU threads were in use before this process was forked" in threaded[name]
    assert "torch.set_num_threads(1)" in threaded[name]


def test_torch_with_one_thread_goes_on(threaded, single):
    assert threaded["torch with one thread"] == "same"
    assert {single[b] for b in ("numba_cpu", "torch_reference", "torch_vectorized", "torch_chunked")} == {"same"}


def test_a_gpu_that_was_in_use_is_refused_whatever_the_backend(threaded):
    assert "a CUDA device was in use before this process was forked" in threaded["gpu, used before"]


def test_a_gpu_that_was_not_may_be_used(single):
    assert single["gpu, never used"] == "torch_vectorized"


def test_the_parent_goes_on_as_before(threaded):
    assert threaded["parent"] == str(["same"] * 4)
