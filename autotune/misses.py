"""What a running program had no tuned choice for, as workload files that ``isokern warmup --workloads`` reads.

from isokern.autotune.misses import save_misses
save_misses("missed.yaml")      # at the end of a server's life, or of its first minutes
"""

from __future__ import annotations

from pathlib import Path

from .. import registry as registry_package
from ..cache.files import write_atomic
from ..registry.core import Registry
from ..registry.ops.fused_sigmoid_gating.misses import Recorded, cases_of
from ..registry.ops.fused_sigmoid_gating.workload_files import format_workloads

__all__ = ["save_misses"]

OP = "fused_sigmoid_gating"


def save_misses(path: Path | str, registry: Registry | None = None) -> dict[Path, Recorded]:
    """Write the problems that this process resolved without a tuned choice, a file per shape of layer.

    The first file is ``path``, of the shape missed most often; further ones have ``-2``, ``-3``, ... before the suffix.
    Each starts with the command that warms it up, and lists as comments the calls that no warm-up would help.

    Returns: what went into each file, in order; empty, and nothing is written, if there was no miss.

    Raises:
        OSError: a file cannot be written.
    """
    path = Path(path)
    registry = registry or registry_package.default
    written = {}
    for number, recorded in enumerate(cases_of(registry.dispatcher(OP).misses), start=1):
        target = path if number == 1 else path.with_name(f"{path.stem}-{number}{path.suffix}")
        write_atomic(target, _text(recorded, target))
        written[target] = recorded
    return written


def _text(recorded: Recorded, path: Path) -> str:
    shard = recorded.shard
    gate = shard.gate.value.upper()
    lines = [f"# Calls without a tuned choice: {gate} H={shard.H} HV={shard.HV} K={shard.K} V={shard.V}."]
    if recorded.models:
        command = "isokern warmup --model {} --tp {} --workloads " + path.name
        lines += ["# Warm them up with", *(f"#     {command.format(name, tp)}" for name, tp in recorded.models)]
    else:
        lines.append("# No model of the catalogue has such layers (see `isokern models`).")
    if recorded.left_out:
        lines.append("# No warm-up would help these:")
        lines += [f"#     {problem.label}: {reason}" for problem, reason in recorded.left_out]
    if not recorded.cases:
        return "\n".join([*lines, f"op: {OP}", "cases: []", ""])
    return "\n".join(lines) + "\n" + format_workloads(recorded.cases, str(path))
