"""Every installed library and isokern's own kernels on the same cells, through the registry, in one run.

    python benchmarks/peers.py run --out FILE [--resume] [--groups decode,short] [--libraries fla_chunk,flashqla]
    python benchmarks/peers.py run --smoke --out FILE        # three tiny cells on the CPU: shows that everything works

First the registry is warmed up (isokern's own backends alone): by graph for all cells, then for calls from the host
where those have a goal (``--modes``). Then each implementation, in a process of its own, passes the tuner's gate on
small awkward batches, and runs the cells: judged against the float64 reference, then timed in a CUDA graph and from the
host, its states cold. A library may use what holds for these calls only (no slot of -1) and returns its own tensor, as
it does for its users; gates, gathered states and whatever else it needs from outside are part of its time. A process
that dies or hangs costs one cell. The file is written after every cell; with --resume what is in it is not run again.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import Annotated, Any, ClassVar

import typer
from peers_cells import CELLS, GATES, GROUPS, SMOKE, Cell
from record import meta

from isokern import registry
from isokern.backends.external.adapter import Adapter
from isokern.registry.accuracy import ACCURACIES, DEFAULT
from isokern.registry.decision import RejectCode, Rejected
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.registry.plugins import checked
from isokern.tools.gpu_test import machine as machines
from isokern.tools.gpu_test.report import timing_row
from isokern.tools.peers_table import lines_of, render

ROOT = Path(__file__).resolve().parent.parent
OP = "fused_sigmoid_gating"
OWN = "isokern"
#: Seconds without a word before the first cell: a library's import, and a copy of the GPU's memory.
START_S = 180.0
#: What ``--modes`` may say, and the launch modes that it means.
_MODES = {"graph": ("graph",), "eager": ("eager",), "both": ("graph", "eager")}
#: What ends a child without ending the comparison.
_ENDED = ("crashed", "timeout")
CELLS_BY_NAME = {cell.case: cell for cell in (*GATES, *CELLS, *SMOKE)}

app = typer.Typer(add_completion=False)


# ---- the file


class Results:
    """Rows by implementation and cell, kept equal to a file."""

    def __init__(self, path: Path, information: dict[str, Any]) -> None:
        self.path = path
        self.meta = information
        self.rows: dict[tuple[str, str], dict[str, Any]] = {}

    def resume(self) -> int:
        """Take over an existing file's rows; returns how many. Raises ValueError for another kind of file."""
        if not self.path.exists():
            return 0
        old = json.loads(self.path.read_text())
        if not isinstance(old, dict) or "peers" not in old.get("meta", {}):
            raise ValueError(f"{self.path} is no result of this comparison")
        # What counters were read of these cells belongs to the file, whatever is timed again.
        self.meta |= {name: old["meta"][name] for name in ("counters", "counters_made") if name in old["meta"]}
        for row in old["rows"]:
            self.rows[row["implementation"], row["case"]] = row
        return len(self.rows)

    def add(self, row: dict[str, Any]) -> None:
        """Keep the row, and write the file."""
        copied = row["extra"].pop("copy_TB_s", None)
        if copied is not None:
            self.meta["copy_TB_s"] = copied
        self.rows[row["implementation"], row["case"]] = row
        self.save()

    def as_dict(self) -> dict[str, Any]:
        """As in the file: cells in their own order, implementations as they came."""
        place = {case: i for i, case in enumerate(CELLS_BY_NAME)}
        rows = sorted(self.rows.values(), key=lambda row: place.get(row["case"], len(place)))
        return {"meta": self.meta, "rows": rows}

    def save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=self.path.parent, delete=False) as draft:
            draft.write(json.dumps(self.as_dict(), indent=1) + "\n")
        os.replace(draft.name, self.path)


# ---- processes


class Child:
    """A process that says lines of JSON; its other words are kept for when it dies.

    Attributes:
        patience: seconds that it has to end by itself once it has said all.
        chatter: the last lines on its stdout that are no JSON.
    """

    patience: ClassVar[float] = 10.0

    def __init__(self, words: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - lives as long as the process
        self._process = self._started(words)
        self._lines: Queue[str | None] = Queue()
        self.chatter: deque[str] = deque(maxlen=100)
        threading.Thread(target=self._read, daemon=True).start()

    def _started(self, words: Sequence[str]) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, *words]
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._errors, text=True)

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def say(self, limit: float) -> dict[str, Any] | None:
        """The next thing it says; None if it has ended. Raises TimeoutError after ``limit`` seconds of silence."""
        until = time.monotonic() + limit
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, until - time.monotonic()))
            except Empty:
                raise TimeoutError from None
            if line is None:
                return None
            if line.startswith("{"):  # libraries print as well
                try:
                    said: dict[str, Any] = json.loads(line)
                except json.JSONDecodeError:
                    continue
                return said
            self.chatter.append(line)

    def kill(self) -> None:
        """End it now."""
        self._process.kill()

    def end(self) -> str:
        """Make sure that it has ended; how, and its last words."""
        if self._process.poll() is None:
            try:
                self._process.wait(timeout=self.patience)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        self._errors.seek(0)
        words = " | ".join(self._errors.read().strip().splitlines()[-6:])
        return f"exit status {self._process.returncode}: {words[-500:]}"


