"""How good the tuner's choices are: regret, transfer within buckets, repeatability, and what the launch mode changes.

    python benchmarks/choice_quality.py --model qwen3-next-80b-a3b --tp 1 --tp 4 --save   # on the device there is
    python benchmarks/choice_quality.py --quick --tp 8 --device cpu                       # a minute or two
    python benchmarks/choice_quality.py left-out STORE                                    # any store, no device

Tunes the workload first (into the store at --root, if there is one), and then
 again       runs the same warm-up in a fresh process, which finds everything;
 modes       compares the winners of eager and graph launch, problem by problem;
 left out    leaves each entry of the store out in turn, and compares what near ones say with what it holds;
 planted     on a GPU, races wrong and broken kernels against a right one: each must be rejected for what it is;
 agreement   tunes a few problems again in fresh processes from empty stores, and counts who chooses the same;
 held out    draws shapes that were not tuned, lets the registry choose, and times every candidate;
 transfer    does as held out on other lengths within tuned problems' buckets: what the buckets cost.
The last two begin no further shape after --seconds; how many were left out is part of the result.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import cycle
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

import typer
from choice_left_out import left_out
from choice_planted import planted, planted_summary
from choice_processes import agreement, look_up
from choice_shapes import held_out_cases, sample_of, task_of, transfer_tasks
from record import Row, meta, save
from rich.console import Console
from rich.table import Table

from isokern import registry
from isokern.autotune.candidates import PREDICATE_CODES
from isokern.autotune.regret import NothingToCompareError, Regret, measure_regret
from isokern.autotune.report import format_duration
from isokern.autotune.tuner import Task
from isokern.autotune.warmup import WarmupPlan, WarmupReport, plan_warmup, run_warmup
from isokern.autotune.worker import Worker
from isokern.cache import Entry, Layer, Store
from isokern.registry.ops.fused_sigmoid_gating.workload_case import Policy, Tier

OP = "fused_sigmoid_gating"
#: Decode alone, at 1 and at 64 rows, where candidates lie closest together.
AGREE_ON = ("decode N=1", "decode N=64")
#: Seconds of a shape's blocks within which more of them are taken: of calls that take little time.
SPARE_S = 0.5

app = typer.Typer(add_completion=False)


# ---- measuring


def refused_labels(entries: Iterable[Entry]) -> frozenset[str]:
    """Candidates that were found wrong or broken on some problem: no standard to be measured against."""
    harmless = {"slow", *(code.value for code in PREDICATE_CODES)}
    return frozenset(c.label for entry in entries for c in entry.candidates if c.code and c.code not in harmless)


class Judge:
    """Compares the registry's choices with every other candidate, in one worker.

    Attributes:
        times: of each shape, what was chosen and each candidate's median, microseconds per call.
        left_over: by part, shapes that ``until`` left no time for.
    """

    def __init__(self, worker: Worker, blocks: int, until: float, out: Console) -> None:
        self.worker = worker
        self.blocks = blocks
        self.until = until
        self.out = out
        self.times: list[dict[str, Any]] = []
        self.left_over: dict[str, int] = {}

    def rows(self, what: str, tasks: Sequence[tuple[WarmupPlan, Task]]) -> list[Row]:
        """A row per task that there was time for: what the registry dispatches against the best."""
        found: list[Row] = []
        refused: dict[str, frozenset[str]] = {}
        for number, (plan, task) in enumerate(tasks):
            if time.monotonic() > self.until:
                self.left_over[what] = len(tasks) - number
                self.out.print(f"{what}: no time for {len(tasks) - number} of {len(tasks)}", markup=False)
                break
            if plan.environment.hash not in refused:
                entries = (item.entry for item in plan.store.entries(plan.environment))
                refused[plan.environment.hash] = refused_labels(entries)
            row = self._row(what, plan, task, refused[plan.environment.hash], number)
            if row is not None:
                found.append(row)
                said = f"{what} {number + 1}/{len(tasks)} {row.case} ({row.extra['rule']}): {row.extra['choice']}"
                said += f" {100 * row.extra['regret']:+.1f} % of {row.extra['best']}, {row.extra['seconds']} s"
                self.out.print(said, markup=False, highlight=False)
        return found

    def _row(self, what: str, plan: WarmupPlan, task: Task, refused: frozenset[str], seed: int) -> Row | None:
        began = time.monotonic()
        decision = plan.registry.dispatcher(OP).decide(task.problem)
        try:
            found = measure_regret(
                self.worker,
                task,
                decision,
                plan.registry,
                plan.settings.policy.measure,
                refused=refused,
                blocks=self.blocks,
                spare_s=SPARE_S,
                seed=seed,
            )
        except NothingToCompareError as error:
            self.out.print(f"{what} {task.recipe.case.name}: {error}", markup=False)
            return None
        row = row_of(what, task, found)
        row.extra["seconds"] = round(time.monotonic() - began, 2)
        times = {name: round(us, 4) for name, us in found.times_us.items()}
        key = {"what": what, "case": row.case, "key": dict(task.problem.key())}
        self.times.append(key | {"choice": found.choice, "rule": found.rule, "times_us": times})
        return row


def row_of(what: str, task: Task, found: Regret) -> Row:
    """As kept in the result file; times of the choice, in the column of its launch mode."""
    backend, _, config = found.choice.partition("[")
    row = Row(f"{task.recipe.mode} {task.recipe.case.name}", "isokern", backend, config.removesuffix("]"))
    setattr(row, f"{task.recipe.mode}_us", round(found.choice_us, 3))
    row.extra = {"what": what, "profile": task.problem.profile.label, **asdict(found)}
    del row.extra["times_us"]
    return row


def regret_summary(rows: Sequence[Row], what: str) -> dict[str, Any] | None:
    """Mean and worst regret of one kind of row; a choice faster than "the best" counts as 0.

    ``signed_mean`` counts it as it is: of equals as many look a little faster as slower, and only 0 on average.
    """
    found = [row for row in rows if row.extra["what"] == what]
    if not found:
        return None
    regrets = [max(0.0, row.extra["regret"]) for row in found]
    tuned = sum(row.extra["rule"].startswith("tuned") for row in found)
    near = sum(row.extra["rule"] == "neighbour" for row in found)
    worst = max(regrets)
    signed = mean(row.extra["regret"] for row in found)
    how = {"by_tuned_choice": tuned, "by_neighbour": near}
    return {"count": len(found), "mean": mean(regrets), "signed_mean": signed, "worst": worst} | how


def left_out_summary(rows: Sequence[Row]) -> dict[str, Any] | None:
    """As :func:`regret_summary`, and what the heuristic order would lose on the same entries."""
    found = regret_summary(rows, "left_out")
    if found is None:
        return None
    default = [max(0.0, row.extra["default_regret"]) for row in rows if row.extra["what"] == "left_out"]
    return found | {"heuristic_mean": mean(default), "heuristic_worst": max(default)}


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


# ---- all of it


def estimate_summary(reports: Sequence[WarmupReport]) -> dict[str, Any] | None:
    """What the dry runs had said against what they took; None if nothing was tuned."""
    estimate = sum(report.plan.estimate_s for report in reports)
    if not estimate or any(report.skipped for report in reports):
        return None
    took = sum(report.seconds for report in reports)
    text = f"{format_duration(took)} of tuning, {format_duration(estimate)} estimated"
    each = {
        str(r.plan.shards[0][1]): {"estimated_s": round(r.plan.estimate_s, 1), "took_s": round(r.seconds, 1)}
        for r in reports
    }
    whole = {"estimated_s": round(estimate, 1), "took_s": round(took, 1), "ratio": took / estimate, "text": text}
    return whole | {"by_tp": each}


def tuned(
    model: str, tps: Sequence[int], device: str, tier: Tier | None, store: Store, out: Console
) -> tuple[list[WarmupReport], float]:
    """Warm up for every number of ranks; the reports, and seconds of it all."""
    began = time.monotonic()
    reports = []
    for tp in tps:
        plan = plan_warmup(model, tp, None, device, tier=tier, store=store)
        reports.append(run_warmup(plan))
        for error in reports[-1].errors:
            out.print(error, style="red", markup=False)
    seconds = time.monotonic() - began
    out.print(f"tuned in {format_duration(seconds)}")
    return reports, seconds


def warmup_summary(reports: Sequence[WarmupReport], seconds: float, again: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """How long warm-ups take from an empty and from a full store, and what fresh processes then dispatch."""
    problems = [p for report in reports for p in report.problems]
    proofs = [p.proof for p in problems if p.proof is not None]
    return {
        "problems": len(problems),
        "tuned": sum(p.entry is not None and not p.was_known for p in problems),
        "proven": sum(proof.ok for proof in proofs),
        "seconds": round(seconds, 1),
        "again": list(again),
    }


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    model: Annotated[str, typer.Option()] = "qwen3-next-80b-a3b",
    tp: Annotated[list[int] | None, typer.Option(help="numbers of ranks; repeatable (1)")] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda or auto")] = "auto",
    tier: Annotated[Tier | None, typer.Option(help="how much is tuned; core on a CPU, wide on a GPU")] = None,
    root: Annotated[Path | None, typer.Option(help="store to tune into, kept; a temporary one if not given")] = None,
    held_out: Annotated[int, typer.Option(help="shapes that were not tuned")] = 40,
    transfers: Annotated[int, typer.Option("--transfer", help="other shapes of tuned problems' buckets")] = 24,
    processes: Annotated[int, typer.Option(help="tuning runs from nothing")] = 20,
    blocks: Annotated[int, typer.Option(help="times that each candidate is timed, or more")] = 10,
    most_s: Annotated[float, typer.Option("--seconds", help="after so many no further shape is judged")] = 570.0,
    most_tokens: Annotated[int, typer.Option(help="of a held-out shape; 0: 8192, or 512 on a CPU")] = 0,
    traps: Annotated[list[Policy] | None, typer.Option(help="launch modes to plant candidates in; all")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a few of everything")] = False,
    keep: Annotated[bool, typer.Option("--save", help="write the result file into benchmarks/results")] = False,
    report: Annotated[Path | None, typer.Option("--out", help="write the result file here, after every part")] = None,
    all_times: Annotated[Path | None, typer.Option("--times", help="write every candidate's times here")] = None,
    commit: Annotated[str | None, typer.Option(help="of this source, where git cannot tell")] = None,
) -> None:
    """Tune, measure, print; with --save also write the result file."""
    if context.invoked_subcommand is not None:
        return
    out = Console(width=140)
    tps = tp or [1]
    if quick:
        tier, held_out, transfers, processes, blocks = Tier.SMOKE, 3, 2, 2, 6
    began = time.monotonic()
    rows: list[Row] = []
    summary: dict[str, Any] = {}

    def so_far(**parts: Any) -> dict[str, Any]:
        """Put ``parts`` into the summary, and what there is into the file: a later part may be cut off."""
        summary.update(parts)
        about = {"summary": summary, "model": model, "tp": tps, "device": device, "quick": quick}
        information = information_of(about, commit) if keep or report else {}
        if report is not None:
            report.write_text(json.dumps({"meta": information, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
        return information

    with tempfile.TemporaryDirectory(prefix="isokern-choice-") as scratch:
        where = root or Path(scratch)
        store = Store([Layer("explicit", where, writable=True)])
        registry.use_store(store)
        reports, seconds = tuned(model, tps, device, tier, store, out)
        plans = [one.plan for one in reports]
        device, on_cpu = plans[0].device, plans[0].environment.device == "cpu"
        again = [look_up(model, ranks, device, where, tier) for ranks in tps]
        rows += left_out(store.entries(plans[0].environment))
        modes = tuple(dict.fromkeys(p.task.recipe.mode for p in plans[0].problems))
        so_far(
            warmup=warmup_summary(reports, seconds, again),
            estimate=estimate_summary(reports),
            modes=mode_summary(item.entry for item in store.entries(plans[0].environment)),
            left_out=left_out_summary(rows),
        )
        if not on_cpu:
            rows += planted(device, tuple(policy.value for policy in traps or ()) or modes, out)
            so_far(planted=planted_summary(rows))
        agreed, votes = agreement(model, tps[0], device, AGREE_ON[: 1 if quick else 2], processes, out)
        rows += votes
        so_far(agreement=agreed)
        drawn = held_out_cases(held_out, most_tokens or (512 if on_cpu else 8192))
        # Each launch mode with each number of ranks, whatever there are of both.
        ways = [(plan, mode) for plan in plans for mode in modes]
        fresh = [(plan, task_of(case, plan, mode)) for case, (plan, mode) in zip(drawn, cycle(ways), strict=False)]
        others = [(plan, task) for plan in plans for task in transfer_tasks(plan, 1)]
        with Worker(device, plans[0].threads, plans[0].settings.limits) as worker:
            judge = Judge(worker, blocks, began + most_s, out)
            rows += judge.rows("held_out", fresh)
            so_far(held_out=regret_summary(rows, "held_out"))
            rows += judge.rows("transfer", sample_of(others, transfers))
        if all_times is not None:
            all_times.write_text(json.dumps(judge.times) + "\n")
        information = so_far(
            transfer=regret_summary(rows, "transfer"),
            left_over=judge.left_over,
            seconds=round(time.monotonic() - began, 1),
        )
        show(summary, out)
        if keep:
            out.print(str(save("choice", gpu_name(information), information, rows)))


@app.command("left-out")
def leave_out(
    root: Annotated[Path, typer.Argument(help="a store's directory", exists=True, file_okay=False)],
    report: Annotated[Path | None, typer.Option("--out", help="write the rows here, as JSON")] = None,
) -> None:
    """Choose for each entry of a store by the others, and compare with the times that it holds. Tunes nothing."""
    out = Console(width=140)
    rows = left_out(Store([Layer("explicit", root)]).entries())
    summary = left_out_summary(rows)
    if summary is None:
        out.print(f"no entries in {root}", markup=False)
        raise typer.Exit(1)
    for row in sorted(rows, key=lambda row: -row.extra["regret"]):
        found = row.extra
        line = f"{row.case}: {found['rule']} {found['choice']} {100 * found['regret']:+.1f} % of {found['best']}"
        out.print(f"{line}; heuristic {100 * found['default_regret']:+.1f} %", markup=False, highlight=False)
    out.print(_left_out_text(summary), markup=False, highlight=False)
    if report is not None:
        content = {"summary": summary, "rows": [asdict(row) for row in rows]}
        report.write_text(json.dumps(content, indent=1) + "\n")


def _left_out_text(part: dict[str, Any]) -> str:
    heuristic = f"{100 * part['heuristic_mean']:.2f} %, worst {100 * part['heuristic_worst']:.2f} %"
    regret = f"mean regret {100 * part['mean']:.2f} %, worst {100 * part['worst']:.2f} %"
    return f"{regret}, {part['count']} entries, {part['by_neighbour']} by near ones (the heuristic order: {heuristic})"


def information_of(about: dict[str, Any], commit: str | None) -> dict[str, Any]:
    """The result file's ``meta``."""
    if about["device"] == "cpu":
        return meta(**about)
    from isokern.tools.gpu_test.machine import describe_run, find

    return describe_run(find(), commit) | {"command": " ".join(["python", *sys.argv])} | about


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
        part = summary.get(name)
        if part:
            text = f"mean regret {100 * part['mean']:.2f} % (signed {100 * part['signed_mean']:.2f} %)"
            text += f", worst {100 * part['worst']:.2f} %, {part['count']} shapes"
            how = f"{part['by_tuned_choice']} by a tuned choice, {part['by_neighbour']} by a neighbour's"
            table.add_row(name.replace("_", " "), f"{text}, {how}")
    if summary.get("left_out"):
        table.add_row("left out", _left_out_text(summary["left_out"]))
    agreed, modes, estimate = summary["agreement"], summary["modes"], summary["estimate"]
    warm, bad = summary["warmup"], summary.get("planted")
    table.add_row(
        "warm-up", f"{format_duration(warm['seconds'])} for {warm['tuned']} problems, {warm['proven']} proven"
    )
    for one in warm["again"]:
        table.add_row("again", f"TP {one['tp']}: {one['seconds']} s, {one['known']} of {one['problems']} known")
    if bad:
        table.add_row("planted", f"{bad['as_expected']} of {bad['candidates']} ended as they should")
    table.add_row("agreement", f"{agreed['agreeing']} of {agreed['runs']} runs, over {agreed['problems']} problems")
    if modes["pairs"]:
        wrong = f"the wrong one costs up to {modes['worst']:.2f}x"
        table.add_row("eager against graph", f"{modes['differ']} of {modes['pairs']} differ; {wrong}")
    else:
        table.add_row("eager against graph", "this device has one launch mode only")
    if estimate:
        table.add_row("dry run's estimate", f"{estimate['ratio']:.2f}x: {estimate['text']}")
        for tp, one in estimate["by_tp"].items():
            table.add_row(f"TP {tp}", f"{one['took_s']} s, {one['estimated_s']} s estimated")
    out.print(table)


if __name__ == "__main__":
    app()
