"""Arguments of other libraries' functions that isokern does not serve: refused, never ignored."""

from __future__ import annotations

from typing import Any

from ..errors import ArgumentTypeError, ArgumentValueError

__all__ = ["refuse", "refuse_unknown"]


def refuse(why: str, **given: Any) -> None:
    """Raise ArgumentValueError for each of ``given`` that is neither None nor False; ``why`` is a hint."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ArgumentValueError(name, "its default", type(value).__name__ if value is not True else "True", why)


def refuse_unknown(function: str, given: dict[str, Any]) -> None:
    """Raise ArgumentTypeError for keyword arguments that nothing here reads, as the original's may hold."""
    for name, value in given.items():
        raise ArgumentTypeError(name, f"no such argument of {function} here", type(value).__name__)
