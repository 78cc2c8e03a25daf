"""The kernel on a GPU: is it right, and how fast.

    python -m isokern.backends.cupy.gpu suite [--out FILE] [--jobs 8]
    python -m isokern.backends.cupy.gpu cases [--out FILE]
    python -m isokern.backends.cupy.gpu bench [--out FILE] [--quick]
    compute-sanitizer --tool racecheck python -m isokern.backends.cupy.gpu cases

``suite``: the conformance suite with the default configs, checks in parallel processes. ``cases``: every config on a
few cases, with equal bits demanded of all, graph replay, a pool beyond 2**31 elements, more than 65535 sequences. Exit
status 1 if anything fails. ``bench``: every config of every cell, microseconds per call in a CUDA graph, medians.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch

from .gpu_bench import bench
from .gpu_check import check_cases, check_suite

__all__ = ["main"]


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m isokern.backends.cupy.gpu")
    parser.add_argument("what", choices=("suite", "cases", "bench"))
    parser.add_argument("--out", type=Path, help="write the report here as JSON")
    parser.add_argument("--jobs", type=int, default=8, help="suite: processes that share the GPU")
    parser.add_argument("--quick", action="store_true", help="bench: fp32 pools at HV = 32 only")
    chosen = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no CUDA device")
    match chosen.what:
        case "suite":
            report = check_suite(chosen.jobs)
        case "cases":
            report = check_cases()
        case _:
            report = bench(chosen.quick)
    if chosen.out:
        chosen.out.write_text(json.dumps(report, indent=1) + "\n")
    if not report.get("ok", True):
        sys.exit(1)


if __name__ == "__main__":
    main()
