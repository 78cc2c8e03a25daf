"""How good the tuner's choices are: regret, transfer within buckets, repeatability, and what the launch mode changes.

    python benchmarks/choice_quality.py --model qwen3-next-80b-a3b --tp 4 --save       # on the device there is
    python benchmarks/choice_quality.py --quick --tp 8 --device cpu                    # a minute or two

Tunes the workload first (from the store at --root, if there is one), and then
 held out    draws shapes that were not tuned, lets the registry choose, and times every candidate;
 transfer    does the same on other lengths within each tuned problem's buckets: what the buckets cost;
 agreement   tunes a few problems again in fresh processes from empty stores, and counts who chooses the same;
 modes       compares the winners of eager and graph launch, problem by problem.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from record import Row, meta, save
from rich.console import Console
from rich.table import Table

from isokern import registry
from isokern.autotune.candidates import PREDICATE_CODES
from isokern.autotune.regret import NothingToCompareError, Regret, lengths_in_bucket, measure_regret
from isokern.autotune.report import format_duration
from isokern.autotune.tuner import Task
from isokern.autotune.warmup import WarmupPlan, WarmupReport, arch_of, plan_warmup, run_warmup
from isokern.autotune.worker import Worker
from isokern.cache import Entry, Layer, Store
from isokern.registry.ops.fused_sigmoid_gating.catalogue import model as lookup
from isokern.registry.ops.fused_sigmoid_gating.concrete import adversarial_twin, concrete
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.ops.fused_sigmoid_gating.lengths import LengthLayout
from isokern.registry.ops.fused_sigmoid_gating.workload_case import Case, Phase, Tier, case_name, parse_case

OP = "fused_sigmoid_gating"
#: Decode alone, at 1 and at 64 rows, where candidates lie closest together.
AGREE_ON = ("decode N=1", "decode N=64")

app = typer.Typer(add_completion=False)


# ---- shapes


def held_out_cases(count: int, most_tokens: int, seed: int = 0) -> list[Case]:
    """Batches as a server meets them, of any size: decode, one prompt beside decode rows, a prompt, several prompts."""
    draw = random.Random(seed)

    def size(low: int, high: int) -> int:
        return round(2 ** draw.uniform(*(x.bit_length() - 1 for x in (low, high))))

    found: dict[str, Case] = {}
    while len(found) < count:
        kind = draw.choices(("decode", "mixed", "prompt", "prompts"), (5, 3, 1, 1))[0]
        rows, prompt = size(1, min(256, most_tokens)), size(16, most_tokens)
        match kind:
            case "decode":
                phase, lengths = Phase.DECODE, [1] * rows
            case "mixed":
                phase, lengths = Phase.MIXED, [1] * min(rows, most_tokens) + [prompt]
            case "prompt":
                phase, lengths = Phase.PREFILL, [prompt]
            case _:
                n = size(2, 16)
                phase, lengths = Phase.PREFILL, [max(2, round(prompt / n * draw.uniform(0.4, 1.6))) for _ in range(n)]
        layout = LengthLayout.of_lengths(lengths)
        case = Case(case_name(phase, layout), phase, layout)
        found.setdefault(case.name, case)
    return list(found.values())


def transfer_tasks(plan: WarmupPlan, per_problem: int) -> list[Task]:
    """Other lengths of each problem of ``plan``, within its buckets and class; none where a bucket holds one only."""
    found = []
    for planned in plan.problems:
        recipe = planned.task.recipe
        seen = {recipe.case.lengths}
        for seed in range(per_problem):
            layout = lengths_in_bucket(planned.task.problem.profile, seed)
            if layout is None or layout.lengths() in seen:
                continue
            seen.add(layout.lengths())
            spec = recipe.case.but(name=f"{recipe.case.name} as {layout}"[:120], lengths=layout.lengths(), padded=())
            task = Task(replace(recipe, case=spec, twin=adversarial_twin(spec)), planned.task.problem)
            found.append(task)
    return found


def task_of(case: Case, plan: WarmupPlan, mode: str) -> Task:
    """The task of a case in ``plan``'s environment."""
    spec = concrete(lookup(plan.model).shard(plan.tp), case)
    template = plan.problems[0].task.recipe
    recipe = replace(template, case=spec, twin=adversarial_twin(spec), mode=mode)
    return Task(recipe, describe(spec, plan.environment.device, arch_of(plan.environment), recipe.mode))


# ---- measuring


def refused_labels(entries: Iterable[Entry]) -> frozenset[str]:
    """Candidates that were found wrong or broken on some problem: no standard to be measured against."""
    harmless = {"slow", *(code.value for code in PREDICATE_CODES)}
    return frozenset(c.label for entry in entries for c in entry.candidates if c.code and c.code not in harmless)


