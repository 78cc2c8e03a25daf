"""C17: slots, rows and the strides of the buffer are independent of one another."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from ....conformance.check import Examination, check
from ....conformance.subject import Subject
from ..cases import FLOAT32
from .compare import Recipe, exact, judged
from .kwargs import Kwargs

__all__ = ["CHECKS"]

CHAIN = FLOAT32.but(name="chain", lengths=(5, 0, 8, 1), padded=(), verify="chain")
TREE = CHAIN.but(name="tree", verify="tree")
BUFFER = "intermediate_states_buffer"


@check("C17", "each index governs its own action: a row without a slot, a slot without a row, a strided buffer")
def independent_indices(subject: Subject) -> Iterator[Examination]:
    for spec in (CHAIN, TREE, CHAIN.but(name="kda, vk", is_kda=True, state_layout="vk")):
        yield f"{spec.name}, rows without slots", partial(_contained, subject, Recipe(spec, change=_no_slots))
        yield f"{spec.name}, slots without rows", partial(_contained, subject, Recipe(spec, change=_no_rows))
        yield f"{spec.name}, strided buffer", partial(_contained, subject, Recipe(spec, change=_strided_buffer))
    stateless = TREE.but(state_dtype=None)
    yield "rows without a pool", partial(_contained, subject, Recipe(stateless))


def _contained(subject: Subject, recipe: Recipe) -> float:
    """Within the bound, and nothing else is written."""
    trial = recipe.trial(subject)
    ref = exact(recipe, subject.chunk(trial.call))
    trial.run(subject)
    trial.check_untouched()
    return judged(trial.call, trial.out, ref)


def _without(kwargs: Kwargs, name: str) -> Kwargs:
    """The first and the last sequence's index negative."""
    index = kwargs[name].clone()
    index[[0, -1]] = -1
    return {**kwargs, name: index}


def _no_slots(kwargs: Kwargs) -> Kwargs:
    return _without(kwargs, "initial_state_indices")


def _no_rows(kwargs: Kwargs) -> Kwargs:
    return _without(kwargs, "intermediate_state_indices")


def _strided_buffer(kwargs: Kwargs) -> Kwargs:
    """Rows with more steps than the call may use."""
    buffer = kwargs[BUFFER]
    shape = (buffer.shape[0], buffer.shape[1] + 2, *buffer.shape[2:])
    wide = torch.full(shape, float("nan"), dtype=buffer.dtype, device=buffer.device)
    view = wide[:, : buffer.shape[1]]
    return {**kwargs, BUFFER: view.copy_(buffer)}


CHECKS = (independent_indices,)
