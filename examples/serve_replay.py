"""Replay batches as real servers see them through a stack of linear-attention layers, on every choice of backend.

    python examples/serve_replay.py --tp 8 --steps 40
    python examples/serve_replay.py --tp 8 --mix code --load 4 --tune 300 --store build/store --out build/replay.json

Requests are drawn like two production traces and batched as engines do (see replay_traffic.py). The same steps run on
the registry's own choice, tuned for exactly these problems with ``--tune``, and on every backend that can serve them
all, a few steps at a time in turn. Before anything is timed, all of it runs once and is judged: against float64, and
each choice against the others. A step's time is its layout, its slots and all layers' calls, until the device is done.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import torch
import typer
from replay_engine import Capture, Choice
from replay_measure import OWN, Field, Outcome, replay
from replay_traffic import MIXES, Traffic, representative, summary
from rich.console import Console
from rich.table import Table

from isokern import registry
from isokern.autotune.progress import Progress
from isokern.autotune.warmup import plan_warmup, run_warmup
from isokern.cache.store import Store
from isokern.errors import IsokernError
from isokern.registry.ops.fused_sigmoid_gating.catalogue import model
from isokern.registry.ops.fused_sigmoid_gating.workload_case import STATE_LAYOUTS, Tier

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

app = typer.Typer(add_completion=False)
console = Console(width=max(120, Console().width), highlight=False)


class _Lines(Progress):
    """A line for each problem that a warm-up has done."""

    def end(self, problem: str, outcome: str, seconds: float) -> None:
        console.print(f"  {problem}: {outcome} ({seconds:.1f} s)", markup=False)

    def note(self, text: str) -> None:
        console.print(f"  {text}", markup=False)


def record() -> ModuleType:
    """``benchmarks/record.py``: the form of result files."""
    if "record" not in sys.modules:
        found = importlib.util.spec_from_file_location("record", BENCHMARKS / "record.py")
        assert found is not None
        assert found.loader is not None
        module = importlib.util.module_from_spec(found)
        sys.modules["record"] = module  # dataclasses look their module up
        found.loader.exec_module(module)
    return sys.modules["record"]


def tune(field: Field, tp: int, traffics: Sequence[Traffic], seconds: float) -> dict[str, Any]:
    """Warm up the very problems of ``traffics``, in the registry's store; what came of it."""
    cases = field.cases(traffics)
    plan = plan_warmup(field.shard.model, tp, cases, field.device, tier=Tier.FULL)
    known = sum(problem.known for problem in plan.problems)
    console.print(f"{len(plan.problems)} problems, {known} known; tuning for {seconds:g} s into {plan.store_path}")
    report = run_warmup(plan, _Lines(), budget_s=seconds)
    for error in report.errors:
        console.print(error, style="red", markup=False)
    facts = {"problems": len(plan.problems), "known": known, "skipped": len(report.skipped), "failed": report.errors}
    if report.skipped:
        console.print(f"{len(report.skipped)} problems not reached: run again to go on, or give it more time")
    registry.refresh()
    return {**facts, "seconds": round(report.seconds, 1)}


def table(outcome: Outcome) -> Table:
    """One line per choice, the registry's own first, then by total time."""
    rows = Table(title=f"{outcome.traffic.label}: {summary(outcome.traffic)}", title_justify="left")
    for column in ("choice", "median ms", "p95 ms", "total ms", "isokern gains", "rounds", "steps by"):
        rows.add_column(column, justify="left" if column in ("choice", "steps by") else "right", overflow="fold")
    for timing in (outcome.own, *sorted(outcome.timings[1:], key=lambda t: t.total_s)):
        gain, least, most = outcome.own.gain_over(timing)
        own = timing is outcome.own
        by = ", ".join(f"{count} {words}" for words, count in timing.ran.most_common(3))
        rows.add_row(
            timing.choice.name + (" (graphs)" if timing.graphed else ""),
            f"{1e3 * timing.median_s:.3f}",
            f"{1e3 * timing.p95_s:.3f}",
            f"{1e3 * timing.total_s:.1f}",
            "" if own else f"{gain:.2f}x",
            "" if own else f"{least:.2f} to {most:.2f}",
            by.replace("[", "\\["),
        )
    return rows


def overall(outcomes: Sequence[Outcome]) -> list[tuple[str, float]]:
    """Total seconds over all traffics, of every choice that served them all; the registry's own first."""
    names = [timing.choice.name for timing in outcomes[0].timings]
    totals = [{timing.choice.name: timing.total_s for timing in outcome.timings} for outcome in outcomes]
    found = [(name, sum(total[name] for total in totals)) for name in names if all(name in total for total in totals)]
    return [found[0], *sorted(found[1:], key=lambda entry: entry[1])]


def rows_of(outcome: Outcome, layers: int) -> list[Any]:
    """The rows of a result file: times per step, in microseconds; a line for who was left out as well."""
    row, own, rows = record().Row, outcome.own, []
    for timing in outcome.timings:
        gain, least, most = own.gain_over(timing)
        entry = row(outcome.traffic.label, timing.choice.name, eager_us=round(1e6 * timing.median_s, 1))
        if timing.choice != OWN:
            entry.backend = timing.choice.name
        entry.extra = {
            "layers": layers,
            "steps": len(timing.steps),
            "rounds": len(timing.rounds),
            "p95_us": round(1e6 * timing.p95_s, 1),
            "total_us": round(1e6 * timing.total_s, 1),
            "isokern_gains": round(gain, 4),
            "isokern_gains_by_round": [round(least, 4), round(most, 4)],
            "graphs": timing.graphed,
            "ran": dict(timing.ran),
        }
        rows.append(entry)
    for name, reason in outcome.left_out.items():
        entry = row(outcome.traffic.label, name, backend=name)
        entry.extra = {"left_out": reason}
        rows.append(entry)
    return rows