def measure(what: str, tasks: Sequence[Task], plan: WarmupPlan, blocks: int, out: Console) -> list[Row]:
    """A row per task: what the registry dispatches against the best."""
    policy = plan.settings.policy.measure
    refused = refused_labels(item.entry for item in plan.store.entries(plan.environment))
    rows = []
    with Worker(plan.device, plan.threads, plan.settings.limits) as worker:
        for number, task in enumerate(tasks):
            decision = plan.registry.dispatcher(OP).decide(task.problem)
            try:
                found = measure_regret(
                    worker, task, decision, plan.registry, policy, refused=refused, blocks=blocks, seed=number
                )
            except NothingToCompareError as error:
                out.print(f"{what} {task.recipe.case.name}: {error}", markup=False)
                continue
            rows.append(row_of(what, task, found))
            line = f"{what} {number + 1}/{len(tasks)} {task.recipe.mode} {task.recipe.case.name}"
            out.print(
                f"{line}: {found.choice} {100 * found.regret:+.1f} % of {found.best}", markup=False, highlight=False
            )
    return rows


def row_of(what: str, task: Task, found: Regret) -> Row:
    """As kept in the result file; times of the choice, in the column of its launch mode."""
    backend, _, config = found.choice.partition("[")
    row = Row(f"{task.recipe.mode} {task.recipe.case.name}", "isokern", backend, config.removesuffix("]"))
    setattr(row, f"{task.recipe.mode}_us", round(found.choice_us, 3))
    row.extra = {"what": what, "profile": task.problem.profile.label, **asdict(found)}
    return row


def regret_summary(rows: Sequence[Row], what: str) -> dict[str, Any] | None:
    """Mean and worst regret of one kind of row; a choice faster than "the best" counts as 0."""
    found = [row for row in rows if row.extra["what"] == what]
    if not found:
        return None
    regrets = [max(0.0, row.extra["regret"]) for row in found]
    tuned = sum(row.extra["rule"].startswith("tuned") for row in found)
    return {"count": len(found), "mean": mean(regrets), "worst": max(regrets), "by_tuned_choice": tuned}


def mode_summary(entries: Iterable[Entry]) -> dict[str, Any]:
    """Problems tuned in both launch modes: how many have another winner, and what the wrong one would cost."""
    pairs: dict[frozenset[tuple[str, Any]], dict[str, Entry]] = {}
    for entry in entries:
        rest = frozenset((name, value) for name, value in entry.key.items() if name != "mode")
        pairs.setdefault(rest, {})[entry.measured["policy"]] = entry
    both = [(p["eager"], p["graph"]) for p in pairs.values() if len(p) == 2]
    differ = [(eager, graph) for eager, graph in both if eager.label != graph.label]
    costs = [cost for eager, graph in differ for cost in (_cost(eager, graph), _cost(graph, eager)) if cost]
    return {"pairs": len(both), "differ": len(differ), "worst": max(costs, default=1.0)}


def _cost(chosen_for: Entry, used_in: Entry) -> float | None:
    """How many times the winner's time the other mode's winner takes."""
    there = next((c.median_us for c in used_in.candidates if c.label == chosen_for.label), None)
    best = used_in.chosen.median_us
    return there / best if there and best else None


# ---- agreement of fresh tuning runs


def agreement(
    model: str, tp: int, device: str, cases: Sequence[str], processes: int, out: Console
) -> tuple[dict[str, Any], list[Row]]:
    """Tune ``cases`` from nothing in so many processes, one after the other, and compare the winners."""
    votes: dict[str, Counter[str]] = {}
    runs = []
    for number in range(processes):
        with tempfile.TemporaryDirectory(prefix="isokern-choice-") as root:
            command = [
                sys.executable,
                __file__,
                "once",
                "--model",
                model,
                "--tp",
                str(tp),
                "--device",
                device,
                "--root",
                root,
            ]
            done = subprocess.run([*command, *cases], capture_output=True, text=True, check=True)
        chosen = json.loads(done.stdout.splitlines()[-1])
        runs.append(tuple(sorted(chosen.items())))
        for case, label in chosen.items():
            votes.setdefault(case, Counter())[label] += 1
        out.print(f"agreement {number + 1}/{processes}: {chosen}", markup=False, highlight=False)
    return agreement_summary(runs), [
        Row(case, "isokern", extra={"what": "agreement", "votes": dict(counter)}) for case, counter in votes.items()
    ]


def agreement_summary(runs: Sequence[tuple[tuple[str, str], ...]]) -> dict[str, Any]:
    """How many runs chose the same for every problem as the largest group of runs."""
    largest = Counter(runs).most_common(1)[0][1] if runs else 0
    return {"runs": len(runs), "agreeing": largest, "problems": len(runs[0]) if runs else 0}


@app.command()
def once(
    cases: list[str],
    model: Annotated[str, typer.Option()],
    tp: Annotated[int, typer.Option()],
    device: Annotated[str, typer.Option()],
    root: Annotated[Path, typer.Option()],
) -> None:
    """One tuning run; prints the winners as JSON. Used by the agreement part."""
    store = Store([Layer("explicit", root, writable=True)])
    registry.use_store(store)
    plan = plan_warmup(model, tp, [parse_case(case) for case in cases], device, tier=Tier.FULL, store=store)
    report = run_warmup(plan, check=False)
    chosen = {f"{p.planned.task.recipe.mode} {p.planned.cases[0]}": p.entry.label for p in report.problems if p.entry}
    typer.echo(json.dumps(chosen))


