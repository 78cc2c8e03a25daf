"""Comparing a backend's results with the float64 reference, under the op's error bound."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch

from .call import Call
from .dtypes import dtype_name, dtype_of, smallest_step, unit_roundoff
from .operands import TYPICAL
from .reference import Reference

__all__ = ["LIMITS", "Judgement", "Limits", "judge", "rounded"]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a result must satisfy, by output dtype.

    Attributes:
        rel_l2: per (sequence, head), relative 2-norm of the error; the exactly rounded result may itself come to
            more on a short vector, then 1.05 times its own error is the limit.
        equal_bits: share of outputs that must equal the rounded reference, counted over at least
            ``equal_bits_count`` values (a smaller sample says nothing).

    Where operands are rounded (``Reference.o_noise``) no share of bits can be asked for, and the error that this will
    typically cause adds to ``rel_l2``, times what a sample of so many independent columns may come to: see
    :func:`_allowance`.
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
    for x, y in pairwise(ref.offsets):
        noise = None if ref.o_noise is None else ref.o_noise[x:y].transpose(0, 1)
        got, exact, bound = (t[x:y].transpose(0, 1) for t in (rows, ref.o, ref.o_bound))
        outputs.add(got, exact, bound, noise, y - x)
    outputs.report("output", ratio_limit, faults)

    states = _Comparison(dtype_name(call.pool.dtype) if call.pool is not None else "float32", rerounded, noisy)
    if call.pool is not None and call.write_slots is not None:
        for n, slot in enumerate(call.write_slots.tolist()):
            if slot >= 0 and ref.offsets[n + 1] > ref.offsets[n]:
                bound = ref.state_bound[n][:, None, :].expand_as(ref.state[n])
                noise = None if ref.state_noise is None else ref.state_noise[n]
                length = ref.offsets[n + 1] - ref.offsets[n]
                states.add(_kv(call.pool[slot], heads, call), ref.state[n], bound, noise, length)
        states.report("state", ratio_limit, faults)

    steps = _Comparison(
        dtype_name(call.intermediates.dtype) if call.intermediates is not None else "float32", rerounded
    )
    if call.intermediates is not None and ref.steps is not None and ref.steps_bound is not None:
        assert call.intermediate_rows is not None
        for n, row in enumerate(call.intermediate_rows.tolist()):
            for t in range(ref.offsets[n + 1] - ref.offsets[n] if row >= 0 else 0):
                at = ref.offsets[n] + t
                bound = ref.steps_bound[at][:, None, :].expand_as(ref.steps[at])
                steps.add(_kv(call.intermediates[row, t], heads, call), ref.steps[at], bound)
        steps.report("intermediate state", ratio_limit, faults)
    return Judgement(
        outputs.ratio, states.ratio, steps.ratio, outputs.rel, states.rel, outputs.equal_bits, tuple(faults)
    )


def _kv(state: torch.Tensor, heads: torch.Tensor, call: Call) -> torch.Tensor:
    chosen = state.detach().to(heads.device)[heads]
    return chosen if call.state_layout == "kv" else chosen.transpose(-1, -2)


def _allowance(independent: int) -> float:
    """How many times its mean a sum of so many independent squares is, at most, but for one time in 10**9.

    Laurent and Massart's bound for chi-squared: 1 + 2 sqrt(x / n) + 2 x / n with x = 20. And at most what two roundings
    give that all values share, each the largest there is: (2 ** -8 / its root mean square)**2 for either.
    """
    n = max(1, independent)
    return min(1 + 2 * math.sqrt(20 / n) + 40 / n, 2 / TYPICAL**2)


class _Comparison:
    """Running worst case over groups; a group is one sequence, its first axis the heads."""

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
        tokens: int = 0,
    ) -> None:
        """``got`` in its own dtype, ``exact``, ``bound`` and ``noise`` float64, all ``[heads, ..., V]``.

        Args:
            tokens: of the sequence. Roundings of states and values differ from column to column of V, those of a
                chunk's matrices from token to token: so many errors are independent as there are of the fewer.
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
        self._relative(value, exact, target, noise, min(tokens, exact.shape[-1]))

    def _relative(
        self,
        value: torch.Tensor,
        exact: torch.Tensor,
        target: torch.Tensor,
        noise: torch.Tensor | None,
        independent: int,
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
        if noise is not None:
            typical = noise.flatten(1).norm(dim=-1)[usable] / norm[usable]
            allowed = (allowed.square() + _allowance(independent) * typical.square()).sqrt()
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
