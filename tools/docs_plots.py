"""What the documentation's plots show: measured numbers, from the newest files of benchmarks/results. No drawing."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isokern.tools.results import RESULTS, newest

__all__ = ["FLOOR", "PLOTS", "Panel", "Plot", "Point", "Series"]


FLOOR = "floor"
#: Names in results files, as readers know them. Whatever else a file times is left to the tables.
_GPU = {"cupy": "cupy", "triton": "triton", "numba_cuda": "numba_cuda", "sgl_triton": "SGLang (Triton)"}
_CPU = {
    "isokern": "isokern's choice",
    "torch_chunked": "torch_chunked",
    "torch_reference": "torch_reference",
    "transformers torch_chunk_gated_delta_rule": "transformers, chunk",
    "transformers torch_recurrent_gated_delta_rule": "transformers, recurrent",
}
_PROMPTS = {
    "isokern": "isokern's choice",
    "cupy_chunked_bf16": "cupy_chunked_bf16 (operands in bfloat16)",
    "cupy_cut_bf16": "cupy_cut_bf16 (the same, sequences cut)",
    "cupy_chunked": "cupy_chunked (float32)",
}
_HOST_CASE = "decode N=4 H=16 HV=32 float32"
_HOST = {
    "isokern through torch.library": "op, through torch.library",
    "isokern op": "op",
    "isokern op, out given": "op, out= given",
    "pinned runner": "pinned runner",
    "sgl_triton": "SGLang's function",
}

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Point:
    """``at`` is a number on an axis or a category's name; ``value`` is in the plot's unit."""

    at: float | str
    value: float


@dataclass(frozen=True, slots=True)
class Series:
    """The points of one implementation, or of the floor."""

    label: str
    points: tuple[Point, ...]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes. ``title`` may be empty."""

    title: str
    series: tuple[Series, ...]


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure: panels side by side with one scale of values.

    Attributes:
        kind: ``lines`` over numbers, both axes logarithmic; ``dots``, a line per category, values logarithmic;
            ``bars``, a group per category.
        at: what the places on the axis are; ``unit``: what the values are.
        text: what is shown, for who does not see it, and the caption's first part.
        source: where it was measured, with what, and the results file.
    """

    name: str
    kind: Literal["lines", "dots", "bars"]
    at: str
    unit: str
    panels: tuple[Panel, ...]
    text: str
    source: str


def decode(results: Path = RESULTS) -> Plot:
    """Decode over N, states in float32."""
    return _decode("decode", "float32", results)


def decode_bfloat16(results: Path = RESULTS) -> Plot:
    """Decode over N, states in bfloat16."""
    return _decode("decode_bfloat16", "bfloat16", results)


def _decode(name: str, states: str, results: Path) -> Plot:
    result, source = _newest("gpu_suite", results)
    case = re.compile(rf"decode N=(\d+) H=16 HV=32 {states}")
    rows = [(float(found[1]), row) for row in result["rows"] if (found := case.fullmatch(row["case"])) and _timed(row)]
    rows.sort(key=lambda pair: pair[0])
    panels = (
        Panel("in a CUDA graph", _series(rows, "graph_us", _GPU)),
        Panel("launched from the host", _series(rows, "eager_us", _GPU)),
    )
    text = f"One decode step of N sequences, states in {states} (H = 16, HV = 32, K = V = 128)"
    return Plot(name, "lines", "sequences, N", "us per call", panels, text, source)


def short(results: Path = RESULTS) -> Plot:
    """Sequences of a few tokens: verification and short prompts."""
    result, source = _newest("gpu_suite", results)
    case = re.compile(r"mixed (\d+x\d+) H=16 HV=32")
    rows = [(found[1], row) for row in result["rows"] if (found := case.fullmatch(row["case"])) and _timed(row)]
    panels = (Panel("", _series(rows, "graph_us", _GPU)),)
    text = "Short sequences, number x tokens each, in a CUDA graph (H = 16, HV = 32, K = V = 128, states in float32)"
    return Plot("short", "dots", "sequences x tokens", "us per call", panels, text, source)


def prompts(results: Path = RESULTS) -> Plot:
    """Long sequences, alone, in packs and skewed."""
    result, source = _newest("peers", results, _long)
    panels = []
    for heads in ("H=16 HV=32", "H=4 HV=8"):
        case = re.compile(rf"prefill (.+) {heads}")
        found = [(match[1], row) for row in result["rows"] if (match := case.fullmatch(row["case"])) and _long(row)]
        rows = [(batch, row) for batch, row in found if _timed(row)]
        panels.append(Panel(heads.replace("=", " = "), _series(rows, "graph_us", _PROMPTS)))
    text = "Prompts, number x tokens each, in a CUDA graph (K = V = 128; skew: one of 6208 tokens and 31 of 64)"
    return Plot("prompts", "dots", "prompts", "us per call", tuple(panels), text, source)


def _long(row: dict[str, Any]) -> bool:
    return bool(row["extra"].get("group") == "prefill")


def host(results: Path = RESULTS) -> Plot:
    """What a call costs the host, whole calls only."""
    result, source = _newest("host_cost", results)
    rows = [
        (_HOST[row["implementation"]], {**row, "implementation": row["backend"] or row["implementation"]})
        for name in _HOST
        for row in result["rows"]
        if row["implementation"] == name and row["case"] == _HOST_CASE and not row["extra"]["part"]
    ]
    panels = (Panel("", _series(rows, "eager_us", _GPU, floor=False)),)
    text = f"Host time of one call, nothing waited for ({_HOST_CASE})"
    return Plot("host", "bars", "what is called", "us of host time", panels, text, source)


def cpu(results: Path = RESULTS) -> Plot:
    """Every case of the CPU table."""
    result, source = _newest("cpu", results)
    rows = [(row["case"], row) for row in result["rows"] if row["floor_us"] is not None]
    panels = (Panel("", _series(rows, "eager_us", _CPU, scale=1e-3)),)
    text = "One call on a CPU (H, HV as named, K = V = 128)"
    return Plot("cpu", "dots", "batch", "ms per call", panels, text, source)


def padding(results: Path = RESULTS) -> Plot:
    """The same batch packed and padded."""
    result, source = _newest("cpu", results)
    rows = [
        (batch.removeprefix("packed "), {**row, "implementation": how})
        for row in result["rows"]
        for batch, _, how in [row["case"].rpartition(" ")]
        if how in ("packed", "padded")
    ]
    names = {"packed": "packed", "padded": "padded to the longest"}
    panels = (Panel("", _series(rows, "eager_us", names, scale=1e-3, floor=False)),)
    text = "The same batch packed and padded, on a CPU (H = 16, HV = 32, K = V = 128)"
    return Plot("padding", "bars", "batch", "ms per call", panels, text, source)


#: By the name that a page gives in ``<!-- plot: NAME -->``.
PLOTS: dict[str, Callable[..., Plot]] = {
    make.__name__: make for make in (decode, decode_bfloat16, short, prompts, host, cpu, padding)
}


def _newest(what: str, results: Path, having: Callable[[Row], bool] = lambda row: True) -> tuple[Row, str]:
    """The newest times of a kind, which the tables show as well, and where they come from in one line."""
    result, file = newest(what, lambda row: having(row) and (_timed(row) or row["eager_us"] is not None), results)
    meta = result["meta"]
    where = meta["gpu"] or f"{meta['cpu']}, {meta['threads']} threads"
    return result, f"measured {meta['date']} on {where}; benchmarks/results/{file.name}"


def _timed(row: Row) -> bool:
    return row["graph_us"] is not None


def _series(
    rows: Iterable[tuple[float | str, Row]],
    column: str,
    names: dict[str, str],
    *,
    scale: float = 1.0,
    floor: bool = True,
) -> tuple[Series, ...]:
    """A series per implementation of ``names`` that has been timed, in that order, the floor first."""
    rows = [(at, row) for at, row in rows if row["implementation"] in names]
    lowest = {at: row["floor_us"] for at, row in rows} if floor else {}
    made = [Series(FLOOR, tuple(Point(at, us * scale) for at, us in lowest.items()))] if lowest else []
    for name, label in names.items():
        points = tuple(Point(at, row[column] * scale) for at, row in rows if row["implementation"] == name)
        if points:
            made.append(Series(label, points))
    return tuple(made)
