"""Whether fresh processes choose alike, and what a full store saves them: each tunes, or looks up, in its own process.

python benchmarks/choice_processes.py once --model M --tp 1 --device cuda --root DIR "decode N=1" "decode N=64"
python benchmarks/choice_processes.py again --model M --tp 1 --device cuda --root DIR
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import typer
from record import Row
from rich.console import Console

from isokern import registry
from isokern.autotune.warmup import plan_warmup, run_warmup
from isokern.cache import Layer, Store
from isokern.registry.ops.fused_sigmoid_gating.workload_case import Tier, parse_case

__all__ = ["agreement", "agreement_summary", "look_up"]

#: On a GPU so many processes live at a time: one has the device while others start and end.
_AT_ONCE = 4

app = typer.Typer(add_completion=False)

Model = Annotated[str, typer.Option()]
Tp = Annotated[int, typer.Option()]
Device = Annotated[str, typer.Option()]
Root = Annotated[Path, typer.Option()]
HowMuch = Annotated[Tier | None, typer.Option()]


@app.command()
def once(cases: list[str], model: Model, tp: Tp, device: Device, root: Root) -> None:
    """One tuning run from what is at ``root``; prints the winners as JSON."""
    store = Store([Layer("explicit", root, writable=True)])
    registry.use_store(store)
    plan = plan_warmup(model, tp, [parse_case(case) for case in cases], device, store=store)
    report = run_warmup(plan, check=False, compilers=0)
    chosen = {f"{p.planned.task.recipe.mode} {p.planned.cases[0]}": p.entry.label for p in report.problems if p.entry}
    typer.echo(json.dumps(chosen))


@app.command()
def again(model: Model, tp: Tp, device: Device, root: Root, tier: HowMuch = None) -> None:
    """A warm-up that finds everything in the store; prints how many problems there were and were known."""
    store = Store([Layer("explicit", root, writable=True)])
    registry.use_store(store)
    report = run_warmup(plan_warmup(model, tp, None, device, tier=tier, store=store))
    typer.echo(json.dumps({"problems": len(report.problems), "known": sum(p.was_known for p in report.problems)}))


def _ask(command: str, model: str, tp: int, device: str, root: str | Path, *rest: str) -> dict[str, Any]:
    """What one process says in its last line. Raises: CalledProcessError."""
    options = ["--model", model, "--tp", str(tp), "--device", device, "--root", str(root)]
    call = [sys.executable, __file__, command, *options, *rest]
    done = subprocess.run(call, capture_output=True, text=True, check=True)
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def look_up(model: str, tp: int, device: str, root: Path, tier: Tier | None) -> dict[str, Any]:
    """A whole warm-up from a full store: ``seconds`` from starting the process to its end, ``problems``, ``known``."""
    began = time.monotonic()
    said = _ask("again", model, tp, device, root, *(("--tier", tier.value) if tier else ()))
    return {"tp": tp, "seconds": round(time.monotonic() - began, 2), **said}


def agreement(
    model: str, tp: int, device: str, cases: Sequence[str], processes: int, out: Console
) -> tuple[dict[str, Any], list[Row]]:
    """Tune ``cases`` from nothing in so many processes, and compare the winners."""

    def run(number: int) -> dict[str, str]:
        with tempfile.TemporaryDirectory(prefix="isokern-choice-") as root:
            chosen: dict[str, str] = _ask("once", model, tp, device, root, *cases)
        out.print(f"agreement {number + 1}/{processes}: {chosen}", markup=False, highlight=False)
        return chosen

    with ThreadPoolExecutor(1 if device == "cpu" else _AT_ONCE) as pool:
        runs = list(pool.map(run, range(processes)))
    votes: dict[str, Counter[str]] = {}
    for chosen in runs:
        for case, label in chosen.items():
            votes.setdefault(case, Counter())[label] += 1
    return agreement_summary([tuple(sorted(chosen.items())) for chosen in runs]), [
        Row(case, "isokern", extra={"what": "agreement", "votes": dict(counter)}) for case, counter in votes.items()
    ]


def agreement_summary(runs: Sequence[tuple[tuple[str, str], ...]]) -> dict[str, Any]:
    """How many runs chose the same for every problem as the largest group of runs."""
    largest = Counter(runs).most_common(1)[0][1] if runs else 0
    return {"runs": len(runs), "agreeing": largest, "problems": len(runs[0]) if runs else 0}


if __name__ == "__main__":
    app()
