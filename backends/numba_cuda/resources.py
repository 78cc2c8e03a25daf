"""The table of registers, spills and shared memory per config: ``python -m isokern.backends.numba_cuda.resources``.

Rewrites ``resources.json`` beside this file from a fresh compilation, for every architecture, without a GPU. A test
compiles a sample again and compares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import typer

from ...registry.backend import Config, fingerprint_files
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.describe import describe
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from .space import configs_for
from .variant import Variant

__all__ = ["ARCHITECTURES", "PROBLEMS", "TABLE", "entries", "fingerprint", "measured", "problem_of"]

ARCHITECTURES = (80, 90, 100)
TABLE = Path(__file__).with_name("resources.json")

#: Modules that no kernel depends on.
_APART = frozenset({"__init__.py", "backend.py", "launch.py", "resources.py"})

_QWEN = CaseSpec("", (1,) * 64, h=16, hv=32, k=128, v=128, state_layout="vk")
#: What the table covers, by name, and how many of the offered configs of each (None: all).
PROBLEMS: Mapping[str, tuple[CaseSpec, int | None]] = {
    "decode, float32 vk": (_QWEN, None),
    "prompts, float32 vk": (_QWEN.but(lengths=(16,) * 16), None),
    "decode, bfloat16 kv": (_QWEN.but(state_dtype="bfloat16", state_layout="kv"), 3),
    "prompts, float32 kv": (_QWEN.but(lengths=(16,) * 16, state_layout="kv"), 3),
    "prompts, kda": (_QWEN.but(lengths=(16,) * 16, is_kda=True, h=32), 3),
    "prompts, K=96 V=192": (_QWEN.but(lengths=(16,) * 4, k=96, v=192, io_dtype="float16", state_dtype="float16"), 2),
    "prompts, K=256 V=256": (_QWEN.but(lengths=(16,) * 4, k=256, v=256), 2),
    "tree": (_QWEN.but(lengths=(8,) * 8, verify="tree", update="disabled"), 2),
    "strided": (_QWEN.but(lengths=(16,) * 4, strides="any"), 2),
}


def problem_of(name: str, arch: int) -> Problem:
    """The problem of this name on a GPU of this architecture."""
    return describe(PROBLEMS[name][0], "cuda", arch)


def measured(name: str, config: Config, arch: int) -> dict[str, Any]:
    """One row of the table, compiled now. Raises as ``compile_variant``."""
    from .compile import compile_variant

    variant = Variant.of(problem_of(name, arch), config, wide=True)
    resources = compile_variant(variant, arch).resources
    return {"problem": name, "config": config.label, "arch": arch, **asdict(resources)}


def entries() -> Iterator[tuple[str, Config, int]]:
    """What the table has rows for: problem, config, architecture. The first config of a problem is its default."""
    for name, (_, most) in PROBLEMS.items():
        for arch in ARCHITECTURES:
            for config in configs_for(problem_of(name, arch))[:most]:
                yield name, config, arch


def fingerprint() -> str:
    """Of the sources that the table depends on."""
    modules = sorted(Path(__file__).parent.glob("*.py"))
    return fingerprint_files(module for module in modules if module.name not in _APART)


def main() -> None:
    """Compile everything and rewrite the table."""
    rows = []
    for entry in entries():
        rows.append(measured(*entry))
        typer.echo(rows[-1])
    lines = ",\n".join(json.dumps(row) for row in rows)
    TABLE.write_text(f'{{"fingerprint": "{fingerprint()}", "entries": [\n{lines}\n]}}\n')


if __name__ == "__main__":
    typer.run(main)
