"""S5: threads, their number, and calls beside one another."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch

from ....conformance.check import BackendRaised, Examination, Needs, Violation, check
from ....conformance.subject import Subject
from ..case import CaseSpec
from ..cases import BASE, FLOAT32
from .compare import Recipe, exact, same
from .trial import Results, Trial

__all__ = ["CHECKS", "thread_count"]


@check("S5", "threads, their number and calls beside one another change no bit", needs=Needs.CPU, relaxable=True)
def threads(subject: Subject) -> Iterator[Examination]:
    wide = FLOAT32.but(name="wide", lengths=(1,) * 24, padded=(), hv=8)
    for spec in (FLOAT32.but(name="float32"), wide, BASE.but(name="kda", is_kda=True)):
        yield f"{spec.name}, 1 to 4 threads", partial(_any_threads, subject, spec)
        yield f"{spec.name}, two calls at once", partial(_at_once, subject, spec)


def _any_threads(subject: Subject, spec: CaseSpec) -> float | None:
    results = []
    for count in (1, 2, 4):
        with thread_count(subject, count):
            results.append(Trial.of(spec, device=subject.device).run(subject))
    worst = None
    for other in results[1:]:
        worst = _same_as(subject, spec, other, results[0]) or worst
    return worst


@contextmanager
def thread_count(subject: Subject, count: int) -> Iterator[None]:
    """Run torch, and numba where the backend needs it, on ``count`` threads (numba: at most as many as it runs now)."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        if "numba" in subject.backend.requires:
            import numba

            held = numba.get_num_threads()
            numba.set_num_threads(min(count, held))
            try:
                yield
            finally:
                numba.set_num_threads(held)
        else:
            yield
    finally:
        torch.set_num_threads(before)


def _at_once(subject: Subject, spec: CaseSpec) -> float | None:
    """Two Python threads, each with a call of its own, must not see each other."""
    seeds = (0, 1)
    alone = [Trial.of(spec, seed, subject.device).run(subject) for seed in seeds]
    trials = [[Trial.of(spec, seed, subject.device) for _ in range(4)] for seed in seeds]
    got: list[list[Results]] = [[], []]
    raised: list[BackendRaised | Violation] = []
    together = threading.Barrier(len(seeds))

    def work(which: int) -> None:
        together.wait()
        try:
            for trial in trials[which]:
                got[which].append(trial.run(subject))
        except (BackendRaised, Violation) as error:
            raised.append(error)

    workers = [threading.Thread(target=work, args=(which,)) for which in range(len(seeds))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if raised:
        raise raised[0]
    worst = None
    for which, want in enumerate(alone):
        for one in got[which]:
            worst = _same_as(subject, spec, one, want, seeds[which]) or worst
    return worst


def _same_as(subject: Subject, spec: CaseSpec, got: Results, want: Results, seed: int = 0) -> float | None:
    recipe = Recipe(spec, seed)
    return same(subject, "S5", got, want, lambda: exact(recipe, subject.chunk(recipe.trial(subject).call)))


@check("S5E", "no schedule of the kernel's threads changes a bit", needs=Needs.ENGINE, relaxable=True)
def schedules(subject: Subject) -> Iterator[Examination]:
    for spec in (FLOAT32.but(name="float32"), BASE.but(name="kda", is_kda=True)):
        yield spec.name, partial(_any_schedule, subject, spec)


def _any_schedule(subject: Subject, spec: CaseSpec) -> float | None:
    assert subject.engine is not None
    recipe = Recipe(spec)
    trial = recipe.trial(subject)
    want = trial.run(subject)
    for name, active in subject.engine.schedules():
        with active():
            got = Trial.of(spec, device=subject.device).run(subject)
        try:
            same(subject, "S5E", got, want, lambda: exact(recipe, subject.chunk(trial.call)))
        except Violation as violation:
            raise Violation(f"schedule {name}: {violation}") from None
    return None


CHECKS = (
    threads,
    schedules,
)
