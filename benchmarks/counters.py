"""Hardware counters of what the registry chose, beside other libraries' kernels, on cells of the comparison.

    python benchmarks/counters.py run --out FILE [--cells REGEX] [--implementations isokern,flashinfer_decode]
        [--store DIR] [--accuracy rounded] [--peers PEERS.json] [--into PEERS.json]
    python benchmarks/counters.py run --smoke --out FILE     # tiny cells on the CPU without ncu: calls and choice work

Each implementation runs in a process of its own under Nsight Compute (``ncu``, which must be installed), a call per
cell; see counters_child for what of it is profiled and counters_ncu for how. A process that dies or hangs costs the
cell it was at; the file is written after each process. ``rows`` has a row per kernel of a call, in launch order, and
``calls`` what became of every call. With --into the rows go into a result of benchmarks/peers.py as well (its
``meta.counters``), which tools/counters_table.py makes tables of.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer
from counters_ncu import Ncu, by_cell, complaints, kernels_of, row_of, unknown_in
from peers import (
    CELLS_BY_NAME,
    OP,
    OWN,
    ROOT,
    START_S,
    Child,
    Device,
    Names,
    Policy,
    Store_,
    chosen_cells,
    chosen_implementations,
    information,
)
from peers_cells import GROUPS, Cell

from isokern import registry
from isokern.registry.accuracy import ACCURACIES, DEFAULT
from isokern.tools.gpu_test import machine as machines

#: Where CUDA puts it, if the path does not say.
_NCU = "/usr/local/cuda/bin/ncu"
#: Most starts that only find out which metrics this ncu does not know.
_REFUSALS = 8

app = typer.Typer(add_completion=False)
Row = dict[str, Any]


# ---- processes


class Profiled(Child):
    """A child of this file under ncu, in a session of its own: whatever it started ends with it.

    Attributes:
        pid: of the process that ncu watches, once it has said it.
    """

    patience: ClassVar[float] = 60.0  # ncu prints everything at the end

    def __init__(self, words: Sequence[str], ncu: Ncu | None, log: Path) -> None:
        self._ncu, self._log = ncu, log
        self.pid: int | None = None
        super().__init__(words)

    def _started(self, words: Sequence[str]) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, *words]
        if self._ncu is not None:
            command = self._ncu.command(self._log, command)
        pipe, errors = subprocess.PIPE, self._errors
        return subprocess.Popen(command, stdout=pipe, stderr=errors, text=True, start_new_session=True)

    def kill(self) -> None:
        """End what ncu watches, so that ncu prints what it has; all of it if that is not known."""
        if self.pid is None:
            self.kill_all()
            return
        try:
            os.kill(self.pid, signal.SIGKILL)
        except ProcessLookupError:
            return

    def end(self) -> str:
        """Make sure that nothing of it is left; how it ended, and its last words."""
        how = super().end()
        self.kill_all()
        return how

    def kill_all(self) -> None:
        """End everything that it started, now."""
        try:
            os.killpg(self._process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # all of them have ended


def run_implementation(
    who: str, cells: Sequence[Cell], options: Sequence[str], limit: float, ncu: Ncu | None
) -> Iterator[tuple[list[Row], list[Row]]]:
    """What became of the calls and the rows of their kernels, after each process; a new one goes on where one ended."""
    left, refusals = list(cells), 0
    while left:
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch, "ncu.csv")
            calls, how, beside = _one_process(who, left, options, limit, ncu, log)
            said = (log.read_text(errors="replace") if log.exists() else "") + "\n" + beside
        cases = [cell.case for cell in left]
        found, strays = by_cell(kernels_of(said), cases)
        refused = ncu is not None and not found and refusals < _REFUSALS and ncu.without(unknown_in(said))
        if refused:
            refusals += 1
            continue  # it started nothing: ask for less
        if not calls:  # one that ends before its first cell would do so again
            calls = [_lost(who, cell, "crashed", complaints(said) or how) for cell in left]
        rows = []
        for call in calls:
            kernels = found.get(call["case"], [])
            call["kernels"] = len(kernels)
            if ncu is not None and call["status"] == "ran" and not kernels:
                call |= {"status": "no counters", "fault": complaints(said) or how}
            if strays:
                call["strays"] = strays
            here = {name: call.get(name) for name in ("case", "implementation", "group", "backend", "config")}
            rows += [here | row_of(kernel) for kernel in kernels]
        done = {call["case"] for call in calls}
        left = [cell for cell in left if cell.case not in done]
        yield calls, rows


def _one_process(
    who: str, cells: Sequence[Cell], options: Sequence[str], limit: float, ncu: Ncu | None, log: Path
) -> tuple[list[Row], str, str]:
    """The calls that a process came to, the one that it was lost at included; how it ended; ncu's words on stdout."""
    child = Profiled(["child", who, *options, "--cells", json.dumps([cell.case for cell in cells])], ncu, log)
    calls: list[Row] = []
    current: Cell | None = None
    status = "crashed"
    try:
        while (said := child.say(START_S if current is None else limit)) is not None:
            if "pid" in said:
                child.pid = int(said["pid"])
            elif "begin" in said:
                current = CELLS_BY_NAME[said["begin"]]
            elif "call" in said:
                calls.append(said["call"])
                current = None
    except TimeoutError:
        status = "timeout"
        child.kill()
    except KeyboardInterrupt:
        child.kill_all()  # being of another session, it has not heard of it
        raise
    how = child.end()
    if current is not None:
        calls.append(_lost(who, current, status, how))
    return calls, how, "".join(line for line in child.chatter if line.startswith("=="))