def run_implementation(
    who: str, cells: Sequence[Cell], options: Sequence[str], limit: float
) -> Iterator[dict[str, Any]]:
    """A row for each cell, whatever becomes of the processes; a new one goes on where one ended."""
    left = list(cells)
    while left:
        child = Child(["child", who, *options, "--cells", json.dumps([cell.case for cell in left])])
        current: Cell | None = None
        status, before = "crashed", len(left)
        try:
            while (said := child.say(START_S if current is None else limit)) is not None:
                if "begin" in said:
                    current = CELLS_BY_NAME[said["begin"]]
                elif "row" in said:
                    assert current is not None
                    left.remove(current)
                    current = None
                    yield said["row"]
        except TimeoutError:
            status = "timeout"
            child.kill()
        how = child.end()
        if current is None and len(left) < before:
            continue  # it is done, or has said itself that it cannot go on
        # One that ends before its first cell would do so again.
        lost = left if current is None else [current]
        for cell in list(lost):
            left.remove(cell)
            backend = None if who == OWN else who
            yield timing_row(cell.case, who, backend=backend, status=status, faults=[how], group=cell.group)


# ---- who and what


def chosen_cells(groups: str | None, smoke: bool, named: str | None = None) -> list[Cell]:
    """Raises typer.BadParameter for an unknown group, and where no cell's name matches ``named``."""
    if smoke:
        return [GATES[0], *SMOKE]
    wanted = list(GROUPS) if groups is None else groups.split(",")
    unknown = [name for name in wanted if name not in GROUPS]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]}: expected any of {', '.join(GROUPS)}", param_hint="--groups")
    found = [cell for cell in CELLS if cell.group in wanted and re.search(named or "", cell.case)]
    if not found and wanted != ["gate"]:
        raise typer.BadParameter(f"no cell of these groups matches {named}", param_hint="--cells")
    return [*(gate for gate in GATES if gate.group in wanted), *found]


def chosen_implementations(named: str | None, cells: Sequence[Cell], device: str, arch: int) -> list[str]:
    """isokern's choice, its own backends, the installed libraries; or those named, in their order.

    Raises typer.BadParameter for an unknown name.
    """
    known = registry.backends(OP)
    if named is not None:
        wanted = named.split(",")
        unknown = [name for name in wanted if name not in (OWN, *known)]
        if unknown:
            raise typer.BadParameter(
                f"{unknown[0]}: expected any of {', '.join((OWN, *known))}", param_hint="--libraries"
            )
        return wanted
    kind = device.partition(":")[0]
    problems = [describe(cell.spec, kind, arch) for cell in cells]
    able = []
    for backend in known.values():
        verdicts = [checked(backend, problem) for problem in problems]
        absent = all(isinstance(v, Rejected) and v.code is RejectCode.NOT_INSTALLED for v in verdicts)
        slow = backend.provenance == "torch" and kind != "cpu"
        if not slow and not absent and any(verdicts):
            able.append(backend)
    return [
        OWN,
        *(b.name for b in able if not isinstance(b, Adapter)),
        *(b.name for b in able if isinstance(b, Adapter)),
    ]


def information(device: str) -> dict[str, Any]:
    """``meta`` of the file: machine, versions of what was compared."""
    machine = machines.find() if device != "cpu" else None
    made = meta() if machine is None else machines.describe_run(machine, None)
    adapters = [b for b in registry.backends(OP).values() if isinstance(b, Adapter)]
    made["versions"] |= {a.library.distribution: v for a in adapters if (v := a.library.version)}
    made["command"] = " ".join(["python benchmarks/peers.py", *sys.argv[1:]])
    made["peers"] = [a.name for a in adapters]
    return made


