"""The table of host costs, from a results file."""

import importlib.util
import json
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "tools" / "host_tables.py"


def host_cost(results):
    spec = importlib.util.spec_from_file_location("host_tables", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.host_cost(results)


def row(case, implementation, us, backend=None, part=False):
    return {"case": case, "implementation": implementation, "backend": backend, "eager_us": us, "extra": {"part": part}}


def test_the_newest_results_make_the_table(tmp_path):
    meta = {"date": "2030-01-02", "gpu": "a GPU", "cpu": "a CPU", "versions": {"torch": "9"}, "command": "python x"}
    old = {"meta": meta, "rows": [row("decode N=1 float32", "isokern op", 99.0, "triton")]}
    rows = [
        row("decode N=1 float32", "isokern op", 11.26, "triton"),
        row("decode N=4 float32", "isokern op", 12.0, "triton"),
        row("decode N=4 float32", "sgl_triton", 72.0),
        row("decode N=4 float32", "torch.empty_like", 2.5, part=True),
    ]
    (tmp_path / "2030-01-01_h100_host_cost.json").write_text(json.dumps(old))
    (tmp_path / "2030-01-02_h100_host_cost.json").write_text(json.dumps({"meta": meta, "rows": rows}))
    lines = host_cost(tmp_path).splitlines()
    assert lines[0] == "| whole calls, host us | backend | decode N=1 | decode N=4 |"
    assert lines[2:4] == ["| isokern op | `triton` | 11.3 | 12.0 |", "| sgl_triton |  |  | 72.0 |"]
    assert "| torch.empty_like |  | 2.5 |" in lines
    assert lines[-1] == "Measured 2030-01-02 on a GPU, a CPU; torch 9; `python x`."


def test_without_results_the_table_says_so(tmp_path):
    assert host_cost(tmp_path) == "Not measured yet.\n"