def _lost(who: str, cell: Cell, status: str, how: str) -> Row:
    return {"case": cell.case, "implementation": who, "group": cell.group, "status": status, "fault": how}


# ---- files


def merged(old: Sequence[Row], rows: Sequence[Row]) -> list[Row]:
    """``old`` with the rows of the same case and implementation replaced."""
    anew = {(row["case"], row["implementation"]) for row in rows}
    return [*(row for row in old if (row["case"], row["implementation"]) not in anew), *rows]


def put_into(peers: Path, rows: Sequence[Row], made: Mapping[str, Any]) -> None:
    """The rows into ``meta.counters`` of a comparison, and into ``meta.counters_made`` how they were made.

    Raises ValueError if ``peers`` is no result of the comparison.
    """
    result = _comparison(peers)
    meta = result["meta"]
    meta["counters"] = merged(meta.get("counters", []), rows)
    meta["counters_made"] = [*(one for one in meta.get("counters_made", []) if one != made), dict(made)]
    _write(peers, result)


def _comparison(path: Path) -> dict[str, Any]:
    result = json.loads(path.read_text())
    if not isinstance(result, dict) or "peers" not in result.get("meta", {}):
        raise ValueError(f"{path} is no result of benchmarks/peers.py")
    return result


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as draft:
        draft.write(json.dumps(content, indent=1) + "\n")
    os.replace(draft.name, path)


def configs_of(peers: Path) -> dict[str, dict[str, str]]:
    """Implementation to case to the config that the comparison in ``peers`` found fastest."""
    found: dict[str, dict[str, str]] = {}
    for row in _comparison(peers)["rows"]:
        if row["config"] is not None and row["extra"].get("group") != "gate":
            found.setdefault(row["implementation"], {})[row["case"]] = row["config"]
    return found


def _made_by(meta: Mapping[str, Any]) -> dict[str, Any]:
    return {name: meta[name] for name in ("date", "gpu", "ncu", "command", "commit")}


# ---- commands


