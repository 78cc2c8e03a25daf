"""Hardware counters beside other libraries: ncu's command line and CSV, its processes, the file and the table."""

import csv
import importlib.util
import io
import json
import stat
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import isokern
from isokern import registry
from isokern.registry.ops.fused_sigmoid_gating.describe import describe
from isokern.tools.counters_table import counters
from isokern.tools.tables import TABLES, filled

BENCHMARKS = Path(isokern.__file__).parent / "benchmarks"


def load(name):
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules[name]


for needed in ("record", "peers_cells", "peers_judge", "peers_child", "peers"):
    load(needed)
ncu = load("counters_ncu")
bench = load("counters")
child = load("counters_child")
ONE, TWO, THREE = load("peers_cells").SMOKE

# ---- ncu's output

_STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
COLUMNS = {
    "dram__bytes_read.sum": "Mbyte",
    "dram__bytes_write.sum": "byte",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "%",
    "gpu__time_duration.sum": "nsecond",
    "launch__block_size": "",
    "launch__grid_size": "",
    "launch__occupancy_limit_blocks": "block",
    "launch__occupancy_limit_registers": "block",
    "launch__registers_per_thread": "register/thread",
    "launch__shared_mem_per_block_dynamic": "Kibyte/block",
    "launch__shared_mem_per_block_static": "byte/block",
    "launch__waves_per_multiprocessor": "",
    "sm__pipe_tensor_op_hmma_cycles_active.avg.pct_of_peak_sustained_active": "%",
    "sm__inst_executed_pipe_tensor.avg.pct_of_peak_sustained_active": "%",
    "smsp__issue_active.avg.pct_of_peak_sustained_active": "%",
    _STALL.format("barrier"): "inst",
    _STALL.format("long_scoreboard"): "inst",
    _STALL.format("not_selected"): "inst",
    _STALL.format("selected"): "inst",
    _STALL.format("wait"): "inst",
}
STEP = ("134.218", "134,217,728", "88.51", "101,376", "128", "1,024", "32", "9", "56", "16.38", "0", "0.86", "0",
        "12.5", "35.2", "0.5", "6", "0.25", "1", "2.25")  # fmt: skip
LATER = ("n/a", "", "3.2", "2,048", "256", "16", "32", "2", "128", "0", "1,024", "0.06", "nan", "n/a", "1.5",
         "0", "3", "0", "1", "0")  # fmt: skip
SPIN = tuple("0" for _ in STEP)


def launch(name, grid, values=SPIN):
    place = list(COLUMNS).index("launch__grid_size")
    return name, grid, (*values[:place], f"{grid:,}", *values[place + 1 :])


MARK_1, MARK_2, MARK_3 = (launch(ncu.MARK, i) for i in (1, 2, 3))
DECODE = launch(
    "void (anonymous namespace)::recurrent<float, at::Pair<int>, (bool)1>(float const*, int (*)(int))", 1024, STEP
)
GATES = launch("at::native::vectorized_elementwise_kernel", 16, LATER)


def log(*launches):
    """As ``ncu --csv --page raw`` prints it, between its own words."""
    text = io.StringIO()
    text.write(
        '==PROF== Connected to process 4711 (/usr/bin/python3.12)\n==PROF== Profiling "mark" - 0: 0%....100% - 12'
    )
    text.write(" passes\n==PROF== Disconnected from process 4711\n")
    writer = csv.writer(text, quoting=csv.QUOTE_ALL, lineterminator="\n")
    head = ("ID", "Process ID", "Process Name", "Host Name", "Kernel Name", "Context", "Stream", "Block Size")
    writer.writerow((*head, "Grid Size", "Device", "CC", *COLUMNS))
    writer.writerow(("",) * 11 + tuple(COLUMNS.values()))
    for i, (name, grid, values) in enumerate(launches):
        fixed = (i, 4711, "python3.12", "127.0.0.1", name, 1, 7, "(128, 1, 1)", f"({grid}, 1, 1)", 0, "9.0")
        writer.writerow((*fixed, *values))
    return text.getvalue()


