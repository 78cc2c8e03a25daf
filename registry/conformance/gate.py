"""The tuner's gate: a candidate is proven correct and repeatable on that very problem before it is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, Protocol

import torch

from ..backend import Backend, Chunked, Config
from ..decision import RejectCode
from .check import BackendRaised, Declined, PredicateFault, Violation
from .kept import Kept
from .subject import Subject

__all__ = ["GateResult", "GateTrial", "gate"]

#: The largest finite value of float16, and so a poison that every output dtype holds.
_LARGE = {torch.float16: 6e4}


@dataclass(frozen=True, slots=True)
class GateResult:
    """The gate's verdict on one candidate.

    Attributes:
        ok: may be timed, and may win.
        code: why not; None when ``ok``.
        reason: in words; empty when ``ok``.
        repeatable: two runs gave the same bits; None when that was not reached.
        worst_ratio: largest |error| in units of the error bound over all runs judged; NaN when none was.
    """

    ok: bool
    code: RejectCode | None
    reason: str
    repeatable: bool | None
    worst_ratio: float

    def __bool__(self) -> bool:
        return self.ok


class GateTrial(Protocol):
    """What an op provides for its gate (``checks.gating.GateTrial`` of the op)."""

    call: Any

    def truth(self, chunk: int | Chunked | None, max_token_heads: int, seed: int) -> Any:
        """The reference of the call, before it runs, within the budget; bounds for chunked forms if ``chunk``."""

    def begin(self) -> None:
        """Be as made, whatever an earlier candidate did to the call."""

    def lasting(self) -> Iterable[torch.Tensor]:
        """The tensors that no run may change."""

    def launch(self, subject: Subject, poison: float) -> None:
        """Run on a poisoned output."""

    def judge(self, ref: Any) -> float:
        """Worst ratio of the last run; raises Violation."""

    def check_untouched(self) -> None:
        """Raise Violation if an input, a guard or an unnamed place changed."""

    def remember(self) -> Any:
        """A copy of what the last run left."""

    def restore(self) -> None:
        """Put inputs and states back."""

    def differs(self, image: Any) -> str:
        """How the last run differs from a remembered one; empty when it does not."""


def gate(
    op: str,
    backend: Backend,
    config: Config | None,
    case: Any,
    *,
    seeds: Sequence[int] = (0, 1),
    adversarial: Any = None,
    max_token_heads: int = 1 << 11,
    device: torch.device | str = "cpu",
    require_repeatable: bool = True,
    kept: Kept | None = None,
) -> GateResult:
    """Prove one candidate on one case.

    On each seed, and on an adversarial length layout of the same problem: outputs and states within the error bound
    with NaN in the output beforehand, inputs and everything around the written places bit-identical. On the first
    seed also: the same call again gives the same bits, and so it does with another poison.

    Holds about three times the call's memory. Raises nothing that the backend does: every failure is a code.

    Args:
        case: the op's case record; its problem is the one to be tuned.
        adversarial: another case of the same problem; None lets the op make one.
        max_token_heads: tokens times heads to compare with the reference (a thousand take about a tenth of a second at
            K = V = 128); beyond, a random subset of heads stands for all, the first and the last among them.
        kept: keeps calls and references between candidates of one case (the dearest part of the gate); pass one for
            all of them, and drop it with the case.
        require_repeatable: reject with ``NOT_REPEATABLE``; else only report it.
    """
    trial_of = _trial_class(op)
    kept = Kept(0) if kept is None else kept
    subject = Subject(backend, config, device=device)
    rest = trial_of.adversarial(case) if adversarial is None else adversarial
    runs = [(case, seed) for seed in seeds]
    runs += [(rest, seeds[0])] if rest != case else []
    worst = math.nan
    repeatable: bool | None = None
    try:
        for i, (spec, seed) in enumerate(runs):
            trial: GateTrial = kept.get((spec, seed), partial(trial_of.of, spec, seed, device))
            trial.begin()
            chunk = subject.chunk(trial.call)
            make = partial(trial.truth, chunk, max_token_heads, seed)
            ref = kept.get((spec, seed, max_token_heads, chunk), make)
            trial.launch(subject, math.nan)
            ratio = trial.judge(ref)
            worst = ratio if math.isnan(worst) else max(worst, ratio)
            trial.check_untouched()
            if i == 0:
                repeatable = _run_again(trial, subject, require_repeatable)
    except Violation as violation:
        if violation.code is RejectCode.NOT_REPEATABLE:
            repeatable = False
        if violation.ratio is not None:
            worst = violation.ratio if math.isnan(worst) else max(worst, violation.ratio)
        return GateResult(False, violation.code, str(violation), repeatable, worst)
    except Declined as declined:
        return GateResult(False, declined.verdict.code, declined.verdict.reason, repeatable, worst)
    except PredicateFault as fault:
        return GateResult(False, RejectCode.RAISED, str(fault), repeatable, worst)
    except BackendRaised as raised:
        return GateResult(False, _code_of(raised), str(raised), repeatable, worst)
    return GateResult(True, None, "", repeatable, worst)


def _run_again(trial: GateTrial, subject: Subject, require_repeatable: bool) -> bool:
    """Twice more: with the same poison, then with a large number in its place."""
    first = trial.remember()
    trial.restore()
    trial.launch(subject, math.nan)
    unequal = trial.differs(first)
    if unequal:
        if require_repeatable:
            raise Violation(f"two equal runs differ: {unequal}", code=RejectCode.NOT_REPEATABLE)
        return False
    trial.restore()
    poison = _LARGE.get(trial.call.out.dtype, 1e30)
    trial.launch(subject, poison)
    unequal = trial.differs(first)
    if unequal:
        raise Violation(f"results depend on what the output held before: {unequal}")
    return True


def _code_of(raised: BackendRaised) -> RejectCode:
    cause = raised.__cause__
    if isinstance(cause, MemoryError | torch.OutOfMemoryError):
        return RejectCode.MEMORY
    if isinstance(cause, RuntimeError) and "allocate memory" in str(cause):
        return RejectCode.MEMORY  # how torch's CPU allocator says it
    return RejectCode.COMPILE if raised.stage == "bind" else RejectCode.RAISED


class _TrialClass(Protocol):
    adversarial: Callable[[Any], Any]
    of: Callable[..., GateTrial]


def _trial_class(op: str) -> _TrialClass:
    """The op's own trial. Raises ModuleNotFoundError for an op without one."""
    module = import_module(f"{__name__.rsplit('.', 2)[0]}.ops.{op}.checks.gating")
    trial: _TrialClass = module.GateTrial
    return trial
