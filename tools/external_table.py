"""The tables of docs/external.md: what each adapter calls, takes and declines, from the adapters themselves."""

from __future__ import annotations

from isokern.backends.external.adapter import Adapter
from isokern.registry import backends

__all__ = ["adapters", "external"]


def adapters() -> tuple[Adapter, ...]:
    """The registered ones, in their order."""
    return tuple(b for b in backends("fused_sigmoid_gating").values() if isinstance(b, Adapter))


def external() -> str:
    """A table of what is called, then a list of limits for each adapter."""
    rows = [["backend", "library", "versions", "function"], ["---"] * 4]
    for adapter in adapters():
        library = adapter.library
        function = f"`{library.module}.{library.function}`"
        rows.append([f"`{adapter.name}`", library.title, f"`{library.distribution}{adapter.versions}`", function])
    text = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    for adapter in adapters():
        text += f"\n`{adapter.name}` ({adapter.note}) declines:\n\n"
        text += "".join(f"- {limit.code.value}: {limit.reason}\n" for limit in adapter.limits)
    return text
