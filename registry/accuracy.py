"""The accuracy policy: whether backends that round the operands of products may be chosen unasked.

Under ``"float32"``, the default, they run where they are named and nowhere else; under ``"rounded"`` the choice, and
the tuner's, is among backends of every class. A problem carries the policy that it was met under, so that nothing
decided, bound or tuned under one is ever found under the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, get_args

from ..errors import ArgumentValueError

if TYPE_CHECKING:
    from .backend import Backend

__all__ = ["ACCURACIES", "DEFAULT", "Accuracy", "admits", "policy_of", "require"]

Accuracy = Literal["float32", "rounded"]

ACCURACIES: tuple[Accuracy, ...] = get_args(Accuracy)
DEFAULT: Accuracy = "float32"


def require(argument: str, value: str) -> Accuracy:
    """``value``, if it is a policy. Raises ArgumentValueError, which names what is allowed, if not."""
    for known in ACCURACIES:
        if value == known:
            return known
    raise ArgumentValueError(argument, " or ".join(map(repr, ACCURACIES)), repr(value))


def policy_of(problem: Any) -> Accuracy:
    """The policy that ``problem`` carries; the default for problems of ops that know none."""
    policy: Accuracy = getattr(problem, "accuracy", DEFAULT)
    return policy


def admits(policy: Accuracy, backend: Backend) -> bool:
    """Whether ``backend`` may be chosen under ``policy`` without being named."""
    return policy == "rounded" or backend.accuracy != "rounded"