def test_kernels_are_read_with_their_units():
    mark, step, later = ncu.kernels_of(log(MARK_1, DECODE, GATES))
    assert (mark.name, mark.blocks) == (ncu.MARK, 1)
    assert step.name == "recurrent"
    assert step.values["gpu__time_duration.sum"] == pytest.approx(101.376)  # us
    assert step.values["dram__bytes_read.sum"] == pytest.approx(134.218e6)
    assert later.name == "vectorized_elementwise_kernel"
    assert "dram__bytes_read.sum" not in later.values  # n/a
    assert ncu.kernels_of("==WARNING== No kernels were profiled.\n") == []


def test_a_row_says_what_limits_a_kernel():
    row = ncu.row_of(ncu.kernels_of(log(DECODE))[0])
    assert row == {
        "kernel": "recurrent",
        "us": 101.38,
        "dram_pct": 88.51,
        "dram_read_MB": 134.218,
        "dram_write_MB": 134.218,
        "sm_pct": None,  # not among this ncu's metrics
        "issue_pct": 35.2,
        "tensor_pct": 12.5,  # the larger of two pipes' counters
        "warps_pct": None,
        "registers": 56,
        "shared_KiB": 16.4,
        "blocks": 1024,
        "threads": 128,
        "waves": 0.86,
        "limit": {"by": "registers", "blocks": 9},
        "stalls": {"long_scoreboard": 0.6, "wait": 0.225, "barrier": 0.05},
    }
    later = ncu.row_of(ncu.kernels_of(log(GATES))[0])
    assert later["tensor_pct"] is None
    assert later["stalls"] == {"long_scoreboard": 0.75}


def test_kernels_belong_to_the_cell_whose_mark_came_last():
    kernels = ncu.kernels_of(log(GATES, MARK_1, DECODE, GATES, MARK_3, DECODE))
    found, strays = ncu.by_cell(kernels, ["a", "b", "c"])
    assert {case: [k.name for k in of_it] for case, of_it in found.items()} == {
        "a": ["recurrent", "vectorized_elementwise_kernel"],
        "c": ["recurrent"],
    }
    assert strays == 1


@pytest.mark.parametrize(
    ("kernel", "short"),
    [
        ("recurrent(float *, int)", "recurrent"),
        ("void at::native::<unnamed>::spin<at::Fn<int>(int)>(long)", "spin"),
        ("kernel_cutlass_step_" + "x" * 80, ("kernel_cutlass_step_" + "x" * 80)[:60]),
        ("fused_recurrent_kernel", "fused_recurrent_kernel"),
    ],
)
def test_kernels_have_short_names(kernel, short):
    assert ncu.short_name(kernel) == short


# ---- what ncu is asked for

LISTED = """Device NVIDIA H100 80GB HBM3 (GH100)
------------------------------- --------- ------- -------------------------
Metric Name                     Metric Type Metric Unit Metric Description
------------------------------- --------- ------- -------------------------
dram__bytes_read                Counter   byte    # of bytes read from DRAM
gpu__dram_throughput            Throughput %      DRAM throughput
gpu__time_duration              Counter   ns      time
sm__pipe_tensor_cycles_active   Counter   cycle   tensor
sm__inst_executed_pipe_tensor   Counter   inst    tensor
smsp__average_warps_issue_stalled_barrier_per_issue_active Ratio inst stalls
"""


def test_only_metrics_that_this_ncu_has_are_asked_for():
    asked, unknown = ncu.known_metrics(LISTED)
    assert "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed" in asked
    assert "dram__throughput.avg.pct_of_peak_sustained_elapsed" in unknown
    assert "launch__registers_per_thread" in asked  # in no list
    assert sum("tensor" in metric for metric in asked) == 2
    assert [metric for metric in asked if "stalled" in metric] == [_STALL.format("barrier")]
    assert _STALL.format("gmma") in unknown
    assert not set(asked) & set(unknown)


