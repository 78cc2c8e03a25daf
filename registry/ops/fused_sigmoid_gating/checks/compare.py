"""Comparing results: with the float64 reference under the error bound, and with one another bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from ....backend import Chunked
from ....conformance.check import Violation
from ....conformance.subject import Subject
from ..call import Call
from ..case import CaseSpec
from ..dtypes import dtype_name, smallest_step, unit_roundoff
from ..judge import judge
from ..reference import Reference, reference
from ..validate import canonical_call
from .kwargs import Kwargs, fresh
from .trial import Results, Trial

__all__ = ["Recipe", "accurate", "difference", "exact", "exact_for", "judged", "near", "same", "truth"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """How to make the arguments of a call anew: a case, and what is changed about it."""

    spec: CaseSpec
    seed: int | None = None
    change: Callable[[Kwargs], Kwargs] | None = None

    def kwargs(self, device: torch.device | str = "cpu") -> Kwargs:
        made = fresh(self.spec, self.seed, device)
        return made if self.change is None else self.change(made)

    def trial(self, subject: Subject) -> Trial:
        made = Trial(self.kwargs(subject.device))
        made.lend_lengths(subject)
        return made


def truth(call: Call, chunk: int | Chunked | None = None, heads: Sequence[int] | None = None) -> Reference:
    """The reference of a call that has not run yet."""
    return reference(call, heads=heads, chunk=chunk)


@lru_cache(maxsize=192)
def exact(recipe: Recipe, chunk: int | Chunked | None = None) -> Reference:
    """The truth of a recipe's call; remembered, since every backend and relation asks for the same ones."""
    return truth(canonical_call(**recipe.kwargs()), chunk)


def exact_for(subject: Subject, recipe: Recipe) -> Reference:
    """:func:`exact` with the bound that the subject's config is held to."""
    return exact(recipe, subject.chunk(recipe.trial(subject).call))


def accurate(subject: Subject, recipe: Recipe, limit: float = 1.0) -> float:
    """Run the recipe's call and judge it. Returns the worst ratio; raises Violation beyond the bound."""
    trial = recipe.trial(subject)
    chunk = subject.chunk(trial.call)
    trial.run(subject)
    return judged(trial.call, trial.out, exact(recipe, chunk), limit)


def judged(call: Call, out: torch.Tensor, ref: Reference, limit: float = 1.0) -> float:
    """The op's judgement as a ratio, or a Violation."""
    judgement = judge(call, out, ref, limit)
    ratio = max(judgement.ratio_o, judgement.ratio_state, judgement.ratio_steps)
    if not judgement.ok:
        raise Violation("; ".join(judgement.faults), ratio)
    return ratio


def same(
    subject: Subject, check: str, got: Results, want: Results, ref: Callable[[], Reference] | None = None
) -> float | None:
    """Bits equal, or, where the backend has an exception for ``check``, within so many bounds of each other.

    Args:
        ref: the reference of the call both results describe; without one no exception applies.

    Returns None if equal, else the ratio. -0 equals 0.
    """
    unequal = _unequal(got, want)
    if unequal is None:
        return None
    limit = subject.relax(check) if ref is not None else None
    if limit is None or ref is None:
        raise Violation(unequal)
    return near(got, want, ref(), limit)


def near(got: Results, want: Results, ref: Reference, limit: float) -> float:
    """Within ``limit`` error bounds of each other; returns the ratio, raises Violation beyond."""
    ratio = difference(got, want, ref)
    if not ratio <= limit:
        raise Violation(f"differ by {ratio:.3g} error bounds (limit {limit:g})", ratio)
    return ratio


def difference(got: Results, want: Results, ref: Reference) -> float:
    """Worst |difference| of two results in units of the reference's bound (rounding to the dtype included)."""
    ratios = [_ratio(got.o, want.o, ref.o[: len(got.o)], ref.o_bound[: len(got.o)])]
    for n, (x, y) in enumerate(zip(got.states, want.states, strict=True)):
        if x is not None and y is not None:
            ratios.append(_ratio(x, y, ref.state[n], ref.state_bound[n][:, None, :]))
    for n, (x, y) in enumerate(zip(got.steps, want.steps, strict=True)):
        if x is not None and y is not None and ref.steps is not None and ref.steps_bound is not None:
            rows = slice(ref.offsets[n], ref.offsets[n + 1])
            ratios.append(_ratio(x, y, ref.steps[rows], ref.steps_bound[rows][:, :, None, :]))
    return max(ratios)


def _ratio(x: torch.Tensor, y: torch.Tensor, truth: torch.Tensor, bound: torch.Tensor) -> float:
    if not x.numel():
        return 0.0
    name = dtype_name(x.dtype)
    u = unit_roundoff(name)
    slack = bound * (1 + u) + u * truth.abs() + smallest_step(name) + 1e-300
    ratio = (x.cpu().double() - y.cpu().double()).abs() / slack
    return math.inf if bool(torch.isnan(ratio).any()) else float(ratio.max())


def _unequal(got: Results, want: Results) -> str | None:
    """What differs, in words."""
    pairs = [("output", got.o, want.o)]
    for kind, xs, ys in (("state", got.states, want.states), ("steps", got.steps, want.steps)):
        for n, (x, y) in enumerate(zip(xs, ys, strict=True)):
            if (x is None) != (y is None):
                return f"{kind} of sequence {n} is stored in one call only"
            if x is not None and y is not None:
                pairs.append((f"{kind} of sequence {n}", x, y))
    for what, x, y in pairs:
        if x.shape != y.shape:
            return f"{what} has shape {list(x.shape)} in one call, {list(y.shape)} in the other"
        if not torch.equal(x, y):
            wrong = x != y  # NaN counts as different: no result may hold one
            largest = float((x.double() - y.double()).abs().max())
            return f"{what} differs in {int(wrong.sum())} of {x.numel()} values, by up to {largest:.3g}"
    return None