# ---- commands


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="Results file: benchmarks/results/<date>_h100_peers.json")],
    groups: Annotated[str | None, typer.Option(help=f"Of {', '.join(GROUPS)}; default: all.")] = None,
    cells: Annotated[str | None, typer.Option(help="Regular expression on the cells' names.")] = None,
    libraries: Annotated[str | None, typer.Option(help="Implementations by name; default: all that are there.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds that one cell of one implementation may take.")] = 150.0,
    resume: Annotated[bool, typer.Option("--resume", help="Keep what the file has, but for what ended badly.")] = False,
    first: Annotated[int | None, typer.Option(min=1, help="Only so many configs of each own backend.")] = 3,
    store: Annotated[Path | None, typer.Option(help="Tuned choices; default: build/peers-store here.")] = None,
    accuracy: Annotated[
        str, typer.Option(help=f"Policy of isokern's own choice: {' or '.join(ACCURACIES)} (bfloat16 operands, too).")
    ] = DEFAULT,
    warmup: Annotated[float, typer.Option(help="Seconds that the warm-up may take; 0: none.")] = 1800.0,
    modes: Annotated[str, typer.Option(help=f"Launches that are warmed up for: {', '.join(_MODES)}.")] = "both",
    smoke: Annotated[bool, typer.Option("--smoke", help="Three tiny cells on the CPU.")] = False,
) -> None:
    """Compare, and print the table. Exit status: 0 done, 2 no GPU or a wrong command line."""
    if accuracy not in ACCURACIES:
        raise typer.BadParameter(f"{accuracy}: expected any of {', '.join(ACCURACIES)}", param_hint="--accuracy")
    if modes not in _MODES:
        raise typer.BadParameter(f"{modes}: expected any of {', '.join(_MODES)}", param_hint="--modes")
    chosen = chosen_cells(groups, smoke, cells)
    machine = None if smoke else machines.find()
    if machine is None and not smoke:
        typer.echo("no CUDA device", err=True)
        raise typer.Exit(2)
    device = "cpu" if machine is None else "cuda"
    who = chosen_implementations(libraries, chosen, device, 0 if machine is None else machine.arch)
    results = Results(out, information(device))
    if resume:
        typer.echo(f"{results.resume()} rows are there already")
    kept = ROOT / "build" / "peers-store" if store is None else store
    options = ["--device", device, "--store", str(kept), "--accuracy", accuracy]
    if OWN in who and warmup:
        _warm_up(
            [cell for cell in chosen if cell.group != "gate"],
            [*options, "--budget", str(warmup), "--modes", modes],
            warmup + START_S,
        )
    for name in who:
        done = {case for (other, case), row in results.rows.items() if other == name and _final(row)}
        left = [cell for cell in chosen if cell.case not in done and (name != OWN or cell.group != "gate")]
        own = not isinstance(registry.backends(OP).get(name), Adapter)
        limits = ["--first", str(first)] if first is not None and own else []
        for row in run_implementation(name, left, [*options, *limits], time_limit):
            results.add(row)
            _tell(row)
    results.save()
    typer.echo("\n" + render(results.as_dict()))
    for line in short_of(results.as_dict()):
        typer.echo(line)


def _final(row: dict[str, Any]) -> bool:
    """Whether another run would find the same."""
    return row["extra"].get("status") not in (*_ENDED, "failed", "no graph")


def _tell(row: dict[str, Any]) -> None:
    extra = row["extra"]
    faults = "" if not extra.get("faults") else f"  ({extra['faults'][0][:160]})"
    error = (
        ""
        if row["error"] is None
        else f" error {row['error']:.2g}{'' if extra.get('conforms') else ' outside the bound'}"
    )
    typer.echo(
        f"{row['implementation']:>18} {row['case']:<34} {extra.get('status')}: graph {row['graph_us']} eager"
        f" {row['eager_us']} us{error} [{row['config'] or ''}] {extra.get('seconds', '')} s{faults}"
    )


def _warm_up(cells: Sequence[Cell], options: Sequence[str], limit: float) -> None:
    child = Child(["tune", *options, "--cells", json.dumps([cell.case for cell in cells])])
    try:
        while (said := child.say(limit)) is not None:
            typer.echo(said.get("note", ""))
    except TimeoutError:
        child.kill()
    how = child.end()
    if not how.startswith("exit status 0"):
        typer.echo(f"the warm-up ended early: {how}")


def short_of(result: dict[str, Any]) -> Iterator[str]:
    """A line for each cell and group that falls short of its goal."""
    lines = lines_of(result)
    for group, goal in GROUPS.items():
        ratios = {x.case: r for x in lines if x.group == group and (r := x.ratio()) is not None}
        if goal is None or not ratios:
            continue
        mean = 1.0
        for ratio in ratios.values():
            mean *= ratio ** (1 / len(ratios))
        if mean < goal[0]:
            yield f"SHORT {group}: geometric mean {mean:.2f} of {goal[0]}"
        yield from (f"SHORT {case}: {ratio:.2f} of {goal[1]}" for case, ratio in ratios.items() if ratio < goal[1])


Device = Annotated[str, typer.Option()]
Store_ = Annotated[Path, typer.Option()]
Policy = Annotated[str, typer.Option()]
Names = Annotated[str, typer.Option(help="JSON list of cells' names.")]


@app.command(hidden=True)
def child(
    who: str,
    cells: Names,
    device: Device,
    store: Store_,
    accuracy: Policy,
    first: Annotated[int | None, typer.Option()] = None,
) -> None:
    """One implementation on the cells; see peers_child."""
    from peers_child import emit, measure_cells

    with registry.use(OP, accuracy=accuracy):
        measure_cells(who, [CELLS_BY_NAME[name] for name in json.loads(cells)], device, first, store, emit)


@app.command(hidden=True)
def tune(
    cells: Names,
    device: Device,
    store: Store_,
    accuracy: Policy,
    budget: Annotated[float, typer.Option()],
    modes: Annotated[str, typer.Option()] = "both",
) -> None:
    """Warm the registry up for the cells; see peers_child."""
    from peers_child import emit, warm_up

    with registry.use(OP, accuracy=accuracy):
        warm_up([CELLS_BY_NAME[name] for name in json.loads(cells)], device, store, budget, emit, _MODES[modes])


if __name__ == "__main__":
    app()
