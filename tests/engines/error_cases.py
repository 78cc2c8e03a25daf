"""Bad input and failing kernels, through the public op with one GPU backend on its engine.

Not a test module: an engine may want a process of its own, so ``test_errors`` runs ``python error_cases.py BACKEND``,
which prints by case what went wrong, as JSON; empty where all is well.
"""

from __future__ import annotations

import json
import sys
import traceback
from contextlib import contextmanager
from unittest import mock

import pytest
import torch

from isokern.engines import load_engine
from isokern.errors import ArgumentError, BackendFailedError
from isokern.registry.backend import Config
from isokern.registry.core import Registry

NAME = sys.argv[1]
BACKEND, ENGINE = load_engine(NAME)

from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec  # noqa: E402
from isokern.registry.ops.fused_sigmoid_gating.error_inputs import ERROR_INPUTS  # noqa: E402
from isokern.registry.ops.fused_sigmoid_gating.inputs import make_inputs  # noqa: E402
from isokern.registry.ops.fused_sigmoid_gating.spec import SPEC  # noqa: E402
from isokern.registry.varlen.layout import SequenceLayout  # noqa: E402

torch.set_num_threads(1)
COMPOSITE = NAME == "composite_bf16"
# A chunk does not form the states after each token.
VERIFY = "none" if COMPOSITE or BACKEND.accuracy != "recurrent" else "chain"
LENGTHS = (1, 0, 20) if COMPOSITE else (3, 0, 2)
VALID = CaseSpec("valid", LENGTHS, h=1, hv=2, k=8, v=6, padded=(2,), verify=VERIFY)
MESSAGE = "this GPU is out of order"

#: What executes a kernel in each engine, and what it raises: as the framework passes on what the driver says.
LAUNCHES = {
    "cupy": "isokern.engines.cuda_on_cpu.raw_kernel.CpuRawKernel.__call__",
    "cupy_chunked": "isokern.engines.cuda_on_cpu.raw_kernel.CpuRawKernel.__call__",
    "cupy_chunked_bf16": "isokern.engines.cuda_on_cpu.raw_kernel.CpuRawKernel.__call__",
    "cupy_cut": "isokern.engines.cuda_on_cpu.raw_kernel.CpuRawKernel.__call__",
    "cupy_cut_bf16": "isokern.engines.cuda_on_cpu.raw_kernel.CpuRawKernel.__call__",
    "composite_bf16": "isokern.engines.cuda_on_cpu.raw_kernel.CpuRawKernel.__call__",
    "triton": "isokern.engines.triton_interpreter.execution.Executor._launch",
    "triton_chunked": "isokern.engines.triton_interpreter.execution.Executor._launch",
    "numba_cuda": "isokern.engines.numba_simulator.engine.NumbaSimulator.launch",
}


def op_of(backend):
    registry = Registry({}, load_plugins=False)  # of its own: nothing else could run instead
    registry.register_op(SPEC)
    registry.register_backend(backend)
    return registry.get(SPEC.name)


def tensors(kwargs):
    found = {name: v.cu_seqlens if isinstance(v, SequenceLayout) else v for name, v in kwargs.items()}
    return {
        name: t
        for name, t in found.items()
        if isinstance(t, torch.Tensor) and t.device.type != "meta" and t.layout is torch.strided
    }


def image(watched):
    return {name: t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for name, t in watched.items()}


@contextmanager
def nothing_written(inputs, kwargs):
    watched = {**tensors(inputs.kwargs), **{f"changed {n}": t for n, t in tensors(kwargs).items()}}
    if inputs.pool_storage is not None:
        watched["pool storage"] = inputs.pool_storage
    if inputs.intermediate_storage is not None:
        watched["steps storage"] = inputs.intermediate_storage
    before = image(watched)
    yield
    after = image(watched)
    assert before == after, [name for name in before if before[name] != after[name]]


def refused(case):
    op = op_of(BACKEND)
    inputs = make_inputs(case.base)
    kwargs = case.apply(inputs.kwargs)
    launched = mock.patch(LAUNCHES[NAME], side_effect=AssertionError("launched"))
    with nothing_written(inputs, kwargs), launched, pytest.raises(ArgumentError) as raised:
        op(**kwargs, backend=NAME, validate="full" if case.needs_full else "fast")
    assert type(raised.value) is case.error
    assert raised.value.argument == case.argument


def failed(backend, message):
    """The op's call on ``backend`` raises one typed error that names everything, and writes nothing."""
    inputs = make_inputs(VALID)
    out = torch.full_like(inputs.kwargs["v"], 7.0)
    kwargs = {**inputs.kwargs, "out": out}
    with nothing_written(inputs, kwargs), pytest.raises(BackendFailedError) as raised:
        op_of(backend)(**kwargs, backend=NAME)
    error = raised.value
    config = backend.configs(SPEC.problem(SPEC.canonical(**inputs.kwargs), None))[0]
    assert (error.op, error.backend, error.config) == (SPEC.name, NAME, config.label)
    assert error.problem
    framework_says = str(error.__cause__).strip().splitlines()[0]
    for part in (NAME, config.label, error.problem, message, framework_says):
        assert part in str(error)


def case_a_launch_that_fails():
    with mock.patch(LAUNCHES[NAME], side_effect=RuntimeError(MESSAGE)):
        failed(BACKEND, MESSAGE)
    case_without_a_fault_nothing_fails()  # and the next call works


def case_a_config_that_does_not_compile():
    """No compiler of them takes a warp count, a tile or a span that is 3."""

    def odd(backend):
        class Odd(type(backend)):
            def __init__(self):
                self.__dict__.update(backend.__dict__)

            def configs(self, problem):
                first = super().configs(problem)[0]
                return (Config.from_dict({k: v if isinstance(v, bool) else 3 for k, v in first.to_dict().items()}),)

        return Odd()

    parts = [odd(part) for part in BACKEND.parts().values()] if COMPOSITE else ()
    failed(type(BACKEND)(parts) if COMPOSITE else odd(BACKEND), "")


def case_without_a_fault_nothing_fails():
    inputs = make_inputs(VALID)
    out = op_of(BACKEND)(**inputs.kwargs, backend=NAME)
    assert bool(torch.isfinite(out).all())


def main():
    found = {}

    def run(name, case, *args):
        try:
            case(*args)
            found[name] = ""
        except (Exception, pytest.fail.Exception):  # noqa: BLE001  (a test reports it)
            found[name] = traceback.format_exc()

    for name, case in list(globals().items()):
        if name.startswith("case_"):
            run(name, case)
    for case in ERROR_INPUTS:
        run(f"refused: {case.name}", refused, case)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
