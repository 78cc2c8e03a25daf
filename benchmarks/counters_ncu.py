"""Nsight Compute: the command line that reads counters, and rows made from the CSV that it prints.

Nothing here needs a GPU. States are cold without further ado: ncu empties all caches before each pass over a kernel
(``--cache-control all``). It repeats a kernel until all counters are read, and restores the memory that it wrote before
each; kernels never run beside one another under it. Clocks are left alone (``--clock-control none``), so that times are
those of the device as it is used.
"""

from __future__ import annotations

import csv
import re
import subprocess
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["MARK", "Kernel", "Ncu", "by_cell", "complaints", "kernels_of", "known_metrics", "row_of", "unknown_in"]

#: The kernel that opens a cell's profiled range, launched with as many blocks as the cell's number, counted from 1.
MARK = "isokern_cell_mark"

#: Column of a row to the metrics that may fill it; versions of ncu and chips differ in names. Of those that this ncu
#: knows the first counts, or the largest value where the column is in ``_LARGEST``.
_COLUMNS: dict[str, tuple[str, ...]] = {
    "us": ("gpu__time_duration.sum",),
    "dram_pct": (
        "dram__throughput.avg.pct_of_peak_sustained_elapsed",
        "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed",
    ),
    "dram_read_MB": ("dram__bytes_read.sum",),
    "dram_write_MB": ("dram__bytes_write.sum",),
    "sm_pct": ("sm__throughput.avg.pct_of_peak_sustained_elapsed",),
    "issue_pct": (
        "smsp__issue_active.avg.pct_of_peak_sustained_active",
        "sm__inst_issued.avg.pct_of_peak_sustained_active",
    ),
    # Products of bfloat16 by mma.sync count in one of these, by wgmma in another, and not every chip has all.
    "tensor_pct": (
        "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__pipe_tensor_op_gmma_cycles_active.avg.pct_of_peak_sustained_active",
        "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active",
    ),
    "warps_pct": ("sm__warps_active.avg.pct_of_peak_sustained_active",),
}
_LARGEST = frozenset({"tensor_pct"})

#: Of the launch: every ncu knows these, and lists them nowhere in some versions.
_LAUNCH = {
    "registers": "launch__registers_per_thread",
    "blocks": "launch__grid_size",
    "threads": "launch__block_size",
    "waves": "launch__waves_per_multiprocessor",
}
_SHARED = ("launch__shared_mem_per_block_dynamic", "launch__shared_mem_per_block_static")
_LIMITS = {name: f"launch__occupancy_limit_{name}" for name in ("registers", "shared_mem", "warps", "blocks")}

_STALLS = (
    "barrier", "branch_resolving", "dispatch_stall", "drain", "gmma", "imc_miss", "lg_throttle", "long_scoreboard",
    "math_pipe_throttle", "membar", "mio_throttle", "misc", "no_instruction", "not_selected", "selected",
    "short_scoreboard", "sleeping", "tex_throttle", "wait", "warpgroup_arrive",
)  # fmt: skip
_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
_STALL_METRICS = tuple(_STALL.format(reason) for reason in _STALLS)
#: How many stall reasons a row keeps.
_KEPT = 3

#: Units to bytes, microseconds and percent.
_UNITS = {
    "byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9, "Tbyte": 1e12,
    "B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "Kibyte": 1024.0, "Mibyte": 1024.0**2,
    "nsecond": 1e-3, "usecond": 1.0, "msecond": 1e3, "second": 1e6, "ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6,
}  # fmt: skip


