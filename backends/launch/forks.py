"""Fork: CUDA does not survive it. A child of a process that loaded kernels must be told, before the driver crashes."""

from __future__ import annotations

import os
from functools import lru_cache

from ...errors import ForkedProcessError

__all__ = ["error", "process", "watch"]


class _Process:
    """What is known of the process. ``forked``: it is the child of one that called :func:`watch`."""

    __slots__ = ("forked",)

    def __init__(self) -> None:
        self.forked = False


#: The one process this is: a flag that fork's own hook sets, so that no call asks for its process id.
process = _Process()


def _in_child() -> None:
    process.forked = True


@lru_cache(maxsize=1)
def watch() -> None:
    """Mark children forked from now on."""
    os.register_at_fork(after_in_child=_in_child)


def error(op: str) -> ForkedProcessError:
    """What a launch in such a child raises."""
    return ForkedProcessError(op, "CUDA kernels had been loaded", "start workers with the 'spawn' method")