# ---- all of it


def estimate_summary(report: WarmupReport) -> dict[str, Any] | None:
    """What the dry run had said against what it took; None if nothing was tuned."""
    estimate = report.plan.estimate_s
    if not estimate or report.skipped:
        return None
    took = sum(p.seconds for p in report.problems)
    text = f"{format_duration(took)} of tuning, {format_duration(estimate)} estimated"
    return {"estimated_s": round(estimate, 1), "took_s": round(took, 1), "ratio": took / estimate, "text": text}


@app.command()
def run(
    model: Annotated[str, typer.Option()] = "qwen3-next-80b-a3b",
    tp: Annotated[int, typer.Option()] = 1,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    tier: Annotated[Tier, typer.Option(help="how much of the workload is tuned")] = Tier.CORE,
    root: Annotated[Path | None, typer.Option(help="store to tune into, kept; a temporary one if not given")] = None,
    held_out: Annotated[int, typer.Option(help="shapes that were not tuned")] = 40,
    per_bucket: Annotated[int, typer.Option(help="other shapes per tuned problem")] = 2,
    processes: Annotated[int, typer.Option(help="tuning runs from nothing")] = 20,
    blocks: Annotated[int, typer.Option(help="times that each candidate is timed")] = 20,
    most_tokens: Annotated[int, typer.Option(help="of a held-out shape; 0: 8192, or 512 on a CPU")] = 0,
    quick: Annotated[bool, typer.Option("--quick", help="a few of everything")] = False,
    keep: Annotated[bool, typer.Option("--save", help="write the result file")] = False,
) -> None:
    """Tune, measure, print; with --save also write the result file."""
    out = Console(width=140)
    if quick:
        tier, held_out, per_bucket, processes, blocks = Tier.SMOKE, 3, 1, 2, 6
    with tempfile.TemporaryDirectory(prefix="isokern-choice-") as scratch:
        store = Store([Layer("explicit", root or Path(scratch), writable=True)])
        registry.use_store(store)
        plan = plan_warmup(model, tp, None, device, tier=tier, store=store)
        began = time.monotonic()
        report = run_warmup(plan)
        for error in report.errors:
            out.print(error, style="red", markup=False)
        out.print(f"tuned in {format_duration(time.monotonic() - began)}")
        modes = tuple(dict.fromkeys(p.task.recipe.mode for p in plan.problems))
        limit = most_tokens or (512 if plan.environment.device == "cpu" else 8192)
        fresh = [task_of(case, plan, modes[i % len(modes)]) for i, case in enumerate(held_out_cases(held_out, limit))]
        rows = measure("held_out", fresh, plan, blocks, out)
        rows += measure("transfer", transfer_tasks(plan, per_bucket), plan, blocks, out)
        agreed, votes = agreement(model, tp, plan.environment.device, AGREE_ON[: 1 if quick else 2], processes, out)
        summary = {
            "held_out": regret_summary(rows, "held_out"),
            "transfer": regret_summary(rows, "transfer"),
            "agreement": agreed,
            "modes": mode_summary(item.entry for item in store.entries(plan.environment)),
            "estimate": estimate_summary(report),
        }
        show(summary, out)
        if keep:
            information = meta(summary=summary, model=model, tp=tp, device=plan.device, quick=quick)
            out.print(str(save("choice", gpu_name(information), information, [*rows, *votes])))


def gpu_name(information: dict[str, Any]) -> str:
    """``h100``, as in the result files' names; ``none`` without a GPU."""
    gpu = information["gpu"]
    if information["device"] == "cpu" or gpu is None:
        return "none"
    words = str(gpu).lower().removeprefix("nvidia").split()
    return words[0] if words else "gpu"


def show(summary: dict[str, Any], out: Console) -> None:
    """The summary as a table."""
    table = Table(title="quality of the choices", title_justify="left")
    for column in ("what", "result"):
        table.add_column(column)
    for name in ("held_out", "transfer"):
        part = summary[name]
        if part:
            text = f"mean regret {100 * part['mean']:.2f} %, worst {100 * part['worst']:.2f} %, {part['count']} shapes"
            table.add_row(name.replace("_", " "), f"{text}, {part['by_tuned_choice']} by a tuned choice")
    agreed, modes, estimate = summary["agreement"], summary["modes"], summary["estimate"]
    table.add_row("agreement", f"{agreed['agreeing']} of {agreed['runs']} runs, over {agreed['problems']} problems")
    if modes["pairs"]:
        wrong = f"the wrong one costs up to {modes['worst']:.2f}x"
        table.add_row("eager against graph", f"{modes['differ']} of {modes['pairs']} differ; {wrong}")
    else:
        table.add_row("eager against graph", "this device has one launch mode only")
    if estimate:
        table.add_row("dry run's estimate", f"{estimate['ratio']:.2f}x: {estimate['text']}")
    out.print(table)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.argv.insert(1, "run")  # `once` is for the agreement part alone
    app()
