"""Packed sequence lengths for tests, tuning and benchmarks: a small record that expands to lengths.

A :class:`LengthLayout` says how many sequences share how many tokens, and how. It has a one-line text form,
used in case names and workload files, that reads back to the same record:

    16x4                                            16 sequences of 4 tokens
    63x1+1x2048                                     63 sequences of 1 token, then one of 2048
    skew 8192                                       one of 6208 and 31 of 64
    lognormal n=8 tokens=8192 sigma=0.99 seed=3     drawn, then scaled to hold exactly 8192 tokens
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from ....errors import ArgumentValueError, near_matches
from ...varlen.classes import LengthClass, class_of_lengths

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "CODE_TRACE",
    "CONVERSATION_TRACE",
    "MOST_SEQUENCES",
    "LengthKind",
    "LengthLayout",
    "PromptTrace",
    "parse_lengths",
]

_SKEW_N = 32
# The long sequence's share of a skewed batch, about 0.76, as the fraction that gives 6208 of 8192.
_SKEW_NUM, _SKEW_DEN = 97, 128
_FEW_LONG_DIVISOR = 4  # one sequence in four is long: 48x1+16x256 is such a batch
_WEIGHT_BITS = 24  # random weights become integers, so that shares are exact whatever the platform's floats do

_GROUPS = re.compile(r"\d+x\d+(?:\+\d+x\d+)*")
_SKEW = re.compile(r"skew (\d+)")
_EXPECTED = "lengths such as '16x4', '63x1+1x2048', 'skew 8192' or 'lognormal n=8 tokens=8192 sigma=0.99 seed=3'"


class LengthKind(StrEnum):
    """How a layout spreads its tokens. Given a token for each, only ``with_empty`` leaves sequences empty."""

    GROUPS = "groups"  # spelled out: runs of equal lengths
    DECODE = "decode"  # one token each
    UNIFORM = "uniform"  # equal, the remainder on the first ones
    RAGGED = "ragged"  # uniformly random between half and one and a half times the mean
    LOGNORMAL = "lognormal"  # drawn with parameter sigma: what prompts look like
    ONE_LONG = "one_long"  # one holds all but one token of each other, at a random place
    FEW_LONG = "few_long"  # a quarter of them share what one token of each other leaves, at random places
    WITH_EMPTY = "with_empty"  # ragged, the first, the middle and the last empty
    SKEW = "skew"  # the first holds about 0.76 of the tokens, the rest are equal


@dataclass(frozen=True, slots=True)
class PromptTrace:
    """Prompt lengths of a public production trace: the lognormal fitted to them (natural log of tokens)."""

    name: str
    mu: float
    sigma: float

    @property
    def mean(self) -> float:
        """Mean prompt length, tokens."""
        return math.exp(self.mu + self.sigma**2 / 2)


CONVERSATION_TRACE = PromptTrace("conversation", mu=6.63, sigma=0.99)
CODE_TRACE = PromptTrace("code", mu=7.0, sigma=1.36)


#: Sequences of a batch that a workload may name.
MOST_SEQUENCES = 1 << 22


@dataclass(frozen=True, slots=True)
class LengthLayout:
    """``n`` sequences holding exactly ``tokens`` tokens together.

    Attributes:
        kind: how the tokens are spread.
        n: number of sequences.
        tokens: total number of tokens.
        seed: of the random kinds; a layout is a pure function of its fields.
        sigma: spread of ``lognormal``, None for the other kinds.
        groups: runs ``(count, length)`` of ``groups``, in order; empty for the other kinds.

    Raises:
        ArgumentValueError: a count is negative, or beyond :data:`MOST_SEQUENCES`, or the kind cannot spread ``tokens``
            over ``n``.
    """

    kind: LengthKind
    n: int
    tokens: int
    seed: int = 0
    sigma: float | None = None
    groups: tuple[tuple[int, int], ...] = ()

    def __post_init__(self) -> None:
        for name, value in (("n", self.n), ("tokens", self.tokens), ("seed", self.seed)):
            if value < 0:
                raise ArgumentValueError(name, "a count of zero or more", str(value))
        if self.n > MOST_SEQUENCES:  # their lengths are spelled out one by one
            raise ArgumentValueError("n", f"at most {MOST_SEQUENCES} sequences", str(self.n))
        if self.n == 0 and self.tokens:
            raise ArgumentValueError("tokens", "0 where there is no sequence", str(self.tokens))
        if self.kind is LengthKind.LOGNORMAL:
            if self.sigma is None or not 0 < self.sigma < math.inf:
                raise ArgumentValueError("sigma", "a positive finite number for lognormal", str(self.sigma))
        elif self.sigma is not None:
            raise ArgumentValueError("sigma", f"none for {self.kind}", str(self.sigma))
        if self.kind is LengthKind.DECODE and self.tokens != self.n:
            raise ArgumentValueError("tokens", f"n={self.n}, one per decode row", str(self.tokens))
        if self.kind in (LengthKind.ONE_LONG, LengthKind.FEW_LONG) and self.tokens < self.n:
            raise ArgumentValueError("tokens", f"at least n={self.n} for {self.kind}", str(self.tokens))
        self._check_groups()

    def _check_groups(self) -> None:
        if self.kind is not LengthKind.GROUPS:
            if self.groups:
                raise ArgumentValueError("groups", f"none for {self.kind}", str(self.groups))
            return
        if not self.groups or any(count < 1 or length < 0 for count, length in self.groups):
            expected = "one run or more, of counts of one or more and lengths of zero or more"
            raise ArgumentValueError("groups", expected, str(self.groups))
        held = sum(count for count, _ in self.groups), sum(count * length for count, length in self.groups)
        if held != (self.n, self.tokens):
            expected = f"groups of n={self.n} sequences and {self.tokens} tokens"
            raise ArgumentValueError("groups", expected, f"{held[0]} sequences and {held[1]} tokens")

    @classmethod
    def of_groups(cls, groups: Iterable[tuple[int, int]]) -> LengthLayout:
        """Runs of ``(count, length)``, in order."""
        runs = tuple(groups)
        n, tokens = sum(count for count, _ in runs), sum(count * length for count, length in runs)
        return cls(LengthKind.GROUPS, n, tokens, groups=runs)

    @classmethod
    def of_lengths(cls, lengths: Sequence[int]) -> LengthLayout:
        """The layout that spells out ``lengths`` (tokens per sequence, in order); of none, ``decode(0)``."""
        if not lengths:
            return cls.decode(0)
        return cls.of_groups((len(list(run)), length) for length, run in itertools.groupby(lengths))

    @classmethod
    def decode(cls, n: int) -> LengthLayout:
        """``n`` sequences of one token."""
        return cls(LengthKind.DECODE, n, n)

    @classmethod
    def skew(cls, tokens: int, n: int = _SKEW_N) -> LengthLayout:
        """One sequence of about 0.76 of the tokens, the others equal; ``skew(8192)`` is 6208 and 31 of 64."""
        return cls(LengthKind.SKEW, n, tokens)

    @classmethod
    def prompts(cls, trace: PromptTrace, n: int, tokens: int | None = None, seed: int = 0) -> LengthLayout:
        """``n`` prompts spread as in ``trace``, holding ``tokens`` tokens (default: ``n`` times its mean)."""
        total = round(n * trace.mean) if tokens is None else tokens
        return cls(LengthKind.LOGNORMAL, n, total, seed, trace.sigma)

    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence, ``n`` integers that sum to ``tokens``."""
        if self.n == 0:
            return ()
        match self.kind:
            case LengthKind.GROUPS:
                runs = (itertools.repeat(length, count) for count, length in self.groups)
                return tuple(itertools.chain.from_iterable(runs))
            case LengthKind.DECODE:
                return (1,) * self.n
            case LengthKind.UNIFORM:
                return _equal(self.n, self.tokens)
            case LengthKind.RAGGED:
                return _apportion(self._ragged_weights(self.n), self.tokens)
            case LengthKind.LOGNORMAL:
                # Only the spread matters: the location cancels when the draws are scaled to the total.
                draws = self._rng().normal(0.0, self.sigma or 0.0, self.n)
                return _apportion([math.exp(x) for x in draws - draws.max()], self.tokens)
            case LengthKind.ONE_LONG:
                return self._long_among_ones(1)
            case LengthKind.FEW_LONG:
                return self._long_among_ones(max(1, self.n // _FEW_LONG_DIVISOR))
            case LengthKind.WITH_EMPTY:
                return self._with_empty()
            case LengthKind.SKEW:
                spare = self.tokens - (self.n - 1) if self.tokens >= self.n else self.tokens
                long = min(-(-self.tokens * _SKEW_NUM // _SKEW_DEN), spare) if self.n > 1 else self.tokens
                return (long, *_equal(self.n - 1, self.tokens - long))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence; 0 if there is none."""
        return max(self.lengths(), default=0)

    @property
    def length_class(self) -> LengthClass:
        """The class the tuning key puts these lengths in."""
        return class_of_lengths(self.lengths())

    def __str__(self) -> str:
        """The text form; :func:`parse_lengths` reads it back to an equal layout."""
        if self.kind is LengthKind.GROUPS:
            return "+".join(f"{count}x{length}" for count, length in self.groups)
        if self.kind is LengthKind.SKEW and self.n == _SKEW_N and not self.seed:
            return f"skew {self.tokens}"
        fields = [f"n={self.n}"]
        if self.kind is not LengthKind.DECODE:
            fields.append(f"tokens={self.tokens}")
        if self.sigma is not None:
            fields.append(f"sigma={self.sigma!r}")
        if self.seed:
            fields.append(f"seed={self.seed}")
        return f"{self.kind} {' '.join(fields)}"

    def _rng(self) -> np.random.Generator:
        import numpy as np

        return np.random.Generator(np.random.PCG64(self.seed))

    def _ragged_weights(self, n: int) -> list[float]:
        return [float(w) for w in self._rng().uniform(0.5, 1.5, n)]

    def _long_among_ones(self, longs: int) -> tuple[int, ...]:
        places = self._rng().choice(self.n, longs, replace=False)
        out = [1] * self.n
        for place, length in zip(places, _equal(longs, self.tokens - (self.n - longs)), strict=True):
            out[int(place)] = length
        return tuple(out)

    def _with_empty(self) -> tuple[int, ...]:
        # With three sequences or fewer, one of the three places has to hold the tokens.
        empty = {1: set[int](), 2: {0}, 3: {0, 2}}.get(self.n, {0, self.n // 2, self.n - 1})
        held = iter(_apportion(self._ragged_weights(self.n - len(empty)), self.tokens))
        return tuple(0 if i in empty else next(held) for i in range(self.n))


def _equal(n: int, tokens: int) -> tuple[int, ...]:
    """``tokens`` over ``n``, as equal as integers allow, longer ones first."""
    if n == 0:
        return ()
    base, rest = divmod(tokens, n)
    return (base + 1,) * rest + (base,) * (n - rest)


def _apportion(weights: Sequence[float], tokens: int) -> tuple[int, ...]:
    """``tokens`` in proportion to ``weights``, exactly, one for each sequence first if there are enough."""
    n = len(weights)
    first = 1 if tokens >= n else 0
    scaled = [int(w * (1 << _WEIGHT_BITS)) + 1 for w in weights]  # + 1: no weight vanishes
    total, spare = sum(scaled), tokens - first * n
    shares = [divmod(w * spare, total) for w in scaled]
    out = [first + share for share, _ in shares]
    by_remainder = sorted(range(n), key=lambda i: (-shares[i][1], i))
    for i in by_remainder[: tokens - sum(out)]:
        out[i] += 1
    return tuple(out)


def parse_lengths(text: str) -> LengthLayout:
    """The layout that ``text`` names, in any of the forms of the module's description.

    Raises:
        ArgumentValueError: the text is none of them; the hint names the nearest kind.
    """
    if _GROUPS.fullmatch(text):
        runs = (run.split("x") for run in text.split("+"))
        return LengthLayout.of_groups((int(count), int(length)) for count, length in runs)
    if skew := _SKEW.fullmatch(text):
        return LengthLayout.skew(int(skew[1]))
    word, *fields = text.split() or [""]
    kinds = [str(kind) for kind in LengthKind if kind is not LengthKind.GROUPS]
    if word not in kinds:
        near = near_matches(word, kinds)
        raise ArgumentValueError("lengths", _EXPECTED, repr(text), f"did you mean {near[0]!r}?" if near else "")
    return _from_fields(LengthKind(word), fields, text)


def _from_fields(kind: LengthKind, fields: Sequence[str], text: str) -> LengthLayout:
    values: dict[str, str] = {}
    for field in fields:
        key, _, value = field.partition("=")
        if key not in ("n", "tokens", "seed", "sigma") or key in values:
            near = near_matches(key, ("n", "tokens", "seed", "sigma"))
            hint = f"{key!r} is repeated" if key in values else f"did you mean {near[0]!r}?" if near else ""
            raise ArgumentValueError("lengths", "fields n, tokens, seed, sigma, each once", repr(text), hint)
        values[key] = value
    if kind is LengthKind.DECODE:
        values.setdefault("tokens", values.get("n", ""))
    for key in ("n", "tokens", "seed"):
        if not re.fullmatch(r"\d+", values.get(key, "0" if key == "seed" else "")):
            expected = f"{key}=<integer of zero or more>"
            raise ArgumentValueError("lengths", expected, repr(text))
    try:
        sigma = float(values["sigma"]) if "sigma" in values else None
    except ValueError:
        raise ArgumentValueError("lengths", "sigma=<number>", repr(text)) from None
    return LengthLayout(kind, int(values["n"]), int(values["tokens"]), int(values.get("seed", "0")), sigma)
