"""X1: the registry, and torch through it, run what was asked for; every config is correct; backends can take over from
one another.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ....backend import Backend, Chunked, Config, Runner
from ....conformance.check import BackendRaised, Examination, Violation, check
from ....conformance.subject import Subject
from ....core import Registry
from ..case import CaseSpec
from ..cases import BASE, FLOAT32
from .compare import Recipe, accurate, exact, near
from .kwargs import fresh, select_spans
from .safety import poisoned, untouched
from .torch_checks import operator_checks
from .trial import Results, Trial

__all__ = ["CHECKS"]

_SMALL = FLOAT32.but(name="small", lengths=(5, 0, 3), padded=(2,), extra_rows=1)
_LONG = BASE.but(name="chunks", lengths=(70, 3), padded=(), h=1, hv=2)


@check("X1", "the named backend runs, in every config, and can hand its state to any other")
def registry_checks(subject: Subject) -> Iterator[Examination]:
    yield "launch counter", partial(_launched, subject)
    if subject.backend.provenance not in ("torch", "external", "composite"):
        yield "no torch fallback inside", partial(_no_fallback, subject)
    yield from operator_checks(subject)
    if subject.config is None:
        for spec in (_SMALL, _LONG):
            for config in _configs(subject, spec):
                yield f"config {config.label}, {spec.name}", partial(_config, subject, config, spec)
    for peer in subject.peers:
        for spec in (
            FLOAT32.but(name="float32", lengths=(12, 6), padded=()),
            BASE.but(name="kda, vk", lengths=(12, 6), padded=(), is_kda=True, state_layout="vk"),
        ):
            other = Subject(peer, device=subject.device)
            yield f"state to {peer.name}, {spec.name}", partial(_handed_over, subject, other, spec)
            yield f"state from {peer.name}, {spec.name}", partial(_handed_over, other, subject, spec)


class _Counting(Backend):
    """Stands for the subject's backend in a registry of its own, counting launches."""

    def __init__(self, inner: Backend) -> None:
        self.inner = inner
        self.launches = 0
        for attribute in ("op", "name", "provenance", "tags", "priority"):
            setattr(self, attribute, getattr(inner, attribute))

    def check(self, problem: Any) -> Any:
        return self.inner.check(problem)

    def configs(self, problem: Any) -> Any:
        return self.inner.configs(problem)

    def bind(self, problem: Any, config: Config) -> Runner:
        runner = self.inner.bind(problem, config)

        def counted(call: Any) -> Any:
            self.launches += 1
            return runner(call)

        return counted


def _launched(subject: Subject) -> None:
    """Through the public op with ``backend=``: exactly one launch per call, of that backend."""
    kwargs = fresh(_SMALL, device=subject.device)
    subject.config_for(Trial(kwargs).call.problem())  # a decline is a decline
    from ..spec import SPEC

    counting = _Counting(subject.backend)
    registry = Registry({}, load_plugins=False)  # of its own: nothing else could run instead
    registry.register_op(SPEC)
    registry.register_backend(counting)
    op = registry.get(counting.op)
    for _ in range(2):
        try:
            op(**kwargs, backend=counting.name)
        except Exception as error:
            raise BackendRaised("run", error) from error
    if counting.launches != 2:
        raise Violation(f"two calls with backend={counting.name!r} launched it {counting.launches} times")


class _Arithmetic(TorchDispatchMode):
    """Notes the torch operators that do this op's arithmetic."""

    _NAMES = frozenset({"mm", "bmm", "addmm", "baddbmm", "exp", "exp2", "sigmoid", "softplus", "log1p", "mv"})

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in self._NAMES:
            self.seen.add(name)
        return func(*args, **(kwargs or {}))


def _no_fallback(subject: Subject) -> None:
    trial = Trial.of(_SMALL, device=subject.device)
    runner = subject.runner(trial.call.problem())
    with _Arithmetic() as arithmetic:
        try:
            runner(trial.call)
        except Exception as error:
            raise BackendRaised("run", error) from error
    if arithmetic.seen:
        used = ", ".join(sorted(arithmetic.seen))
        raise Violation(f"a backend written in {subject.backend.provenance} computes with torch's {used}")


def _configs(subject: Subject, spec: CaseSpec) -> tuple[Config, ...]:
    problem = Trial.of(spec).call.problem()
    return tuple(subject.backend.configs(problem)) if subject.verdict(problem) else ()


def _config(subject: Subject, config: Config, spec: CaseSpec) -> float:
    """N1, S1 and S2 under this config."""
    one = subject.with_config(config)
    poisoned(one, spec)
    untouched(one, spec)
    return accurate(one, Recipe(spec))


def _handed_over(first: Subject, second: Subject, spec: CaseSpec) -> float:
    """Half of every sequence on one backend, the rest on the other, one pool: within two bounds of the whole."""
    recipe = Recipe(spec)
    chunks = [chunk for chunk in (_chunk(first, recipe), _chunk(second, recipe)) if chunk is not None]
    chunks.sort(key=lambda chunk: (chunk.rounded, chunk.cut) if isinstance(chunk, Chunked) else (False, 0))
    ref = exact(recipe, chunks[-1] if chunks else None)  # the wider bound of the two
    kwargs = fresh(spec, device=first.device)
    heads = [(n, 0, length // 2) for n, length in enumerate(spec.lengths)]
    tails = [(n, length // 2, length) for n, length in enumerate(spec.lengths)]
    start = Trial(select_spans(kwargs, spec, heads)).run(first)
    end = Trial(select_spans(kwargs, spec, tails)).run(second)
    parts: list[torch.Tensor] = []
    for x, y in zip(torch.split(start.o, _lengths(heads)), torch.split(end.o, _lengths(tails)), strict=True):
        parts += [x, y]
    whole = _rounded(ref, end)
    return near(Results(torch.cat(parts), end.states, end.steps), whole, ref, 2.0)


def _chunk(subject: Subject, recipe: Recipe) -> int | Chunked | None:
    return subject.chunk(recipe.trial(subject).call)


def _lengths(spans: list[tuple[int, int, int]]) -> list[int]:
    return [last - first for _, first, last in spans]


def _rounded(ref: Any, like: Results) -> Results:
    """The reference's results in the dtypes of ``like``."""
    states = tuple(None if s is None else ref.state[n].to(s.dtype) for n, s in enumerate(like.states))
    return Results(ref.o.to(like.o.dtype), states, like.steps)


CHECKS = (registry_checks,)
