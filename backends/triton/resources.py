"""What every config costs, compiled without a GPU: registers, spills and shared memory, kept in ``resources.json``.

    python -m isokern.backends.triton.resources --write     compile everything and rewrite the table
    python -m isokern.backends.triton.resources             compile everything and compare with the table

The numbers are those of one Triton version, named in the file; another version is only held to compiling everything.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import typer

from ...errors import IsokernError
from ...registry.backend import Config, fingerprint_files
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.inputs import make_inputs
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call
from .arguments import INTEGERS, POINTERS, REALS, constants, integers, options, pointers
from .configs import configs

__all__ = [
    "ARCHITECTURES",
    "PROBLEMS",
    "TABLE",
    "Resources",
    "compile_config",
    "fingerprint",
    "load_table",
    "problem_of",
    "rows",
]

TABLE = Path(__file__).with_name("resources.json")
ARCHITECTURES = (80, 90, 100)

_MODEL = CaseSpec("decode", (1,) * 4, h=2, hv=4, k=128, v=128, state_layout="vk")
_PROMPTS = _MODEL.but(lengths=(9, 4))
#: What the table covers: model shapes with few heads (their number changes no code), one call of each kind.
PROBLEMS: Mapping[str, CaseSpec] = MappingProxyType(
    {
        "decode vk": _MODEL,
        "decode kv": _MODEL.but(state_layout="kv"),
        "decode vk, bfloat16 pool": _MODEL.but(state_dtype="bfloat16"),
        "prompts vk": _PROMPTS,
        "prompts kv": _PROMPTS.but(state_layout="kv"),
        "prompts vk, KDA": _PROMPTS.but(is_kda=True),
        "prompts vk, K=96 V=192": _PROMPTS.but(k=96, v=192),
        "tree vk": _PROMPTS.but(verify="tree", update="disabled"),
    }
)
#: Of these only so many configs: their code differs from the others' in what every config has in common.
_SAMPLED = {
    "decode kv": 5,
    "decode vk, bfloat16 pool": 5,
    "prompts kv": 5,
    "prompts vk, KDA": 4,
    "prompts vk, K=96 V=192": 3,
    "tree vk": 2,
}
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
    return _report(compiled.asm["cubin"], int(compiled.metadata.shared))


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


def _report(cubin: bytes, shared: int) -> Resources:
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


def load_table() -> tuple[str, dict[tuple[str, int, str], Resources]]:
    """The Triton version of the checked-in table, and its rows by (problem, architecture, config label)."""
    data = json.loads(TABLE.read_text())
    listed = {
        (problem, int(arch.removeprefix("sm_")), label): Resources(*numbers)
        for problem, by_arch in data["problems"].items()
        for arch, by_config in by_arch.items()
        for label, numbers in by_config.items()
    }
    return data["triton"], listed


def fingerprint() -> str:
    """Of the sources that the table depends on."""
    folder = Path(__file__).parent
    return fingerprint_files(folder / f"{name}.py" for name in ("arguments", "configs", "gates", "kernel", "tiles"))


def rows() -> Iterator[tuple[str, CaseSpec, int, Config]]:
    """What the table has rows for."""
    for name, spec in PROBLEMS.items():
        for arch in ARCHITECTURES:
            for config in configs(problem_of(spec))[: _SAMPLED.get(name)]:
                yield name, spec, arch, config


def main(write: bool = typer.Option(False, "--write", help="rewrite the table instead of comparing with it")) -> None:
    """Compile every config of every problem for every architecture."""
    from importlib.metadata import version

    table: dict[str, dict[str, dict[str, list[int]]]] = {}
    for name, spec, arch, config in rows():
        made = compile_config(spec, config, arch)
        typer.echo(f"{name}, sm_{arch}, {config.label}: {made}")
        table.setdefault(name, {}).setdefault(f"sm_{arch}", {})[config.label] = made.to_list()
    if write:
        data = {
            "fingerprint": fingerprint(),
            "columns": ["registers", "spilled", "shared"],
            "triton": version("triton"),
            "problems": table,
        }
        one_row_a_line = re.sub(r"\[\s+(\d+),\s+(\d+),\s+(\d+)\s+\]", r"[\1, \2, \3]", json.dumps(data, indent=1))
        TABLE.write_text(one_row_a_line + "\n")
        return
    known, listed = load_table()
    different = [key for key, made in _flat(table) if listed.get(key) != made and known == version("triton")]
    missing = set(listed) - {key for key, _ in _flat(table)}
    if different or missing:
        raise typer.Exit(_complain(different, missing))


def _flat(table: dict[str, dict[str, dict[str, list[int]]]]) -> list[tuple[tuple[str, int, str], Resources]]:
    return [
        ((problem, int(arch.removeprefix("sm_")), label), Resources(*numbers))
        for problem, by_arch in table.items()
        for arch, by_config in by_arch.items()
        for label, numbers in by_config.items()
    ]


def _complain(different: list[tuple[str, int, str]], missing: set[tuple[str, int, str]]) -> int:
    for key in different:
        typer.echo(f"differs from the table: {key}", err=True)
    for key in sorted(missing):
        typer.echo(f"in the table only: {key}", err=True)
    return 1


if __name__ == "__main__":
    typer.run(main)
