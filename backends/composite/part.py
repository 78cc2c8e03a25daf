"""Part: which backend runs one side of a batch, and with which config, written as one word of a composite's config."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

from ...registry.backend import Backend, Config, works_in_chunks
from ...registry.decision import Accepted
from ...registry.plugins import checked

__all__ = ["Part", "capable", "may_run_beside"]


@dataclass(frozen=True, slots=True)
class Part:
    """``backend[label]``: a backend's name and the label of one of its configs.

    An empty label stands for the backend's own default, which may differ from batch to batch.
    """

    backend: str
    label: str = ""

    def __str__(self) -> str:
        return f"{self.backend}[{self.label}]" if self.label else self.backend

    @classmethod
    def parse(cls, text: str) -> Self:
        """The inverse of ``str``."""
        backend, _, rest = text.partition("[")
        return cls(backend, rest.removesuffix("]"))

    @classmethod
    def of(cls, backend: Backend, config: Config) -> Self:
        """``backend`` as it runs ``config``. Of a chunked one the config is named: its chunk is part of a promise."""
        return cls(backend.name, config.label if works_in_chunks(backend) else "")


def capable(backends: Iterable[Backend], problem: Any) -> list[Backend]:
    """Those that accept ``problem``, in heuristic order.

    Only repeatable ones, because the whole promises to be.
    """
    able = (b for b in backends if "repeatable" in b.tags and isinstance(checked(b, problem), Accepted))
    return sorted(able, key=lambda b: (-b.rank(problem), b.name))


def may_run_beside(backend: Backend) -> bool:
    """Whether it may run on a stream beside another part: it writes no state but those it is to store.

    On a GPU torch's operations give a slot that nobody stores its value back, which has changed by then.
    """
    return backend.provenance != "torch"
