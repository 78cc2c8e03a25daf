"""Results of ``benchmarks/choice_quality.py`` as a report shows them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import StoreError

__all__ = ["Quality", "QualityLine", "Tile", "load_quality"]

_SHOWN = 40  # worst rows first; the file has them all


@dataclass(frozen=True, slots=True)
class Tile:
    """A number, with its unit, and what it says."""

    value: str
    text: str


@dataclass(frozen=True, slots=True)
class QualityLine:
    """One shape that was measured; ``regret`` as a fraction of the fastest candidate's time."""

    what: str
    case: str
    choice: str
    regret: float


@dataclass(frozen=True, slots=True)
class Quality:
    """Attributes: ``source``, where and when it was measured; ``tiles``; ``lines``, the worst first."""

    source: str
    tiles: tuple[Tile, ...]
    lines: tuple[QualityLine, ...]


def load_quality(path: Path) -> Quality:
    """Read a result file. Raises: StoreError, if it cannot be read or is none."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        meta, rows = record["meta"], record["rows"]
        device = meta["gpu"] or f"{meta['cpu']}, {meta['threads']} threads"
        source = f"Measured on {device} on {meta['date']} by {path.name}."
        return Quality(source, _tiles(meta["summary"]), _lines(rows))
    except OSError as error:
        raise StoreError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path} holds no results of choice_quality.py: {type(error).__name__}: {error}") from error


def _tiles(summary: Mapping[str, Any]) -> tuple[Tile, ...]:
    found = []
    texts = {
        "held_out": "on shapes that were not tuned",
        "transfer": "on other shapes of tuned buckets",
    }
    for name, text in texts.items():
        part = summary.get(name)
        if part:
            value = f"{100 * part['mean']:.1f} %"
            found.append(Tile(value, f"mean regret {text}; worst {100 * part['worst']:.1f} %, {part['count']} shapes"))
    planted = summary.get("planted")
    if planted:
        value = f"{planted['as_expected']} of {planted['candidates']}"
        found.append(Tile(value, "planted candidates, right, wrong and broken ones, ended as they should"))
    warm = summary.get("warmup")
    if warm:
        text = f"to tune {warm['tuned']} problems from nothing; fresh processes dispatch {warm['proven']} of them"
        found.append(Tile(f"{warm['seconds']:.0f} s", text))
    agreement = summary.get("agreement")
    if agreement:
        value = f"{agreement['agreeing']} of {agreement['runs']}"
        found.append(Tile(value, f"tuning runs from nothing chose the same, over {agreement['problems']} problems"))
    modes = summary.get("modes")
    if modes and modes["pairs"]:
        text = "problems have another winner in a graph than eagerly"
        text += f"; choosing by the wrong one costs up to {modes['worst']:.1f}×"
        found.append(Tile(f"{modes['differ']} of {modes['pairs']}", text))
    estimate = summary.get("estimate")
    if estimate:
        found.append(Tile(f"{estimate['ratio']:.1f}×", f"the time that was estimated: {estimate['text']}"))
    return tuple(found)


def _lines(rows: list[dict[str, Any]]) -> tuple[QualityLine, ...]:
    names = {"held_out": "not tuned", "transfer": "same bucket"}
    found = [
        QualityLine(
            names[row["extra"]["what"]], row["case"], f"{row['backend']}[{row['config']}]", row["extra"]["regret"]
        )
        for row in rows
        if row["extra"].get("what") in names
    ]
    return tuple(sorted(found, key=lambda line: -line.regret)[:_SHOWN])
