"""Comparing a backend's results with the float64 reference, under the op's error bound."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import TypeVar

import torch

from .call import Call
from .dtypes import dtype_name, dtype_of, smallest_step, unit_roundoff
from .operands import TYPICAL
from .reference import Reference

__all__ = ["LIMITS", "Judgement", "Limits", "judge", "rounded"]


#: Where the decay has left nothing of the state, the output of a single token is v times one number, ``beta (k . q)``:
#: the error of that sum is in every column, and is large beside it when key and query happen to be orthogonal (of 1500
#: tokens and heads, one to 2 parts in 10**4). The bound knows, by its sums of magnitudes: an error up to this part
#: of it is none. A sum of K terms in any order wanders by half a roundoff of its magnitudes (standard deviation), for
#: which the bound has 6 sqrt(K) and more: a sixteenth is three of them at K = 8, eight at K = 128. Over 40000 such
#: tokens of K = 8 to 256 the worst of two float32 evaluations was 0.57 of this at K = 8 and 0.15 at K = 128.
_OF_BOUND = 1 / 16
#: Values of several sequences that are looked at together at most: some ten float64 copies are made of them.
_TOGETHER = 1 << 22


@dataclass(frozen=True, slots=True)
class Limits:
    """What a result must satisfy, by output dtype.

    Attributes:
        rel_l2: per (sequence, head), relative 2-norm of the error; the exactly rounded result may itself come to
            more on a short vector, then 1.05 times its own error is the limit. The output of a sequence of one
            token may cancel, see ``_OF_BOUND``.
        equal_bits: share of outputs that must equal the rounded reference, counted over at least
            ``equal_bits_count`` values (a smaller sample says nothing).

    Where operands are rounded (``Reference.o_noise``) no share of bits can be asked for, and the error that this will
    typically cause adds to ``rel_l2``, times what a sample of so many independent errors may come to: see
    :func:`_allowance`, and for states :func:`_allowance_of_states`.
    """

    rel_l2: float
    equal_bits: float
    equal_bits_count: int = 4096


#: Rounding alone costs 1.664e-3 (bfloat16) and 2.08e-4 (float16) of Gaussian data; correct float32 arithmetic is
#: within 24 units of 2**-24 of the truth; a truncating store has 50 % equal bits, TF32 products 87 %.
LIMITS = {
    "bfloat16": Limits(rel_l2=2.0e-3, equal_bits=0.995),
    "float16": Limits(rel_l2=2.6e-4, equal_bits=0.995),
    "float32": Limits(rel_l2=1e-5, equal_bits=0.0),
    "float64": Limits(rel_l2=1e-5, equal_bits=0.0),
}


@dataclass(frozen=True, slots=True)
class Judgement:
    """How far a result is from the truth.

    Attributes:
        ratio_o, ratio_state, ratio_steps: worst |error| / bound of outputs, final states, intermediate states;
            at most 1 for a correct evaluation.
        rel_o, rel_state: worst relative 2-norm per (sequence, head).
        equal_bits: share of low-precision outputs equal to the rounded reference (1.0 for float32).
        faults: a sentence per violated limit; empty when the result conforms.
    """

    ratio_o: float
    ratio_state: float
    ratio_steps: float
    rel_o: float
    rel_state: float
    equal_bits: float
    faults: tuple[str, ...]

    @property
    def ok(self) -> bool:
        return not self.faults


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``value`` (float64) rounded to nearest even in ``dtype``; overflow becomes infinite."""
    return value.to(dtype)


