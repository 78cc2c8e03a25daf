"""Stage ``sanitizer``: compute-sanitizer's tools over ``sanitized``, and what their output says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .sanitized import DONE
from .task import Outcome, Result

__all__ = ["PLAIN", "RUNS", "Run", "Verdict", "command", "read_log", "sanitize"]

_PREFIX = "========="
_QUOTED = 6  # reports that go into a row
_SUMMARY = re.compile(r"(ERROR|RACECHECK) SUMMARY: (\d+) (?:errors?|hazards? displayed)")
#: Indented lines belong to the report above them.
_REPORT = re.compile(_PREFIX + r" (?! )(.*\S)")
_CHATTER = ("COMPUTE-SANITIZER", "ERROR SUMMARY", "RACECHECK SUMMARY", "LEAK SUMMARY", "Target application returned")


@dataclass(frozen=True, slots=True)
class Run:
    """One process: a tool (None: no sanitizer), and an error that it must report (None: it must report none)."""

    name: str
    tool: str | None = None
    plant: str | None = None


PLAIN = Run("without a sanitizer")
RUNS: tuple[Run, ...] = (
    *(Run(tool, tool) for tool in ("racecheck", "memcheck", "initcheck", "synccheck")),
    Run("memcheck reports a planted error", "memcheck", "slots"),
    Run("initcheck reports a planted error", "initcheck", "pool"),
)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a sanitizer's output says.

    Attributes:
        errors: from its summary; None if it printed none (it did not get to its end).
        reports: first lines of its reports, the kernel's line with each.
        complete: the program under it said that it made all its calls.
    """

    errors: int | None
    reports: tuple[str, ...]
    complete: bool


def read_log(text: str) -> Verdict:
    """Understand the output of a sanitizer and of the program under it, in one stream."""
    counts = [int(found[2]) for found in _SUMMARY.finditer(text)]
    reports: list[str] = []
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        found = _REPORT.match(line)
        if found is None or found[1].startswith(_CHATTER):
            continue
        where = following.removeprefix(_PREFIX).strip()
        reports.append(f"{found[1]} ({where})" if where.startswith("at ") else found[1])
    complete = any(line.startswith(DONE) for line in lines)
    return Verdict(max(counts, default=None), tuple(reports), complete)


def command(run: Run, backend: str) -> list[str]:
    """The command line of a run. Raises FileNotFoundError where there is no compute-sanitizer."""
    program = [sys.executable, "-m", "isokern.tools.gpu_test.sanitized", "--backend", backend]
    if run.plant is not None:
        program += ["--plant", run.plant]
    if run.tool is None:
        return program
    options = ["--tool", run.tool, "--target-processes", "application-only", "--print-limit", "20"]
    if run.tool == "memcheck":
        # Frameworks ask the driver for symbols that it may lack; a launch that fails raises in the program itself.
        options += ["--report-api-errors", "no"]
    return [_sanitizer(), *options, *program]


def _sanitizer() -> str:
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not Path(found).exists():
        raise FileNotFoundError("compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin")
    return found


def _environment() -> Mapping[str, str]:
    # torch's caching allocator would put every tensor into one large allocation, whose inside memcheck takes for valid.
    return {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONUNBUFFERED": "1"}


def judged(run: Run, verdict: Verdict, status: int) -> Result:
    """Whether the run is what it should be: clean and complete, or with the planted error reported."""
    if run.plant is not None:
        if verdict.errors:
            return Result(Outcome.PASS, note=f"{verdict.errors} errors reported: {_first(verdict.reports, 1)}")
        return Result(Outcome.FAIL, ("the planted error was not reported: the tool does not see the kernel",))
    faults = list(verdict.reports[:_QUOTED])
    if run.tool is not None and verdict.errors is None:
        faults.append("no summary: the sanitizer did not come to its end")
    elif verdict.errors and not faults:
        faults.append(f"{verdict.errors} errors")
    if not verdict.complete:
        faults.append("the program did not come to its end")
    if status != 0 and not faults:
        faults.append(f"exit status {status}")
    return Result.of(faults)


def _first(reports: Sequence[str], most: int) -> str:
    return "; ".join(reports[:most])


def sanitize(run: Run, backend: str) -> Result:
    """Run the process and judge its output; a result outside its error bound fails as well."""
    done = subprocess.run(
        command(run, backend),
        env=_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    result = judged(run, read_log(done.stdout), done.returncode)
    if result.outcome is Outcome.FAIL:
        return Result(result.outcome, (*result.faults, done.stdout[-1500:]))
    return result
