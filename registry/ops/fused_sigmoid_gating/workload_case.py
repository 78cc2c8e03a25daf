"""A case: one kind of batch a server runs this op on, free of model, device and framework.

Together with a model's shard a case determines concrete inputs; making them is another module's job. Most
cases are fully described by a conventional name:

    decode N=64                 verify 16x4              prefill 1x1024           mixed 63x1+1x2048
    decode N=64 bfloat16        verify tree 4x8          prefill short 16x8       prefill skew 8192

A trailing dtype is that of the state; `prefill short` has prompts of at most 64 tokens.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from ....errors import ArgumentValueError, near_matches
from ...accuracy import ACCURACIES, Accuracy
from .lengths import LengthLayout, parse_lengths

__all__ = [
    "STATE_DTYPES",
    "STATE_LAYOUTS",
    "Case",
    "Phase",
    "Policy",
    "Tier",
    "Verify",
    "case_name",
    "parse_case",
]

STATE_DTYPES = ("float32", "bfloat16", "float16")
STATE_LAYOUTS = ("kv", "vk")

_SHORT_PROMPT = 64  # tokens; one chunk of the chunkwise form


class Phase(StrEnum):
    """What the server is doing."""

    DECODE = "decode"  # one token per sequence
    VERIFY = "verify"  # a few drafted tokens per sequence, judged in one call
    PREFILL = "prefill"  # prompts, alone or packed
    MIXED = "mixed"  # decode rows beside prompts


class Verify(StrEnum):
    """How drafted tokens hang together."""

    NONE = "none"
    CHAIN = "chain"  # each follows the one before; the state after every token is kept
    TREE = "tree"  # each follows its parent token; the state after every token is kept


class Policy(StrEnum):
    """How a call is launched, and so what its cost includes."""

    EAGER = "eager"  # host cost included
    GRAPH = "graph"  # replayed from a captured graph


class Tier(StrEnum):
    """How much of a workload to run; each tier includes the ones before it."""

    SMOKE = "smoke"  # a few tiny cases: seconds
    CORE = "core"  # spans every phase: minutes on two CPU cores
    WIDE = "wide"  # with these no batch of traffic is far from all that is tuned: minutes on a GPU
    FULL = "full"  # up to 256 decode rows and 8192 tokens


@dataclass(frozen=True, slots=True)
class Case:
    """One case of a serving workload.

    Attributes:
        name: unique in its workload; one printable line.
        phase: what the server is doing.
        lengths: tokens of each packed sequence.
        state_dtype: overrides the model's; None keeps it.
        verify: how drafted tokens hang together; ``NONE`` exactly when the phase is not ``VERIFY``.
        draft_tokens: most tokens of one sequence in verification (the intermediate-state buffer's steps), else 0.
        policy: how to launch and time it; None leaves that to the device's default.
        state_layout: overrides the model's; None keeps it.
        tier: the smallest tier that includes it.
        accuracy: the policy to tune it under (see ``registry.accuracy``); None leaves that to the warm-up.

    Raises:
        ArgumentValueError: the fields contradict each other; ``argument`` names the one to look at.
    """

    name: str
    phase: Phase
    lengths: LengthLayout
    state_dtype: str | None = None
    verify: Verify = Verify.NONE
    draft_tokens: int = 0
    policy: Policy | None = None
    state_layout: str | None = None
    tier: Tier = Tier.FULL
    accuracy: Accuracy | None = None

    def __post_init__(self) -> None:
        if not self.name or not self.name.isprintable() or self.name != self.name.strip():
            raise ArgumentValueError("name", "one printable line without surrounding spaces", repr(self.name))
        for key, value, allowed in (
            ("state_dtype", self.state_dtype, STATE_DTYPES),
            ("state_layout", self.state_layout, STATE_LAYOUTS),
            ("accuracy", self.accuracy, ACCURACIES),
        ):
            if value is not None and value not in allowed:
                raise ArgumentValueError(key, f"one of {', '.join(allowed)}", repr(value))
        if self.phase is Phase.DECODE and self.lengths.longest > 1:
            raise ArgumentValueError("lengths", "at most one token per sequence in decode", str(self.lengths))
        if self.phase is not Phase.VERIFY:
            if self.verify is not Verify.NONE or self.draft_tokens:
                given = f"{self.phase} with verify={self.verify}, draft_tokens={self.draft_tokens}"
                raise ArgumentValueError("verify", "none, and no draft_tokens, outside phase verify", given)
            return
        if self.verify is Verify.NONE:
            raise ArgumentValueError("verify", "chain or tree in phase verify", "none")
        longest = self.lengths.longest
        if self.draft_tokens < max(1, longest):
            expected = f"at least one, and the longest sequence's {longest}"
            raise ArgumentValueError("draft_tokens", expected, str(self.draft_tokens))


def case_name(phase: Phase, lengths: LengthLayout, verify: Verify = Verify.NONE, dtype: str | None = None) -> str:
    """The conventional name; :func:`parse_case` reads it back (decode rows must hold one token each)."""
    every = lengths.lengths()
    if phase is Phase.DECODE and set(every) <= {1}:
        words = ["decode", f"N={len(every)}"]
    else:
        short = phase is Phase.PREFILL and max(every, default=0) <= _SHORT_PROMPT
        mark = "tree" if verify is Verify.TREE else "short" if short else ""
        words = [phase, mark, str(lengths)]
    return " ".join(word for word in (*words, dtype or "") if word)


def parse_case(name: str, tier: Tier = Tier.FULL) -> Case:
    """The case a conventional name describes.

    Raises:
        ArgumentValueError: not a conventional name; the hint says what comes near.
    """
    word, *rest = name.split() or [""]
    if word not in list(Phase):
        near = near_matches(word, (str(known) for known in Phase))
        hint = f"did you mean {near[0]!r}?" if near else ""
        raise ArgumentValueError("name", f"a name that starts with one of {', '.join(Phase)}", repr(name), hint)
    phase = Phase(word)
    dtype = rest.pop() if rest and rest[-1] in STATE_DTYPES else None
    if phase is Phase.DECODE:
        return Case(name, phase, _decode_rows(rest, name), dtype, tier=tier)
    mark = rest.pop(0) if rest and rest[0] in ("tree", "short") else ""
    lengths = parse_lengths(" ".join(rest))
    if phase is not Phase.VERIFY:
        if mark != ("short" if phase is Phase.PREFILL and lengths.longest <= _SHORT_PROMPT else ""):
            expected = repr(case_name(phase, lengths, dtype=dtype))
            raise ArgumentValueError("name", expected, repr(name), f"short: at most {_SHORT_PROMPT} tokens each")
        return Case(name, phase, lengths, dtype, tier=tier)
    verify = Verify.TREE if mark == "tree" else Verify.CHAIN
    return Case(name, phase, lengths, dtype, verify, lengths.longest, tier=tier)


def _decode_rows(rest: Sequence[str], name: str) -> LengthLayout:
    rows = re.fullmatch(r"N=(\d+)", " ".join(rest))
    if rows is None:
        raise ArgumentValueError("name", "'decode N=<rows>'", repr(name))
    return LengthLayout.decode(int(rows[1]))
