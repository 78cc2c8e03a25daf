"""Result files: `results/<date>_<gpu>_<what>.json` with `meta` (machine, versions, command, commit) and `rows`."""

from __future__ import annotations

import datetime
import importlib.metadata
import json
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
KINDS = ("gpu_suite", "host_cost", "choice", "peers", "cpu")


@dataclass
class Row:
    """One measurement. Times in microseconds, medians; None where a column does not apply.

    Attributes:
        case: as in the tables (``decode N=8 H=16 HV=32 float32``).
        implementation: whose code; isokern's own choice is ``isokern``.
        backend, config: of isokern's registry, if that is what ran.
        graph_us, eager_us: per call, replayed from a graph / launched from the host.
        floor_us: bytes that must move over the measured copy bandwidth.
        error: relative 2-norm against float64.
        extra: anything else worth keeping (samples, peak memory, spread).
    """

    case: str
    implementation: str
    backend: str | None = None
    config: str | None = None
    graph_us: float | None = None
    eager_us: float | None = None
    floor_us: float | None = None
    error: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str:
    root = RESULTS.parent.parent
    ask = lambda *words: subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True)  # noqa: E731
    head = ask("rev-parse", "HEAD").stdout.strip()
    # Results describe the code that ran: uncommitted changes outside this folder make that unclear.
    changed = [line for line in ask("status", "--porcelain").stdout.splitlines() if "benchmarks/results" not in line]
    return head + ("+changes" if changed else "")


def meta(**more: Any) -> dict[str, Any]:
    """Where and with what a result was made."""
    import psutil
    import torch

    names = ("torch", "triton", "numba", "llvmlite", "numpy", "transformers", "cupy-cuda13x", "numba-cuda")
    model = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        platform.processor(),
    )
    return {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cpu": model,
        "cores": psutil.cpu_count(logical=False),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {name: v for name in names if (v := _version(name))},
        "command": " ".join(["python", *sys.argv]),
        "commit": _commit(),
        **more,
    }


def save(what: str, gpu: str, information: dict[str, Any], rows: list[Row]) -> Path:
    """Write the result file and return its path."""
    if what not in KINDS:
        raise ValueError(f"what: expected one of {KINDS}, given {what!r}")
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{information['date']}_{gpu}_{what}.json"
    path.write_text(json.dumps({"meta": information, "rows": [asdict(r) for r in rows]}, indent=1) + "\n")
    return path
