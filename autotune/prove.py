"""The proof: a fresh process opens the store and calls the op; what it dispatches must be what was tuned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..cache.entry import Entry
from ..cache.layer import Layer
from ..cache.store import Store
from ..registry.core import Registry
from ..registry.decision import Rule
from ..registry.overrides import use
from .recipe import Origin, ProblemRecipe, find_backend, origin_of
from .worker import CandidateFailure, Worker

__all__ = ["Proof", "demonstrate", "prove"]

_TUNED = (Rule.TUNED_USER, Rule.TUNED_SITE, Rule.TUNED_SHIPPED)


@dataclass(frozen=True, slots=True)
class Proof:
    """What a fresh process did with one problem.

    Attributes:
        problem: the case's name. expected: ``backend[config]`` that was tuned. dispatched: what ran; "" if nothing did.
        rule: the rule of its decision. error: why this is no proof; "" if it is one.
    """

    problem: str
    expected: str
    dispatched: str
    rule: str
    error: str = ""

    @property
    def ok(self) -> bool:
        return not self.error


def prove(
    store: Store,
    registry: Registry,
    tuned: Sequence[tuple[ProblemRecipe, Entry]],
    *,
    device: str = "cpu",
    threads: int = 1,
    worker: Worker | None = None,
) -> list[Proof]:
    """Have one fresh process call the op on each problem, with ``store``'s directories as its store.

    Entries that could only be kept in memory fail, as no other process can see them.

    Args:
        worker: one that has been asked for nothing yet, for a device and threads of its own; ended here. None: a new
            one, for ``device`` and ``threads``.

    Raises:
        WorkerError: no process can be started.
    """
    layers = [{"name": x.name, "root": str(x.root), "writable": x.writable} for x in store.layers]
    proofs = []
    with worker or Worker(device, threads) as fresh:
        for recipe, entry in tuned:
            origins = {name: origin_of(backend) for name, backend in registry.backends(recipe.op).items()}
            where = {name: origin.to_dict() for name, origin in origins.items() if origin}
            arguments = {"problem": recipe.to_dict(), "layers": layers, "origins": where}
            try:
                seen = fresh.request("prove", fresh.limits.gate, **arguments)
            except CandidateFailure as failure:
                proofs.append(Proof(recipe.case.name, entry.label, "", "", str(failure)))
            else:
                proofs.append(_judge(recipe.case.name, entry, seen))
    return proofs


def _judge(problem: str, entry: Entry, seen: Mapping[str, Any]) -> Proof:
    error = ""
    if seen["rule"] not in {rule.value for rule in _TUNED}:
        error = f"decided by rule {seen['rule']!r}, not by the store: {seen['detail']}"
    elif (seen["backend"], seen["config"]) != (entry.backend, entry.config):
        error = f"dispatches {seen['label']}, tuned was {entry.label}"
    return Proof(problem, entry.label, seen["label"], seen["rule"], error)


def demonstrate(registry: Registry, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """In the fresh process: look tuned choices up in the given layers, call the op, say what it decided by.

    Problems of graphs are called inside one that is captured, and replayed.
    """
    recipe = ProblemRecipe.from_dict(arguments["problem"])
    for name, origin in arguments["origins"].items():
        find_backend(registry, recipe.op, name, Origin(**origin))
    registry.use_store(Store([Layer(x["name"], Path(x["root"]), x["writable"]) for x in arguments["layers"]]))
    inputs = registry.spec(recipe.op).make_inputs(recipe.case, recipe.seed, recipe.device)
    op = registry.get(recipe.op)
    with use(recipe.op, accuracy=recipe.accuracy):  # whatever the environment says
        if recipe.mode == "graph":
            from .measure_cuda import captured

            op.prepare(**inputs.kwargs)
            captured(lambda: op(**inputs.kwargs)).replay()
        else:
            op(**inputs.kwargs)
    # One entry per launch mode: use_store has dropped what was bound before.
    found = registry.dispatcher(recipe.op).bound.items()
    [bound] = [bound for (problem, _), bound in found if getattr(problem, "mode", recipe.mode) == recipe.mode]
    decision = bound.decision
    label = f"{decision.backend}[{','.join(f'{k}={v}' for k, v in sorted(decision.config.items())) or 'default'}]"
    return {
        "backend": decision.backend,
        "config": decision.config,
        "rule": decision.rule.value,
        "detail": "; ".join((decision.detail, *decision.notes)),
        "label": label,
    }
