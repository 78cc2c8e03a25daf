"""The cells of the comparison with other libraries: 56 in four groups, and 23 that are only reported."""

from __future__ import annotations

import random
from dataclasses import dataclass

from isokern.registry.ops.fused_sigmoid_gating.case import CaseSpec
from isokern.tools.peers_table import SHORT_N

__all__ = ["CELLS", "GATES", "GROUPS", "SETS", "SMOKE", "Cell"]

#: Sets of slots that calls take turns with, so that each finds its states where serving does: in memory.
SETS = 8

#: Groups with what their best peer's time over isokern's must come to: geometric mean, and every cell.
GROUPS: dict[str, tuple[float, float] | None] = {
    "decode": (1.15, 1.0),
    "short": (2.0, 1.2),  # and verification: 4 to 256 tokens per sequence
    "mixed": (1.5, 1.2),
    "prefill": None,
    "report": None,
    "prompts": None,  # of other heads and gates, and many of unlike lengths
    "gate": None,
}


@dataclass(frozen=True, slots=True)
class Cell:
    """One call: bfloat16 q, k, v, a, b and dt_bias, L2 norm, GDN gates, states V by K, updated in place.

    Its name says where it differs: KDA gates, states K by V (``kv``), and ``verify``, which keeps the state after every
    token in a buffer and leaves the pool as it was.
    """

    group: str
    spec: CaseSpec

    @property
    def case(self) -> str:
        return self.spec.name

    @property
    def eager_counts(self) -> bool:
        """Whether its time launched from the host has a goal."""
        return self.group in ("short", "mixed") or (self.group == "decode" and self.spec.n <= SHORT_N)


#: Gates near -1, as a model's are: a state is neither gone after a token nor kept for ever.
_BASE = CaseSpec(
    "",
    (1,),
    k=128,
    v=128,
    distribution="narrow_gate",
    dt_bias_dtype="bfloat16",
    state_layout="vk",
    extra_slots=0,
    as_layout=True,
)
_HEADS = ((16, 32), (4, 8))


def _decode(n: int, h: int, hv: int, state: str = "float32", group: str = "decode", **changes: int) -> Cell:
    sizes = "".join(f" {name.upper()}={value}" for name, value in changes.items())
    name = f"decode N={n} H={h} HV={hv}{sizes} {state}"
    return Cell(group, _BASE.but(name=name, lengths=(1,) * n, h=h, hv=hv, state_dtype=state, **changes))


def _tokens(
    group: str, kind: str, profile: str, lengths: tuple[int, ...], h: int, hv: int, **changes: int | bool | str
) -> Cell:
    sizes = "".join(f" {name.upper()}={value}" for name, value in changes.items() if name in ("k", "v"))
    name = f"{kind} {profile} H={h} HV={hv}{sizes}"
    return Cell(group, _BASE.but(name=name, lengths=lengths, h=h, hv=hv, **changes))


def _kv(cell: Cell) -> Cell:
    """The same with states K by V, which most other libraries do not have; reported only."""
    return Cell("report", cell.spec.but(name=f"{cell.case} kv", state_layout="kv"))


def _verify(n: int, length: int, h: int, hv: int) -> Cell:
    """Drafts judged as serving does: the state after each token is kept, none is updated."""
    profile, changes = f"{n}x{length}", {"verify": "chain", "update": "disabled"}
    return _tokens("report", "verify", profile, (length,) * n, h, hv, **changes)


def _prompts() -> tuple[Cell, ...]:
    draw = random.Random(5)
    unlike = tuple(max(1, min(4096, int(draw.lognormvariate(5.0, 1.0)))) for _ in range(100))
    cells = [
        _tokens("prompts", "prefill", "1x2048", (2048,), 16, 48),
        _tokens("prompts", "prefill", "1x2048", (2048,), 30, 30, k=96, v=192),
        _tokens("prompts", "prefill", "100 lognormal", unlike, 16, 32),
    ]
    for n, length, heads in ((1, 512, 32), (1, 2048, 32), (1, 8192, 32), (8, 1024, 32), (1, 2048, 8)):
        cells.append(_tokens("prompts", "prefill", f"KDA {n}x{length}", (length,) * n, heads, heads, is_kda=True))
    return tuple(cells)


def _all() -> tuple[Cell, ...]:
    cells = [_decode(n, 16, 32) for n in (1, 4, 16, 64, 256)]
    cells += [_decode(n, 16, 32, "bfloat16") for n in (1, 16, 64, 256)]
    cells += [_decode(n, 4, 8) for n in (1, 4, 16, 64, 256)]
    for heads in _HEADS:
        for n, length in ((1, 4), (16, 4), (64, 4), (256, 4), (1, 16), (16, 16), (64, 16), (1, 64), (1, 128), (1, 256)):
            cells.append(_tokens("short", "mixed", f"{n}x{length}", (length,) * n, *heads))
        cells.append(_tokens("mixed", "mixed", "63x1+1x2048", (1,) * 63 + (2048,), *heads))
        cells.append(_tokens("mixed", "mixed", "48x1+16x256", (1,) * 48 + (256,) * 16, *heads))
    for heads in _HEADS:
        cells.append(_tokens("short", "prefill", "short 16x8", (8,) * 16, *heads))
        cells.append(_tokens("short", "prefill", "short 4x64", (64,) * 4, *heads))
        for n, length in ((1, 512), (1, 2048), (1, 8192), (1, 32768), (8, 1024)):
            cells.append(_tokens("prefill", "prefill", f"{n}x{length}", (length,) * n, *heads))
        cells.append(_tokens("prefill", "prefill", "skew 8192", (8192 - 31 * 64,) + (64,) * 31, *heads))
        cells.append(_tokens("short", "prefill", "64x128", (128,) * 64, *heads))
    cells += [_decode(16, 16, 48, group="report"), _decode(16, 8, 32, group="report")]
    cells += [_decode(16, 30, 30, group="report", k=96, v=192)]
    cells += [_decode(n, 16, 32, group="report") for n in (3, 24, 100)]
    cells += [_verify(n, 4, *heads) for heads in _HEADS for n in (16, 64)]
    cells += [_kv(_decode(n, 16, 32)) for n in (16, 64, 256)]
    cells += [_kv(_decode(64, 16, 32, "bfloat16")), _kv(_tokens("short", "mixed", "16x4", (4,) * 16, 16, 32))]
    return (*cells, *_prompts())


CELLS = _all()

#: Judged by the tuner's gate, not timed: conformance with the contract where it is easily missed, a slot of -1 and an
#: empty sequence among ordinary ones.
_GATE = _BASE.but(h=1, hv=2, extra_slots=3)
GATES = (
    Cell("gate", _GATE.but(name="gate decode", lengths=(1, 1, 0, 1, 1), padded=(3,))),
    Cell("gate", _GATE.but(name="gate 4 tokens", lengths=(4, 4, 0, 4), padded=(1,))),
    Cell("gate", _GATE.but(name="gate prompts", lengths=(70, 0, 130, 1), padded=(2,))),
)

#: Three that a CPU does in no time: they show that the whole of a run works.
_TINY = _BASE.but(h=1, hv=2, k=16, v=8)
SMOKE = (
    Cell("decode", _TINY.but(name="decode N=3 smoke", lengths=(1,) * 3)),
    Cell("short", _TINY.but(name="mixed 2x4 smoke", lengths=(4, 4))),
    Cell("mixed", _TINY.but(name="mixed 2x1+1x20 smoke", lengths=(1, 1, 20))),
)