@app.command()
def run(
    out: Annotated[Path, typer.Option(help="File of the rows.")],
    cells: Annotated[str | None, typer.Option(help="Regular expression on the cells' names.")] = None,
    groups: Annotated[str | None, typer.Option(help=f"Of {', '.join(GROUPS)}; default: all.")] = None,
    implementations: Annotated[str, typer.Option(help="By name, separated by commas.")] = OWN,
    store: Annotated[Path | None, typer.Option(help="Tuned choices; default: build/peers-store here.")] = None,
    accuracy: Annotated[
        str, typer.Option(help=f"Policy of isokern's own choice: {' or '.join(ACCURACIES)}.")
    ] = DEFAULT,
    time_limit: Annotated[float, typer.Option(help="Seconds that one cell of one implementation may take.")] = 90.0,
    peers: Annotated[
        Path | None, typer.Option(help="Comparison that names the config of each implementation and cell.")
    ] = None,
    into: Annotated[Path | None, typer.Option(help="Comparison whose meta.counters takes the rows, too.")] = None,
    ncu: Annotated[str | None, typer.Option(help="Nsight Compute; default: as the path says.")] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Three tiny cells on the CPU, without counters.")] = False,
) -> None:
    """Read the counters. Exit status: 0 done, 1 a call went wrong, 2 no GPU, no ncu or a wrong command line."""
    if accuracy not in ACCURACIES:
        raise typer.BadParameter(f"{accuracy}: expected any of {', '.join(ACCURACIES)}", param_hint="--accuracy")
    chosen = [cell for cell in chosen_cells(groups, smoke, cells) if cell.group != "gate"]
    try:
        named = {} if peers is None else configs_of(peers)
        if into is not None:
            _comparison(into)
    except (OSError, ValueError) as error:
        raise typer.BadParameter(str(error), param_hint="--peers, --into") from error
    machine = None if smoke else machines.find()
    if machine is None and not smoke:
        typer.echo("no CUDA device", err=True)
        raise typer.Exit(2)
    device = "cpu" if machine is None else "cuda"
    who = chosen_implementations(implementations, chosen, device, 0 if machine is None else machine.arch)
    profiler = None if smoke else _profiler(ncu)
    meta = information(device)
    meta["command"] = " ".join(["python benchmarks/counters.py", *sys.argv[1:]])
    del meta["peers"]  # by which a comparison is known
    kept = ROOT / "build" / "peers-store" if store is None else store
    options = ["--device", device, "--store", str(kept), "--accuracy", accuracy]
    calls: list[Row] = []
    rows: list[Row] = []
    for name in who:
        more = ["--named", json.dumps(named[name])] if name in named and name != OWN else []
        for ended, read in run_implementation(name, chosen, [*options, *more], time_limit, profiler):
            calls += ended
            rows += read
            if profiler is not None:
                meta |= {"ncu": profiler.version, "metrics": profiler.metrics, "unknown_metrics": profiler.unknown}
            _write(out, {"meta": meta, "calls": calls, "rows": rows})
            if into is not None and read:
                put_into(into, read, _made_by(meta))
            for call in ended:
                _tell(call, [row for row in read if row["case"] == call["case"]])
    if any(call["status"] not in ("ran", "declined") for call in calls):
        raise typer.Exit(1)


def _profiler(named: str | None) -> Ncu:
    """Raises typer.Exit (2) where there is none."""
    path = named or shutil.which("ncu") or _NCU
    try:
        found = Ncu.ask(path)
    except OSError as error:
        typer.echo(f"no Nsight Compute: {path}: {error}", err=True)
        raise typer.Exit(2) from error
    typer.echo(f"ncu {found.version}: {len(found.metrics)} metrics; not known to it: {', '.join(found.unknown) or '-'}")
    return found


def _tell(call: Row, rows: Sequence[Row]) -> None:
    fault = f"  ({call['fault'][:300]})" if "fault" in call else ""
    what = f"{call.get('backend', '')} [{call.get('config', '')}]"
    typer.echo(f"{call['implementation']:>18} {call['case']:<34} {call['status']}: {what}{fault}")
    for row in rows:
        stalls = ", ".join(f"{reason} {share:.0%}" for reason, share in row["stalls"].items())
        typer.echo(
            f"    {row['kernel']:<40} {row['us']} us, memory {row['dram_pct']} %, issue {row['issue_pct']} %,"
            f" tensor {row['tensor_pct']} %, warps {row['warps_pct']} %, waves {row['waves']}; {stalls}"
        )


@app.command(hidden=True)
def child(
    who: str,
    cells: Names,
    device: Device,
    store: Store_,
    accuracy: Policy,
    named: Annotated[str, typer.Option(help="JSON: case to a config's label.")] = "{}",
) -> None:
    """One implementation's call on the cells; see counters_child."""
    from counters_child import run_cells
    from peers_child import emit

    with registry.use(OP, accuracy=accuracy):
        run_cells(who, [CELLS_BY_NAME[name] for name in json.loads(cells)], device, store, json.loads(named), emit)


if __name__ == "__main__":
    app()
