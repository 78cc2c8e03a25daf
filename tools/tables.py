"""Fill the generated tables of README and docs: `<!-- table: NAME -->` ... `<!-- end -->`.

python tools/tables.py [--check]        (--check writes nothing and fails if a table is out of date)
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from isokern.registry.ops.fused_sigmoid_gating.problem import Problem
from isokern.tools.counters_table import counters
from isokern.tools.external_table import external
from isokern.tools.gpu_tables import recurrent
from isokern.tools.host_tables import host_cost
from isokern.tools.peers_table import peers, peers_summary
from isokern.tools.results import newest

ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
DECLINED = "no"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def source(meta: dict[str, Any]) -> str:
    """Where a table's numbers come from, in one line."""
    versions = ", ".join(f"{k} {v}" for k, v in meta["versions"].items() if k in ("torch", "numba", "transformers"))
    where = meta["gpu"] or f"{meta['cpu']}, {meta['threads']} threads"
    return f"\nMeasured {meta['date']} on {where}; {versions}; `{meta['command']}`.\n"


def support() -> str:
    """Backend x feature, from the predicates: asked of a GPU where that is what a backend is for, else of the CPU."""
    from isokern import registry
    from isokern.engines import ENGINES
    from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
    from isokern.registry.ops.fused_sigmoid_gating.describe import describe

    base = CaseSpec("base", (3, 9))
    features = {
        "packed lengths (`cu_seqlens`)": base,
        "equal lengths": base.but(varlen=False, lengths=(4, 4)),
        "KDA gates, lower bound": base.but(is_kda=True, lower_bound=-5.0),
        "negative eigenvalues": base.but(neg_eigval=True),
        "float16, float32 inputs": base.but(io_dtype="float16"),
        "bfloat16, float16 pools": base.but(state_dtype="bfloat16"),
        "`vk` state layout": base.but(state_layout="vk"),
        "separate read and write slots": base.but(update="separate"),
        "state update disabled": base.but(update="disabled"),
        "verification, chain": base.but(verify="chain"),
        "verification, token tree": base.but(verify="tree"),
        "strided inputs and pools": base.but(strides="any"),
        "HV/H of 3, K = 96, V = 192": base.but(h=2, hv=6, k=96, v=192),
        "int64 offsets and slots": base.but(index_dtype="int64", cu_dtype="int64"),
    }
    backends = registry.backends("fused_sigmoid_gating")
    own = [name for name, backend in backends.items() if backend.provenance != "external"]
    names = sorted(own, key=lambda n: -backends[n].priority)
    on_cpu = partial(describe, device="cpu")

    def on_gpu(spec: CaseSpec) -> Problem:
        """As a SequenceLayout: bare offsets on a GPU are not known to the host, and some backends need them to be."""
        return describe(spec.but(as_layout=spec.varlen), "cuda", 90)

    def runs(name: str, problem: Problem) -> bool:
        """Its own word: what is installed on the machine that makes the table is no matter."""
        return bool(backends[name].check(problem))

    rows = []
    for feature, spec in features.items():
        answers = (runs(n, (on_gpu if n in ENGINES else on_cpu)(spec)) for n in names)
        rows.append([feature, *("yes" if yes else DECLINED for yes in answers)])
    header = [""]
    for n in names:
        places = {"CPU": runs(n, on_cpu(base)), "GPU": runs(n, on_gpu(base))}
        header.append(f"`{n}` ({', '.join(place for place, yes in places.items() if yes)})")
    return markdown(header, rows)


def cpu() -> str:
    """Case x implementation, microseconds, from the newest CPU result."""
    result, _ = newest("cpu")
    rows = [r for r in result["rows"] if r["floor_us"] is not None]
    names = list(dict.fromkeys(r["implementation"] for r in rows))
    names.sort(key=lambda n: (n != "isokern", n.startswith("transformers"), n))
    cases = list(dict.fromkeys(r["case"] for r in rows))
    cell = {(r["case"], r["implementation"]): r for r in rows}
    short = {n: n.replace("transformers torch_", "transformers ").replace("_gated_delta_rule", "") for n in names}
    lines = []
    for case in cases:
        line = [case, f"{cell[case, 'isokern']['floor_us'] / 1e3:.2f}"]
        for n in names:
            r = cell.get((case, n))
            text = "" if r is None else f"{r['eager_us'] / 1e3:.2f}"
            line.append(f"{text} ({r['backend']})" if r is not None and n == "isokern" else text)
        lines.append(line)
    header = ["ms per call, H, HV as named, K = V = 128", "floor", *(short[n] for n in names)]
    return markdown(header, lines) + source(result["meta"])


def varlen() -> str:
    """Packed against padded, from the newest CPU result."""
    result, _ = newest("cpu")
    rows = [r for r in result["rows"] if r["case"].endswith((" packed", " padded"))]
    lines = [
        [
            r["case"].removeprefix("packed "),
            r["backend"],
            str(r["extra"]["tokens"]),
            f"{r['eager_us'] / 1e3:.2f}",
            f"{r['extra']['token_bytes'] / 2**20:.1f}",
        ]
        for r in rows
    ]
    header = ["batch (H = 16, HV = 32, K = V = 128)", "backend", "tokens", "ms per call", "MiB of token tensors"]
    return markdown(header, lines) + source(result["meta"])


TABLES: dict[str, Callable[[], str]] = {
    "support": support,
    "cpu": cpu,
    "varlen": varlen,
    "recurrent": recurrent,
    "host_cost": host_cost,
    "external": external,
    "peers": peers,
    "peers_summary": peers_summary,
    "peers_decode": partial(peers, groups=("decode", "short", "mixed", "report")),
    "peers_prefill": partial(peers, groups=("prefill", "gate")),
    "peers_prompts": partial(peers, groups=("prompts",)),
    "peers_counters_decode": partial(counters, groups=("decode", "short", "mixed", "report")),
    "peers_counters_prefill": partial(counters, groups=("prefill", "prompts")),
}


def documents() -> list[Path]:
    """Every document that may hold a table."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def filled(text: str) -> str:
    """``text`` with every table made anew."""
    return BLOCK.sub(lambda m: m[1] + TABLES[m[2]]() + m[3], text)


def main() -> int:
    stale = [d for d in documents() if filled(d.read_text()) != d.read_text()]
    for document in stale:
        print(f"{'out of date' if '--check' in sys.argv else 'updated'}: {document.relative_to(ROOT)}")
        if "--check" not in sys.argv:
            document.write_text(filled(document.read_text()))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    raise SystemExit(main())