def judge(call: Call, out: torch.Tensor, ref: Reference, ratio_limit: float = 1.0) -> Judgement:
    """Judge what a backend left in ``out`` and in the pool and buffer of ``call``.

    Args:
        call: the canonical call *after* the backend ran (its pool and buffer hold the results).
        out: ``[B, T, HV, V]`` in q's dtype.
        ref: the reference of the same call, made before it ran; comparing happens on its device.
        ratio_limit: largest allowed |error| / bound.
    """
    heads = torch.tensor(ref.heads, dtype=torch.int64, device=ref.o.device)
    faults: list[str] = []
    # A tree read back through a 16-bit buffer may take the neighbouring value at every jump: an error of the
    # contract's rounding, inside the bound, that no fixed norm can know.
    rerounded = call.parents is not None and call.intermediates is not None and call.intermediates.dtype.itemsize < 4
    rows = out.detach().to(ref.o.device).flatten(0, 1)[:, heads]
    noisy = ref.o_noise is not None
    outputs = _Comparison(dtype_name(out.dtype), rerounded, noisy)
    lengths, size = [y - x for x, y in pairwise(ref.offsets)], len(ref.heads) * call.key_dim * call.value_dim
    for first, count in _alike(lengths, len(ref.heads) * call.value_dim):
        cut, length = slice(ref.offsets[first], ref.offsets[first + count]), lengths[first]
        got, exact, bound = (_by_head(t[cut], count, length) for t in (rows, ref.o, ref.o_bound))
        noise = None if ref.o_noise is None else _by_head(ref.o_noise[cut], count, length)
        # Roundings of states and values differ from column to column of V, those of a chunk's matrices from token to
        # token: so many errors are independent as there are of the fewer.
        outputs.add(
            got, exact, bound, noise, _allowance(min(length, call.value_dim)), _OF_BOUND if length == 1 else 0.0
        )
    outputs.report("output", ratio_limit, faults)

    # A state of one number crosses zero: how large its error is beside it says nothing, beside its bound it does.
    alone = 1.0 if call.key_dim * call.value_dim == 1 else 0.0
    states = _Comparison(dtype_name(call.pool.dtype) if call.pool is not None else "float32", rerounded, noisy)
    if call.pool is not None and call.write_slots is not None:
        slots = call.write_slots.tolist()
        kept = [n for n, slot in enumerate(slots) if slot >= 0 and lengths[n]]
        for first, count in _alike([lengths[n] for n in kept], size, per_token=False):
            which = kept[first : first + count]
            got = torch.stack([_kv(call.pool[slots[n]], heads, call) for n in which]).flatten(0, 1)
            exact = ref.state[which].flatten(0, 1)
            bound = ref.state_bound[which].flatten(0, 1)[:, None, :].expand_as(exact)
            noise = allowance = None
            if ref.state_noise is not None and ref.state_scatter is not None:
                noise = ref.state_noise[which].flatten(0, 1)
                allowance = _allowance_of_states(ref.state_scatter[:, which].flatten(1), call.value_dim)
            states.add(got, exact, bound, noise, allowance, alone)
        states.report("state", ratio_limit, faults)

    steps = _Comparison(
        dtype_name(call.intermediates.dtype) if call.intermediates is not None else "float32", rerounded
    )
    if call.intermediates is not None and ref.steps is not None and ref.steps_bound is not None:
        assert call.intermediate_rows is not None
        stored = [
            (row, t, ref.offsets[n] + t)
            for n, row in enumerate(call.intermediate_rows.tolist())
            for t in range(lengths[n] if row >= 0 else 0)
        ]
        most = max(1, _TOGETHER // max(1, size))
        for part in (stored[i : i + most] for i in range(0, len(stored), most)):
            at = [token for _, _, token in part]
            got = torch.stack([_kv(call.intermediates[row, t], heads, call) for row, t, _ in part]).flatten(0, 1)
            exact = ref.steps[at].flatten(0, 1)
            bound = ref.steps_bound[at].flatten(0, 1)[:, None, :].expand_as(exact)
            steps.add(got, exact, bound, of_bound=alone)
        steps.report("intermediate state", ratio_limit, faults)
    return Judgement(
        outputs.ratio, states.ratio, steps.ratio, outputs.rel, states.rel, outputs.equal_bits, tuple(faults)
    )


def _alike(lengths: Sequence[int], size: int, per_token: bool = True) -> Iterator[tuple[int, int]]:
    """Runs of sequences of equal lengths that can be looked at together: the first one's index, and how many.

    Limits hold per sequence and head, so that sequences are more heads; and each look takes some fifty operations.

    Args:
        size: values per sequence, or per token of one.
    """
    at = 0
    for length, alike in groupby(lengths):
        count = sum(1 for _ in alike)
        most = max(1, _TOGETHER // max(1, size * (length if per_token else 1)))
        for first in range(at, at + count, most):
            yield first, min(most, at + count - first)
        at += count


def _by_head(rows: torch.Tensor, count: int, length: int) -> torch.Tensor:
    """``[count * length, heads, V]`` as ``[count * heads, length, V]``."""
    return rows.reshape(count, length, *rows.shape[1:]).transpose(1, 2).flatten(0, 1)


def _kv(state: torch.Tensor, heads: torch.Tensor, call: Call) -> torch.Tensor:
    chosen = state.detach().to(heads.device)[heads]
    return chosen if call.state_layout == "kv" else chosen.transpose(-1, -2)


#: Of how rare a sample errors are allowed: exp(-20), one in 10**9.
_RARE = 20.0
#: No sum of squares of roundings to bfloat16 is more times its mean than if two of them, that everything shares, were
#: the largest there are: (2 ** -8 / the root mean square)**2 for either.
_LARGEST = 2 / TYPICAL**2
_Number = TypeVar("_Number", float, torch.Tensor)


def _allowance(independent: int) -> float:
    """How many times its mean a sum of so many independent squares is, at most, but for one time in 10**9.

    Laurent and Massart's bound for chi-squared: 1 + 2 sqrt(x / n) + 2 x / n with x = 20; and at most ``_LARGEST``.
    """
    n = max(1, independent)
    return min(_weighted(1 / math.sqrt(n), 1 / n), _LARGEST)


def _weighted(root: _Number, most: _Number) -> _Number:
    """Their bound where the squares have weights ``w`` that add up to 1: 1 + 2 sqrt(x) ``|w|`` + 2 x ``max w``."""
    return 1 + 2 * math.sqrt(_RARE) * root + 2 * _RARE * most


def _allowance_of_states(scatter: torch.Tensor, columns: int) -> torch.Tensor:
    """The same for the squares of a state's errors, ``[heads]``.

    What differs from column to column is as many independent errors as there are columns. What all columns share
    is as many as there are tokens, each with a weight of its own: where decay is strong the last few have nearly all.

    Args:
        scatter: ``[3, heads]``, see ``OperandRounding.scatter``.
    """
    part, most, root = scatter.unbind()
    shared = _weighted(root, most).clamp(max=_LARGEST)
    return (1 - part) * _allowance(columns) + part * shared


class _Comparison:
    """Running worst case over groups; a group is some sequences of one length, its first axis their heads."""

    def __init__(self, dtype: str, rerounded: bool, noisy: bool = False) -> None:
        self.dtype = dtype
        self.rerounded = rerounded  # only the bound applies
        self.noisy = noisy  # no share of bits can be asked for
        self.limits = LIMITS[dtype]
        self.ratio = 0.0
        self.rel = 0.0
        self.worst = ""
        self.rel_excess = 0.0
        self.equal = 0
        self.counted = 0

    def add(
        self,
        got: torch.Tensor,
        exact: torch.Tensor,
        bound: torch.Tensor,
        noise: torch.Tensor | None = None,
        allowance: float | torch.Tensor | None = None,
        of_bound: float = 0.0,
    ) -> None:
        """``got`` in its own dtype, ``exact``, ``bound`` and ``noise`` float64, all ``[heads, ..., V]``.

        Args:
            allowance: how many times the sum of the squares of ``noise`` there may be; of all heads, or ``[heads]``.
            of_bound: of what may cancel as a whole: the share of the bound within which nothing is a fault.
        """
        if not got.numel():
            return
        nearest = rounded(exact, dtype_of(self.dtype))
        value, target = got.to(torch.float64), nearest.to(torch.float64)
        same = value == target  # infinities of the same sign included
        slack = bound * (1 + unit_roundoff(self.dtype)) + unit_roundoff(self.dtype) * exact.abs()
        slack = slack + smallest_step(self.dtype) + 1e-300
        ratio = (value - exact).abs() / slack
        ratio = torch.where(same & ~torch.isfinite(target), torch.zeros_like(ratio), ratio)
        worst = math.inf if bool(torch.isnan(ratio).any()) else float(ratio.max())
        self.ratio = max(self.ratio, worst)
        if self.dtype in ("bfloat16", "float16"):
            self.equal += int(same.sum())
            self.counted += same.numel()
        self._relative(value, exact, target, bound * of_bound if of_bound else None, noise, allowance)

    def _relative(
        self,
        value: torch.Tensor,
        exact: torch.Tensor,
        target: torch.Tensor,
        bound: torch.Tensor | None,
        noise: torch.Tensor | None,
        allowance: float | torch.Tensor | None,
    ) -> None:
        value, exact, target = value.flatten(1), exact.flatten(1), target.flatten(1)
        finite = torch.isfinite(target).all(-1)
        norm = exact.norm(dim=-1)
        usable = finite & (norm > 1e-30)
        if not bool(usable.any()):
            return
        error = (value - exact).norm(dim=-1)[usable] / norm[usable]
        floor = (target - exact).norm(dim=-1)[usable] / norm[usable]
        allowed = torch.maximum(torch.full_like(floor, self.limits.rel_l2), 1.05 * floor)
        if bound is not None:
            allowed = torch.maximum(allowed, bound.flatten(1).norm(dim=-1)[usable] / norm[usable])
        if noise is not None and allowance is not None:
            typical = noise.flatten(1).norm(dim=-1)[usable] / norm[usable]
            times = allowance[usable] if isinstance(allowance, torch.Tensor) else allowance
            allowed = (allowed.square() + times * typical.square()).sqrt()
        self.rel = max(self.rel, math.inf if bool(torch.isnan(error).any()) else float(error.max()))
        excess = error / allowed
        self.rel_excess = max(self.rel_excess, math.inf if bool(torch.isnan(excess).any()) else float(excess.max()))

    @property
    def equal_bits(self) -> float:
        return self.equal / self.counted if self.counted else 1.0

    def report(self, what: str, ratio_limit: float, faults: list[str]) -> None:
        if not self.ratio <= ratio_limit:
            faults.append(f"{what} is {self.ratio:.3g} times its error bound away (limit {ratio_limit:g})")
        if not self.rel_excess <= 1 and not self.rerounded:
            faults.append(
                f"{what} has relative error {self.rel:.3g} ({self.rel_excess:.3g} times the limit for {self.dtype})"
            )
        enough = self.counted >= self.limits.equal_bits_count and not self.rerounded and not self.noisy
        if enough and self.equal_bits < self.limits.equal_bits:
            faults.append(
                f"{what} equals the rounded reference in {100 * self.equal_bits:.2f} % of values "
                f"(limit {100 * self.limits.equal_bits:g} %)"
            )
