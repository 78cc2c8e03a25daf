"""Stage ``properties``: what one launch beside a reference does not show. The table of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

from ...registry.backend import Backend
from . import examine, far, streams
from .calls import NotApplicableError
from .cases import ODD_SIZES
from .task import Outcome, Result

__all__ = ["PROPERTIES", "examine_property"]

#: A property's name to what yields a sentence for each violation of it; the longest first.
PROPERTIES: dict[str, Callable[[Backend], Iterator[str]]] = {
    **{f"K={k} V={v}": partial(examine.odd_size, k=k, v=v) for k, v in ODD_SIZES},
    "repeatable while other streams are busy": streams.repeatable_under_load,
    "graph replay on changed contents": examine.replayed,
    "8 captured layers sharing lengths and slots": examine.layers,
    "pool of more than 2**31 elements": far.pool,
    "intermediate states beyond 2**31 elements": far.intermediates,
    "token rows beyond 2**31 elements": far.rows,
    "70000 sequences": far.many_sequences,
    "two threads on two streams": streams.two_threads,
    "pinned runner": examine.pinned,
}


def examine_property(backend: Backend, name: str) -> Result:
    """Passed if the property yields nothing."""
    try:
        return Result.of(list(PROPERTIES[name](backend)))
    except NotApplicableError as reason:
        return Result(Outcome.SKIPPED, note=str(reason))
