"""Arguments of other libraries' functions: refused where isokern does not serve them, never ignored, and called in
errors what the caller calls them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

from ..errors import ArgumentError, ArgumentTypeError, ArgumentValueError

__all__ = ["refuse", "refuse_choice", "refuse_unknown", "rethrow"]


def refuse(why: str, **given: Any) -> None:
    """Raise ArgumentValueError for each of ``given`` that is neither None nor False; ``why`` is a hint."""
    for name, value in given.items():
        if value is not None and value is not False:
            raise ArgumentValueError(name, "its default", type(value).__name__ if value is not True else "True", why)


def refuse_choice(why: str, **given: Any) -> None:
    """Raise ArgumentValueError for each of ``given`` that chooses something: neither ``"auto"`` nor None."""
    for name, value in given.items():
        if value is not None and not (isinstance(value, str) and value == "auto"):
            shown = repr(value) if isinstance(value, (str, bool)) else type(value).__name__
            raise ArgumentValueError(name, "'auto'", shown, why)


def refuse_unknown(function: str, given: dict[str, Any]) -> None:
    """Raise ArgumentTypeError for keyword arguments that nothing here reads, as the original's may hold."""
    for name, value in given.items():
        raise ArgumentTypeError(name, f"no such argument of {function} here", type(value).__name__)


def rethrow(error: ArgumentError, names: Mapping[str, str]) -> NoReturn:
    """Raise ``error`` by the caller's name of the argument: ``names`` has it by the op's, where the two differ."""
    name = names.get(error.argument)
    if name is None:
        raise error
    raise type(error)(name, error.expected, error.given, error.hint) from error