def test_without_a_list_all_is_asked_for_and_what_is_refused_left_out():
    asked, unknown = ncu.known_metrics("")
    assert unknown == ()
    assert len(set(asked)) == len(asked) > 25
    found = ncu.Ncu("ncu", "2025.1", asked)
    said = f"==ERROR== Failed to find metric {_STALL.format('gmma')}\n==ERROR== Failed to find metric dram__x.sum\n"
    assert found.without(ncu.unknown_in(said))
    assert found.unknown == (_STALL.format("gmma"),)
    assert _STALL.format("gmma") not in found.metrics
    assert not found.without(ncu.unknown_in(said))
    assert ncu.unknown_in("==ERROR== ERR_NVGPUCTRPERM: no permission to read counters") == []


def test_the_command_line_profiles_the_ranges_alone_at_the_clocks_as_they_are(tmp_path):
    found = ncu.Ncu("/opt/ncu", "2025.1", ("gpu__time_duration.sum", "launch__grid_size"))
    command = found.command(tmp_path / "log", ["python", "child.py", "x"])
    assert command[0] == "/opt/ncu"
    assert command[-3:] == ["python", "child.py", "x"]
    told = dict(pairwise(command))
    assert (told["--page"], told["--print-units"], told["--cache-control"]) == ("raw", "base", "all")
    assert (told["--clock-control"], told["--profile-from-start"]) == ("none", "off")
    assert told["--metrics"] == "gpu__time_duration.sum,launch__grid_size"
    assert told["--log-file"] == str(tmp_path / "log")
    assert "--csv" in command


# ---- processes

FAKE = """#!{python}
import json, os, sys, time
words = sys.argv[1:]
if "--version" in words:
    sys.exit(print("NVIDIA (R) Nsight Compute Command Line Profiler\\nVersion 2025.1.0.0 (build 1)"))
if "--query-metrics" in words:
    sys.exit(print({listed!r}))
log, cells = words[words.index("--log-file") + 1], json.loads(words[words.index("--cells") + 1])
with open({starts!r}, "a") as file:
    file.write(json.dumps([cells, words[words.index("--metrics") + 1]]) + "\\n")
def say(said):
    os.write(1, (json.dumps(said) + "\\n").encode())  # whole lines, whoever else is writing
{body}
"""
SAY = """
def call(case):
    say({"begin": case})
    say({"call": {"case": case, "implementation": "lib", "group": "decode", "status": "ran", "backend": "b",
                  "config": "c"}})
"""


@pytest.fixture
def fake(tmp_path):
    """An ncu of a few lines of Python, and what it was started with."""
    starts = tmp_path / "starts"

    def made(body, **logs):
        path = tmp_path / "ncu"
        told = "".join(f"{name} = {text!r}\n" for name, text in logs.items())
        path.write_text(
            FAKE.format(python=sys.executable, listed=LISTED, starts=str(starts), body=f"{told}{SAY}\n{body}")
        )
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return ncu.Ncu.ask(str(path))

    made.started = lambda: [json.loads(line) for line in starts.read_text().splitlines()]
    return made


def outcome(found, cells=(ONE, TWO, THREE), limit=20.0):
    calls, rows = [], []
    for ended, read in bench.run_implementation("lib", cells, [], limit, found):
        calls += ended
        rows += read
    return [(c["case"], c["status"]) for c in calls], [(r["case"], r["kernel"]) for r in rows], calls


def test_rows_are_of_the_cells_that_were_marked(fake):
    found = fake(
        "say({'pid': os.getpid()})\nfor case in cells: call(case)\nopen(log, 'w').write(text)",
        text=log(MARK_1, DECODE, MARK_3, DECODE, GATES),
    )
    assert found.version == "2025.1.0.0"
    statuses, rows, calls = outcome(found)
    assert statuses == [(ONE.case, "ran"), (TWO.case, "no counters"), (THREE.case, "ran")]
    assert rows == [
        (ONE.case, "recurrent"),
        (THREE.case, "recurrent"),
        (THREE.case, "vectorized_elementwise_kernel"),
    ]
    assert [call["kernels"] for call in calls] == [1, 0, 2]


DIES = """
say({'pid': os.getpid()})
if len(cells) == 3:
    call(cells[0])
    say({'begin': cells[1]})
    open(log, 'w').write(first)
    print('illegal memory access', file=sys.stderr)
    os._exit(9)
call(cells[0])
open(log, 'w').write(second)
"""