def known_metrics(listed: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What to ask for, and what this ncu does not have, by what ``ncu --query-metrics`` printed.

    The list has base names (``dram__bytes_read``), without the ending that says what to sum up, and none of the
    launch's. Where it is empty all is asked for, of alternatives the first; what ncu then refuses, :func:`unknown_in`
    tells.
    """
    bases = set(re.findall(r"^\s*([a-z]\w*__\w+)", listed, re.MULTILINE))

    def there(metric: str) -> bool:
        return not bases or metric.partition(".")[0] in bases

    asked: list[str] = []
    for column, metrics in _COLUMNS.items():
        known = [metric for metric in metrics if there(metric)]
        asked += known if column in _LARGEST else known[:1]
    asked += [*_LAUNCH.values(), *_SHARED, *_LIMITS.values(), *filter(there, _STALL_METRICS)]
    counters = (*(metric for metrics in _COLUMNS.values() for metric in metrics), *_STALL_METRICS)
    return tuple(asked), tuple(metric for metric in counters if not there(metric))


@dataclass(slots=True)
class Ncu:
    """An installed ncu, and what to ask it for."""

    path: str
    version: str = ""
    metrics: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()

    @classmethod
    def ask(cls, path: str, limit: float = 120.0) -> Ncu:
        """What ``path`` says of itself and of the current GPU. Raises OSError if it cannot be run at all."""
        said = [_answer([path, *words], limit) for words in (["--version"], ["--query-metrics"])]
        version = re.search(r"Version\s+(\S+)", said[0])
        return cls(path, version[1] if version else "", *known_metrics(said[1]))

    def command(self, log: Path, child: Sequence[str]) -> list[str]:
        """The command line that runs ``child`` and leaves its kernels' counters in ``log``, its own output apart."""
        return [
            self.path,
            *("--csv", "--page", "raw", "--print-units", "base"),
            *("--clock-control", "none", "--cache-control", "all", "--replay-mode", "kernel"),
            *("--profile-from-start", "off", "--target-processes", "application-only"),
            *("--log-file", str(log), "--metrics", ",".join(self.metrics)),
            *child,
        ]

    def without(self, refused: Iterable[str]) -> bool:
        """Never ask for these again; whether any was asked for."""
        gone = [metric for metric in self.metrics if metric in set(refused)]
        self.metrics = tuple(metric for metric in self.metrics if metric not in gone)
        self.unknown = (*self.unknown, *gone)
        return bool(gone)


def _answer(command: Sequence[str], limit: float) -> str:
    """Its stdout; nothing where it takes longer."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit).stdout
    except subprocess.TimeoutExpired:
        return ""


# ---- the log


@dataclass(frozen=True, slots=True)
class Kernel:
    """One profiled launch: ``values`` by metric in bytes, microseconds, percent or as they are; none where missing."""

    name: str
    blocks: int | None
    values: Mapping[str, float] = field(default_factory=dict)


def kernels_of(log: str) -> list[Kernel]:
    """The launches that ncu printed as ``--page raw --csv``, in their order; none of a log without a table.

    A row of units follows the header. ncu's own words (``==PROF==``) may stand anywhere between.
    """
    lines = [line for line in log.splitlines() if line.startswith('"')]
    rows = list(csv.reader(lines))
    if not rows or "Kernel Name" not in rows[0]:
        return []
    header, units = rows[0], rows[1] if len(rows) > 1 else []
    made = []
    for row in rows[2:]:
        if row[0] == header[0] or len(row) != len(header):
            continue
        texts = dict(zip(header, row, strict=True))
        values = {
            name: value
            for name, text, unit in zip(header, row, units, strict=True)
            if "__" in name and (value := _number(text, unit)) is not None
        }
        blocks = values.get(_LAUNCH["blocks"], _product(texts.get("Grid Size", "")))
        made.append(Kernel(short_name(texts["Kernel Name"]), None if blocks is None else int(blocks), values))
    return made


def _number(text: str, unit: str) -> float | None:
    """``1,234.5`` as a number in base units; of ``4 (1; 3)`` what the instances make together; None for ``n/a``."""
    first = text.strip().split(" ", 1)[0].replace(",", "")
    try:
        value = float(first)
    except ValueError:
        return None
    return value * _UNITS.get(unit.partition("/")[0], 1.0) if value == value else None


def _product(size: str) -> float | None:
    """Of ``(132, 2, 1)``."""
    numbers = re.findall(r"\d+", size)
    if not numbers:
        return None
    product = 1
    for number in numbers:
        product *= int(number)
    return float(product)


def short_name(kernel: str) -> str:
    """A kernel's name without return type, namespaces, template arguments and parameters; at most 60 characters."""
    flat, depth = [], 0
    for letter in re.sub(r"\(anonymous namespace\)::", "", kernel):
        depth += letter in "<({["
        if depth == 0:
            flat.append(letter)
        depth -= letter in ">)}]"
    words = "".join(flat).split()
    name = words[-1].rpartition("::")[2] if words else ""
    return (name or kernel)[:60]


def by_cell(kernels: Iterable[Kernel], cases: Sequence[str]) -> tuple[dict[str, list[Kernel]], int]:
    """The kernels after each cell's mark, and how many came before any; ``cases`` as the marks count them."""
    found: dict[str, list[Kernel]] = {}
    current: list[Kernel] | None = None
    strays = 0
    for kernel in kernels:
        if kernel.name.startswith(MARK):  # a compiler may add to it
            index = (kernel.blocks or 0) - 1
            current = found.setdefault(cases[index], []) if 0 <= index < len(cases) else None
        elif current is None:
            strays += 1
        else:
            current.append(kernel)
    return found, strays


def complaints(log: str) -> str:
    """What ncu calls an error, in one line; empty if nothing."""
    return " | ".join(_errors(log))[:600]


def unknown_in(log: str) -> list[str]:
    """Metrics that ncu refused to know, by its errors."""
    about = [error for error in _errors(log) if "metric" in error]
    return list(dict.fromkeys(name.rstrip(".") for error in about for name in re.findall(r"[a-z]+__[\w.]+", error)))


def _errors(log: str) -> list[str]:
    return list(dict.fromkeys(re.findall(r"^==ERROR==\s*(.+?)\s*$", log, re.MULTILINE)))


# ---- rows


def row_of(kernel: Kernel) -> dict[str, Any]:
    """The columns of one kernel; None where this ncu had no such counter. ``us`` is the device's time of the kernel.

    ``stalls``: the three largest reasons why warps did not issue, as shares of the cycles that warps were resident.
    ``limit``: what lets no more blocks onto a multiprocessor, and how many it lets.
    """
    values = kernel.values
    row: dict[str, Any] = {"kernel": kernel.name}
    for column, metrics in _COLUMNS.items():
        there = [values[metric] for metric in metrics if metric in values]
        value = (max(there) if column in _LARGEST else there[0]) if there else None
        scale = 1e-6 if column.endswith("_MB") else 1.0
        row[column] = None if value is None else round(value * scale, 3 if scale != 1.0 else 2)
    row["registers"] = _whole(values, "registers")
    shared = [values[metric] for metric in _SHARED if metric in values]
    row["shared_KiB"] = round(sum(shared) / 1024, 1) if shared else None
    row |= {"blocks": kernel.blocks, "threads": _whole(values, "threads")}
    waves = values.get(_LAUNCH["waves"])
    row["waves"] = None if waves is None else round(waves, 2)
    limits = {name: int(values[metric]) for name, metric in _LIMITS.items() if metric in values}
    least = min(limits, key=lambda name: limits[name], default=None)
    row["limit"] = None if least is None else {"by": least, "blocks": limits[least]}
    row["stalls"] = dict(_stalls(values))
    return row


def _whole(values: Mapping[str, float], column: str) -> int | None:
    value = values.get(_LAUNCH[column])
    return None if value is None else int(value)


def _stalls(values: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    ratios = {reason: values[metric] for reason in _STALLS if (metric := _STALL.format(reason)) in values}
    total = sum(ratios.values())
    ratios.pop("selected", None)  # issues: part of the cycles, and no stall
    for reason in sorted(ratios, key=lambda reason: -ratios[reason])[:_KEPT]:
        if total > 0 and ratios[reason] > 0:
            yield reason, round(ratios[reason] / total, 3)
