"""The registry: ops by name, their interchangeable backends, and the choice among them.

    from isokern import registry
    op = registry.get("fused_sigmoid_gating")

Importing it imports neither torch, triton, cupy nor numba, and initialises no CUDA.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from ..errors import UnknownNameError
from .agreement import Agreement, DisagreementError
from .agreement import agree as _agree
from .backend import Backend, Config, Pinnable, Pinned, Runner
from .core import Registry
from .decision import Accepted, Decision, Outcome, RejectCode, Rejected, Rule, Verdict
from .overrides import use as _use
from .plugins import FunctionBackend
from .spec import OpSpec

__all__ = [
    "Accepted",
    "Agreement",
    "Backend",
    "Config",
    "Decision",
    "DisagreementError",
    "FunctionBackend",
    "OpSpec",
    "Outcome",
    "Pinnable",
    "Pinned",
    "Registry",
    "RejectCode",
    "Rejected",
    "Rule",
    "Runner",
    "Verdict",
    "agree",
    "backend",
    "backends",
    "default",
    "get",
    "names",
    "pin",
    "refresh",
    "register_backend",
    "register_op",
    "spec",
    "unregister_backend",
    "use",
    "use_store",
]

#: The process-wide registry behind the functions of this module.
default = Registry()

names = default.names
get = default.get
spec = default.spec
backends = default.backends
backend = default.backend
register_backend = default.register_backend
unregister_backend = default.unregister_backend
register_op = default.register_op
use_store = default.use_store
pin = default.pin
refresh = default.refresh


def use(op: str, backend: str | None = None, *, accuracy: str | None = None) -> AbstractContextManager[None]:
    """Context manager: within the block ``op`` runs on ``backend``, or the call raises; and chooses under ``accuracy``.

    Args:
        backend: None leaves the choice as it is outside of the block.
        accuracy: ``"rounded"``: backends that round operands of products to bfloat16 may be chosen, too, by what was
            tuned under this policy or by the heuristic order; ``"float32"``: they may not. None: as outside of the
            block, where ``ISOKERN_ACCURACY_<OP>`` decides, and without that ``"float32"``.

    Raises:
        UnknownNameError: on entry, when the op or the backend is not registered.
        ArgumentValueError: there is no such policy. ArgumentTypeError: neither is given.
    """
    known = default.backends(op)
    if backend is not None and backend not in known:
        raise UnknownNameError("backend", backend, known)
    return _use(op, backend, accuracy=accuracy)


def agree(process_group: Any = None, device: str | None = None) -> Agreement:
    """Make all ranks of a job choose alike; see :func:`registry.agreement.agree`. Collective: every rank calls it."""
    return _agree(default, process_group, device)
