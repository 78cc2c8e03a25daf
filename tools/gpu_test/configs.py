"""Stage ``configs``: every config of a case within the error bound, with equal bits where the backend promises it."""

from __future__ import annotations

from ...registry.backend import Backend, Config, Scalar
from ...registry.decision import Rejected
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from .calls import Written, bind, call_of, exact, same_bits, wait, written, wrong
from .task import Outcome, Result

__all__ = ["EQUAL_BITS", "compile_config", "examine_configs"]

#: Backends whose config space says that no choice changes a bit of the result, but for where sequences are cut. Others
#: have to be within the bound.
EQUAL_BITS = frozenset(
    {"cupy", "cupy_chunked", "cupy_chunked_bf16", "cupy_cut", "cupy_cut_bf16", "numba_cuda", "triton"}
)


def compile_config(backend: Backend, spec: CaseSpec, config: Config) -> Result:
    """Run once, so that the machine code lies on the disk for every other process."""
    call = call_of(spec)
    bind(backend, call, config)(call)
    wait(call)
    return Result.of([])


def examine_configs(backend: Backend, spec: CaseSpec) -> Result:
    """Judge the default, and every other config unless its bits are those of one already judged."""
    problem = call_of(spec).problem()
    verdict = backend.check(problem)
    if isinstance(verdict, Rejected):
        return Result(Outcome.SKIPPED, note=verdict.reason)
    configs, promised = backend.configs(problem), backend.name in EQUAL_BITS
    good: dict[Scalar, list[Written]] = {}
    first: dict[Scalar, Config] = {}
    faults: list[str] = []
    for config in configs:
        call = call_of(spec)
        bind(backend, call, config)(call)
        wait(call)
        bits, cut = written(call), config.to_dict().get("cut", 0)
        alike = good.setdefault(cut, [])
        if any(same_bits(bits, known) for known in alike):
            continue
        if alike and promised:
            faults.append(f"[{config.label}]: other bits than [{first[cut].label}]")
        found = wrong(call, exact(spec, backend, config))
        faults += [f"[{config.label}]: {fault}" for fault in found]
        if not found:
            alike.append(bits)
            first.setdefault(cut, config)
    return Result.of(faults, f"{len(configs)} configs")
