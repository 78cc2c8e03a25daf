"""The error bound that a batch of several backends is held to, and who may run a part of it without breaking that.

There is one for all sequences, whoever runs them: that of the widest part. Evaluations token by token are within any.
"""

from __future__ import annotations

from typing import Any

from ...registry.backend import Backend, Chunked, Config, works_in_chunks

__all__ = ["bound_of", "common", "config_within", "covers"]


def bound_of(backend: Backend, config: Config) -> Chunked:
    """What results of ``backend`` are held to; chunks of 0 tokens where it works token by token."""
    if not works_in_chunks(backend):
        return Chunked(0)
    cut = int(config["cut"]) if backend.cuts else 0
    return Chunked(int(config["chunk"]), backend.accuracy == "rounded", cut)


def common(*parts: Chunked) -> Chunked | None:
    """The bound that covers all of ``parts``; None where there is none."""
    widest = Chunked(max(p.tokens for p in parts), any(p.rounded for p in parts), max(p.cut for p in parts))
    return widest if all(covers(widest, part) for part in parts) else None


def covers(whole: Chunked, part: Chunked) -> bool:
    """Whether what is within the bound of ``part`` is within that of ``whole``.

    Sums of shorter chunks are more exact. But shorter chunks round the state's way more often, and so do shorter
    segments; sequences cut elsewhere err elsewhere. So a part that rounds or cuts has the chunk and the cut of the
    whole. A sequence that is not cut is within the bound of one that is (``segments.py`` of the op).
    """
    if (part.rounded and not whole.rounded) or part.cut not in (0, whole.cut):
        return False
    return part.tokens == whole.tokens if part.rounded or part.cut else part.tokens <= whole.tokens


def config_within(bound: Chunked, backend: Backend, label: str, problem: Any, expected: Any) -> Config | None:
    """The config of ``backend`` for ``problem``: the one called ``label``, else the first that ``bound`` covers.

    Args:
        label: may name a config that is not offered for this problem: for a shorter batch, say.
        expected: the problem that the label was offered for. What cuts sequences cuts them to fill the chip, so a
            batch of other lengths is offered other cuts, which the bound is not made for: it takes those of this one.

    Returns:
        None where no config suits: every chunk is longer, or every cut another.
    """
    offered = [*backend.configs(problem), *(backend.configs(expected) if backend.cuts else ())]
    suiting = [config for config in offered if covers(bound, bound_of(backend, config))]
    for config in suiting:
        if config.label == label:
            return config
    return suiting[0] if suiting else None
