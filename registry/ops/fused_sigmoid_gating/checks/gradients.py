"""Gradients of a differentiable backend against finite differences of its own outputs, in float64."""

from __future__ import annotations

import torch

from ....conformance.check import Violation
from ....conformance.subject import Subject
from ..case import CaseSpec
from ..validate import canonical_call
from .kwargs import Kwargs, fresh, offsets_of

__all__ = ["gradients_agree"]

_INPUTS = ("A_log", "a", "dt_bias", "q", "k", "v", "b", "initial_state_source")
_STEP = 1e-6


def gradients_agree(subject: Subject, spec: CaseSpec) -> None:
    """Directional derivatives of a random projection of the outputs, input by input.

    One direction per input: backward's inner product with it must equal the central difference along it. An
    error in any entry shows in a random direction with probability one.
    """
    kwargs = fresh(spec, device=subject.device)
    rows = offsets_of(spec)[-1]
    generator = torch.Generator().manual_seed(14)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.device)

    weight = draw(kwargs["v"])
    weight[:, rows:] = 0
    tracked = {name: kwargs[name].detach().clone().requires_grad_() for name in _INPUTS}
    loss = (_output(subject, {**kwargs, **tracked}) * weight).sum()
    if not loss.requires_grad:
        raise Violation("the output does not require grad although the inputs do")
    slopes = torch.autograd.grad(loss, list(tracked.values()), allow_unused=True)
    for (name, value), slope in zip(tracked.items(), slopes, strict=True):
        if slope is None:
            raise Violation(f"no gradient reaches {name}")
        direction = draw(value)
        ends = []
        for sign in (1, -1):
            moved = (value + sign * _STEP * direction).detach()
            with torch.no_grad():
                ends.append(float((_forward(subject, {**kwargs, name: moved}) * weight).sum()))
        expected = (ends[0] - ends[1]) / (2 * _STEP)
        given = float((slope * direction).sum())
        if not abs(given - expected) <= 1e-6 * (1 + abs(expected)):
            raise Violation(f"d/d{name} along a direction is {given:.9g}, finite differences give {expected:.9g}")


def _output(subject: Subject, kwargs: Kwargs) -> torch.Tensor:
    return subject.run(canonical_call(**kwargs))


def _forward(subject: Subject, kwargs: Kwargs) -> torch.Tensor:
    out = torch.zeros_like(kwargs["v"])
    return subject.run(canonical_call(**{**kwargs, "out": out}), poison=0.0)
