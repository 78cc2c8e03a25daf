"""What one config of the kernel costs, compiled without a GPU: registers, spills and shared memory."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ...errors import IsokernError
from ...registry.backend import Config
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.inputs import make_inputs
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call
from .arguments import INTEGERS, POINTERS, REALS, constants, integers, options, pointers

__all__ = ["Resources", "compile_config", "problem_of", "report"]

_TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}


@dataclass(frozen=True, slots=True)
class Resources:
    """Of one compiled kernel.

    Attributes:
        registers: per thread.
        spilled: bytes of stack per thread: registers the compiler had to put into memory.
        shared: bytes of shared memory per program.
    """

    registers: int
    spilled: int
    shared: int

    def to_list(self) -> list[int]:
        return [self.registers, self.spilled, self.shared]


def problem_of(spec: CaseSpec) -> Problem:
    """The case's problem as it would be on a GPU."""
    return replace(canonical_call(**make_inputs(spec).kwargs).problem("eager"), device="cuda", arch=90)


def compile_config(spec: CaseSpec, config: Config, arch: int) -> Resources:
    """Compile the kernel as the case would launch it, for compute capability ``arch / 10``.

    Raises what Triton raises if it does not compile; IsokernError if the compiler's report cannot be read.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from .kernel import recurrent

    signature, fixed, attributes = _specialised(spec, config, recurrent)
    source = ASTSource(fn=recurrent, signature=signature, constexprs=fixed, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options(config))
    return report(compiled.asm["cubin"], int(compiled.metadata.shared))


def _specialised(spec: CaseSpec, config: Config, kernel: Any) -> tuple[dict[str, str], dict[str, Any], dict[Any, Any]]:
    """Types, compile-time values and divisibilities, by the rules the launch itself follows."""
    call = canonical_call(**make_inputs(spec).kwargs)
    out = torch.empty_like(call.v, dtype=call.q.dtype)
    names = list(kernel.arg_names)
    unspecialised = {p.name for p in kernel.params if p.do_not_specialize}
    fixed: dict[str, Any] = dict(constants(problem_of(spec), config))
    types: dict[str, str] = dict.fromkeys(REALS, "fp32")
    divisible = []
    for name, tensor in zip(POINTERS, pointers(call, out), strict=True):
        if tensor is None:
            fixed[name] = None
        else:
            types[name] = _TYPES[tensor.dtype]
            divisible.append(name)  # allocations are aligned
    for name, value in zip(INTEGERS, integers(call, out), strict=True):
        types[name] = "i32"
        if name not in unspecialised:
            if value == 1:
                fixed[name] = 1
            elif value % 16 == 0:
                divisible.append(name)
    signature = {name: "constexpr" if name in fixed else types[name] for name in names}
    return signature, fixed, {(names.index(name),): [["tt.divisibility", 16]] for name in divisible}


def report(cubin: bytes, shared: int) -> Resources:
    """What a kernel's machine code takes, by CUDA's own tool. Raises IsokernError if it does not say."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [str(tool), "-res-usage", file.name], capture_output=True, text=True, check=False, timeout=60
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise IsokernError(f"cuobjdump reports no registers: {done.stdout.strip()} {done.stderr.strip()}")
    return Resources(int(found[1]), int(found[2]), shared)