def _capture() -> Capture:
    from isokern.autotune.measure_cuda import captured

    return lambda launch: captured(launch).replay


def _print(outcome: Outcome) -> None:
    console.print(table(outcome))
    best = outcome.best_fixed
    if best is not None:
        gain, least, most = outcome.own.gain_over(best)
        words = f"against the best fixed choice, {best.choice.name}: {gain:.3f}x ({least:.3f} to {most:.3f} by round)"
        same = (
            "; both run the same kernels, so this is the machine's own" if best.kernels == outcome.own.kernels else ""
        )
        console.print(f"{outcome.traffic.label}, {words}{same}")
    for name, reason in outcome.left_out.items():
        console.print(f"  without {name}: {reason}", markup=False)
    console.print()


@app.command()
def main(
    model_name: Annotated[str, typer.Option("--model", "-m", help="a model of the catalogue")] = "qwen3-next-80b-a3b",
    tp: Annotated[int, typer.Option(help="tensor-parallel size: one rank's heads are served")] = 1,
    layers: Annotated[int, typer.Option(min=1, help="linear-attention layers in the stack")] = 2,
    mixes: Annotated[list[str] | None, typer.Option("--mix", help=f"{', '.join(MIXES)}; repeatable; all")] = None,
    loads: Annotated[
        list[float] | None, typer.Option("--load", help="times the recorded load; repeatable; 1, 2.5 and 4")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="consecutive steps of each mix and load")] = 100,
    rounds: Annotated[int, typer.Option(min=1, help="times that all steps are timed")] = 3,
    seed: Annotated[int, typer.Option(help="of requests, values and the order of choices")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto (cuda where there is one)")] = "auto",
    backends: Annotated[
        list[str] | None,
        typer.Option("--backend", help="a fixed choice, or DECODE+MIXED; repeatable; all that accept every step"),
    ] = None,
    graphs: Annotated[bool, typer.Option("--graphs", help="decode steps as CUDA graphs, where a choice can")] = False,
    state_layout: Annotated[str | None, typer.Option(help="kv or vk, in place of the model's")] = None,
    tune_s: Annotated[
        float | None, typer.Option("--tune", help="first tune these problems, beginning none after so many seconds")
    ] = None,
    store: Annotated[Path | None, typer.Option(help="explicit store of tuned choices, read and written")] = None,
    out: Annotated[Path | None, typer.Option(help="write the results here, as JSON")] = None,
    judged: Annotated[int, typer.Option(help="tokens per layer judged against float64")] = 2048,
    patience: Annotated[float, typer.Option(help="seconds a choice that is not named may take for one step")] = 2.0,
) -> None:
    """Time per step of the registry's choice and of every fixed one, on traffic like two production traces."""
    unknown = [name for name in mixes or () if name not in MIXES]
    if unknown:
        raise typer.BadParameter(f"expected some of {', '.join(MIXES)}, given {unknown[0]!r}", param_hint="--mix")
    if tune_s is not None and store is None:
        raise typer.BadParameter("tuning needs a store to keep its choices in", param_hint="--store")
    if state_layout not in (None, *STATE_LAYOUTS):
        raise typer.BadParameter(f"expected one of {', '.join(STATE_LAYOUTS)}", param_hint="--state-layout")
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if place not in ("cpu", "cuda"):
        raise typer.BadParameter(f"expected cpu, cuda or auto, given {device!r}", param_hint="--device")
    if graphs and place == "cpu":
        raise typer.BadParameter("CUDA graphs need a GPU", param_hint="--graphs")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)  # now, rather than after all of it
    if store is not None:
        registry.use_store(Store.default(store))
    try:
        field = Field(model(model_name).shard(tp), place, state_layout, _capture() if graphs else None)
        traffics = [representative(MIXES[m], x, steps, seed) for m in mixes or MIXES for x in loads or (1.0, 2.5, 4.0)]
        tuned = None if tune_s is None else tune(field, tp, traffics, tune_s)
        outcomes = []
        for traffic in traffics:
            outcome = replay(
                field,
                traffic,
                layers,
                named=[Choice.parse(text) for text in backends or ()],
                rounds=rounds,
                seed=seed,
                judged_tokens=judged,
                patience_s=patience,
            )
            _print(outcome)
            outcomes.append(outcome)
    except IsokernError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from error
    if len(outcomes) > 1:
        (_, own_s), *others = overall(outcomes)
        console.print(f"all traffics: isokern {1e3 * own_s:.1f} ms")
        for name, seconds in others:
            console.print(f"  {name}: {1e3 * seconds:.1f} ms, {seconds / own_s:.3f}x")
    if out is not None:
        information = record().meta(
            what="replay", model=field.shard.model, tp=tp, layers=layers, device=place, seed=seed, tuned=tuned,
            state_layout=state_layout or field.shard.state_layout,
        )  # fmt: skip
        rows = [asdict(row) for outcome in outcomes for row in rows_of(outcome, layers)]
        out.write_text(json.dumps({"meta": information, "rows": rows}, indent=1) + "\n")
        console.print(f"written: {out}", markup=False)


if __name__ == "__main__":
    app()