def test_a_child_that_dies_costs_its_cell_and_another_goes_on(fake):
    statuses, rows, calls = outcome(fake(DIES, first=log(MARK_1, DECODE), second=log(MARK_1, GATES)))
    assert statuses == [(ONE.case, "ran"), (TWO.case, "crashed"), (THREE.case, "ran")]
    assert rows == [(ONE.case, "recurrent"), (THREE.case, "vectorized_elementwise_kernel")]
    assert "illegal memory access" in calls[1]["fault"]
    assert [cells for cells, _ in fake.started()] == [[ONE.case, TWO.case, THREE.case], [THREE.case]]


HANGS = """
target = os.fork()  # what is watched: the profiler prints when it is gone
if target == 0:
    call(cells[0])
    say({'begin': cells[1]})
    time.sleep(600)
say({'pid': target})
os.waitpid(target, 0)
open(log, 'w').write(text)
"""


def test_one_that_hangs_is_ended_and_what_was_read_is_kept(fake):
    statuses, rows, _ = outcome(fake(HANGS, text=log(MARK_1, DECODE)), (ONE, TWO), 1.0)
    assert statuses == [(ONE.case, "ran"), (TWO.case, "timeout")]
    assert rows == [(ONE.case, "recurrent")]


REFUSES = """
asked = words[words.index('--metrics') + 1].split(',')
if bad in asked:
    open(log, 'w').write('==ERROR== Failed to find metric ' + bad + '\\n')
    sys.exit(1)
call(cells[0])
open(log, 'w').write(text)
"""


def test_a_metric_that_is_refused_does_not_end_the_run(fake):
    bad = "gpu__dram_throughput.avg.pct_of_peak_sustained_elapsed"
    found = fake(REFUSES, bad=bad, text=log(MARK_1, DECODE))
    statuses, rows, _ = outcome(found, (ONE,))
    assert (statuses, rows) == ([(ONE.case, "ran")], [(ONE.case, "recurrent")])
    assert bad in found.unknown
    assert len(fake.started()) == 2


def test_one_that_cannot_even_start_is_not_started_again(fake):
    said = "==ERROR== The user does not have permission to access NVIDIA GPU Performance Counters\n"
    statuses, rows, calls = outcome(fake("open(log, 'w').write(text)\nsys.exit(1)", text=said))
    assert [status for _, status in statuses] == ["crashed"] * 3
    assert rows == []
    assert "does not have permission" in calls[0]["fault"]
    assert len(fake.started()) == 1


