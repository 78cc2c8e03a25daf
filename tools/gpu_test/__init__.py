"""Every GPU backend of the op on the GPU of this machine: is it right, and how fast. One command, one report.

    python -m isokern.tools.gpu_test [STAGE ...] [--backend NAME ...] [--jobs 12] [--budget SECONDS] [--out FILE]

Stages:
    suite: the conformance suite with the default configs.
    configs: every config of representative cases within the error bound, with equal bits where the backend promises it.
    properties: graph replay on changed contents, far offsets, many sequences, odd sizes, repeatability under load, ...
    sanitizer: compute-sanitizer's four tools over a short list of calls, and planted errors that they must find.
    bench: every config of every cell in CUDA graphs, beside SGLang's kernel; nothing is timed before it conforms.

The first four share the GPU in ``jobs`` processes; the bench has it alone. Exit status: 0 all passed, 1 something
failed, 2 no CUDA device (or a wrong command line), 3 nothing failed but the budget did not suffice for everything.
"""

from __future__ import annotations

__all__: list[str] = []