def test_a_run_on_a_cpu_makes_the_calls_and_the_choice(tmp_path):
    out = tmp_path / "counters.json"
    command = [sys.executable, str(BENCHMARKS / "counters.py"), "run", "--smoke", "--out", str(out)]
    command += ["--store", str(tmp_path / "store"), "--implementations", "isokern,torch_vectorized,fla_chunk"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["rows"] == []
    with pytest.raises(ValueError, match="no result of"):
        bench.put_into(out, [], MADE)  # of its own kind, not a comparison
    status = {(c["implementation"], c["case"]): c["status"] for c in result["calls"]}
    assert [status[who, ONE.case] for who in ("isokern", "torch_vectorized", "fla_chunk")] == ["ran", "ran", "declined"]
    assert len(status) == 9
    chosen = next(c for c in result["calls"] if c["implementation"] == "isokern")
    assert {"backend", "config", "rule"} <= set(chosen)


def test_a_config_may_be_named_and_one_that_is_not_offered_fails():
    said = []
    torch_vectorized = registry.backends("fused_sigmoid_gating")["torch_vectorized"]
    label = torch_vectorized.configs(describe(ONE.spec, "cpu", 0))[-1].label
    named = {ONE.case: label, TWO.case: "speed=11"}
    child.run_cells("torch_vectorized", (ONE, TWO), "cpu", None, named, said.append)
    first, second = (line["call"] for line in said if "call" in line)
    assert second["status"] == "failed"
    assert "speed=11: not among the configs" in second["fault"]
    assert (first["status"], first["config"]) == ("ran", label)
    assert said[0].keys() == {"pid"}


def test_nothing_but_the_mark_and_the_call_is_profiled(monkeypatch):
    done = []
    mark = SimpleNamespace(mark=lambda number, count: done.append(f"mark {number}"))
    monkeypatch.setitem(sys.modules, "counters_mark", mark)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    monkeypatch.setattr(torch.cuda.profiler, "start", lambda: done.append("start"))
    monkeypatch.setattr(torch.cuda.profiler, "stop", lambda: done.append("stop"))
    monkeypatch.setattr(child.torch, "zeros", lambda *_, **__: None)
    child._profiled(lambda: done.append("call"), 3)
    assert done == ["mark 3", "wait", "start", "mark 3", "call", "wait", "stop"]


# ---- the file and the table


def row(case, who, kernel="recurrent", group="decode", **more):
    counted = ncu.row_of(ncu.kernels_of(log(DECODE))[0])
    return {"case": case, "implementation": who, "group": group} | counted | {"kernel": kernel} | more


MADE = {"date": "2026-01-03", "gpu": "H100", "ncu": "2025.1", "command": "c", "commit": "x"}


@pytest.fixture
def peers_file(tmp_path):
    plain = {"backend": None, "config": "a=1", "graph_us": 1.0, "eager_us": 2.0, "floor_us": 1.0, "error": 0.0}
    rows = [
        {"case": case, "implementation": "lib", **plain, "extra": {"group": group}}
        for case, group in (("decode N=1 x", "decode"), ("prefill 1x8 x", "prefill"))
    ]
    path = tmp_path / "2026-01-02_h100_peers.json"
    path.write_text(json.dumps({"meta": {"peers": ["lib"]}, "rows": rows}))
    return path


def test_rows_replace_those_of_the_same_case_and_implementation(peers_file):
    old = [row("decode N=1 x", "lib", "gates"), row("decode N=1 x", "lib"), row("decode N=1 x", "isokern")]
    bench.put_into(peers_file, old, MADE)
    bench.put_into(peers_file, [row("decode N=1 x", "lib", "new")], MADE)
    meta = json.loads(peers_file.read_text())["meta"]
    assert [(r["implementation"], r["kernel"]) for r in meta["counters"]] == [("isokern", "recurrent"), ("lib", "new")]
    assert meta["counters_made"] == [MADE]
    assert bench.configs_of(peers_file) == {"lib": {"decode N=1 x": "a=1", "prefill 1x8 x": "a=1"}}
    other = peers_file.parent / "other.json"
    other.write_text(json.dumps({"meta": {}, "rows": []}))
    with pytest.raises(ValueError, match=r"no result of benchmarks/peers.py"):
        bench.put_into(other, [], MADE)


def test_documents_show_the_counters_of_the_newest_comparison(peers_file):
    assert counters(peers_file.parent) == "Not measured yet.\n"
    rows = [
        row("prefill 1x8 x", "lib", group="prefill"),
        row("decode N=1 x", "lib", us=None, stalls={}),
        row("decode N=1 x", "isokern", us=2.456),
    ]
    bench.put_into(peers_file, rows, MADE)
    lines = counters(peers_file.parent, ("decode", "short")).splitlines()
    assert lines[0] == (
        "| case | implementation | kernel | us | memory % | issue % | tensor % | warps % | waves | warps wait for |"
    )
    assert lines[2:4] == [
        "| decode N=1 x | `isokern` | `recurrent` | 2.46 | 89 | 35 | 12 |  | 0.86 | long scoreboard 60 %, wait 22 % |",
        "| decode N=1 x | `lib` | `recurrent` |  | 89 | 35 | 12 |  | 0.86 |  |",
    ]
    assert lines[-1] == "Counters of 2026-01-03 on H100, Nsight Compute 2025.1; `c`."
    assert len(lines) == 6
    assert "prefill 1x8 x" in counters(peers_file.parent, ("prefill",))
    assert counters(peers_file.parent, ("mixed",)) == "Not measured yet.\n"


def test_the_tables_have_names_that_documents_may_use_or_not():
    assert {"peers_counters_decode", "peers_counters_prefill"} <= set(TABLES)
    text = "<!-- table: peers_counters_decode -->\nold\n<!-- end -->\n"
    assert filled(text).startswith("<!-- table: peers_counters_decode -->\n")
    assert "old" not in filled(text)
