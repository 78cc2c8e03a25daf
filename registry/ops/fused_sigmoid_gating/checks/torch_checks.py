"""The backend under torch: its operator obeys its schema, and ``torch.compile`` changes nothing. Part of X1."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, ClassVar

import torch
from torch.testing._internal.optests.generate_tests import OpCheckError
from torch.utils._python_dispatch import TorchDispatchMode

from ....backend import Backend, Config, Runner
from ....conformance.check import BackendRaised, Examination, Violation
from ....conformance.subject import Subject
from ....core import Registry
from ....decision import RejectCode, Verdict
from ..call import Call
from ..case import CaseSpec
from ..cases import BASE
from ..torch_op import serving, traced
from .compare import Recipe, accurate
from .kwargs import Kwargs, fresh
from .safety import untouched
from .trial import Trial

__all__ = ["operator_checks"]

#: Without rows beyond the last offset: nobody writes those, and opcheck compares all outputs of two runs.
_SMALL = BASE.but(lengths=(3, 0, 2), h=1, hv=2, k=16, v=8, padded=(2,))
_OPERATOR_CASES = (
    _SMALL.but(name="in place"),
    _SMALL.but(name="tree, separate slots, kda", verify="tree", update="separate", is_kda=True),
    _SMALL.but(name="read only", update="disabled"),
    _SMALL.but(name="batch, no pool", varlen=False, lengths=(2, 2), padded=(), state_dtype=None),
)


def operator_checks(subject: Subject) -> Iterator[Examination]:
    """``opcheck``, then accuracy and untouched memory through ``torch.compile``."""
    for spec in _OPERATOR_CASES:
        yield f"opcheck, {spec.name}", partial(_opcheck, subject, spec)
    for dynamic in (False, True):
        shapes = "dynamic" if dynamic else "static"
        yield f"torch.compile, {shapes} shapes", partial(_compiled, subject, dynamic)


class _Noted(TorchDispatchMode):
    """Notes the operators that are called, and runs none."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[tuple[Any, tuple[Any, ...], Kwargs]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args, dict(kwargs or {})))
        return torch.empty(0)


@contextmanager
def _op_of(backend: Backend) -> Iterator[None]:
    """Within the block torch's operators run this backend, through an op of a registry of its own."""
    from ..spec import SPEC

    registry = Registry({}, load_plugins=False)
    registry.register_op(SPEC)
    registry.register_backend(backend)
    with serving(registry.get(SPEC.name)):
        yield


def _opcheck(subject: Subject, spec: CaseSpec) -> None:
    kwargs = fresh(spec, device=subject.device)
    subject.config_for(Trial(kwargs).call.problem())  # a decline is a decline
    operator, args, options = _operator(kwargs, subject.backend.name)
    with _op_of(subject.backend):
        try:
            torch.library.opcheck(operator, args, options)
        except OpCheckError as error:
            cause = error.__cause__ or error
            raise Violation(f"opcheck: {cause}", code=RejectCode.RAISED) from error
        except Exception as error:
            raise BackendRaised("run", error) from error


def _operator(kwargs: Kwargs, backend: str) -> tuple[Any, tuple[Any, ...], Kwargs]:
    """The operator that a call takes, with its arguments."""
    noted = _Noted()
    with noted:
        _traced(kwargs, backend)
    return noted.calls[-1]


def _compiled(subject: Subject, dynamic: bool) -> float:
    """Two shapes, so that the second meets what the first left: accurate, and nothing else is written."""
    torch.compiler.reset()  # every backend compiles the same functions; what they left counts towards a limit
    compiled = Subject(_Compiled(subject, dynamic), subject.config, device=subject.device)
    worst = 0.0
    with _op_of(subject.backend):
        for lengths in ((3, 0, 2), (5, 4, 1, 2)):
            spec = _SMALL.but(name=f"{lengths}", lengths=lengths, extra_rows=1)
            worst = max(worst, accurate(compiled, Recipe(spec)))
            untouched(compiled, spec)
    return worst


class _Compiled(Backend):
    """The backend as a compiled function sees it; to the suite, a backend like any other."""

    op: ClassVar[str] = "fused_sigmoid_gating"
    name: ClassVar[str] = "compiled"
    provenance: ClassVar[str] = "torch"

    def __init__(self, subject: Subject, dynamic: bool) -> None:
        self._inner = subject.backend
        self.accuracy = subject.backend.accuracy  # type: ignore[misc]
        self._run = torch.compile(_traced, fullgraph=True, dynamic=dynamic, backend="aot_eager")

    def check(self, problem: Any) -> Verdict:
        return self._inner.check(problem)

    def configs(self, problem: Any) -> Any:
        return self._inner.configs(problem)

    def bind(self, problem: Any, config: Config) -> Runner:
        name = self._inner.name

        def run(call: Call) -> torch.Tensor:
            result: torch.Tensor = self._run(_arguments(call), name)
            return result

        return run


def _traced(kwargs: Kwargs, backend: str | None) -> torch.Tensor:
    """The call as an operator: what the op's ``__call__`` does under tracing, for the registry being served."""
    absent = dict.fromkeys(
        "initial_state_source initial_state_indices cu_seqlens intermediate_states_buffer intermediate_state_indices "
        "retrieve_parent_token output_state_indices out".split()
    )
    return traced(**{**absent, "disable_state_update": False, **kwargs}, backend=backend)


def _arguments(call: Call) -> Kwargs:
    """The public arguments of a canonical call."""
    return {
        "A_log": call.A_log,
        "a": call.a,
        "dt_bias": call.dt_bias,
        "softplus_beta": call.softplus_beta,
        "softplus_threshold": call.softplus_threshold,
        "q": call.q,
        "k": call.k,
        "v": call.v,
        "b": call.b,
        "initial_state_source": call.pool,
        "initial_state_indices": call.read_slots,
        "scale": call.scale,
        "use_qk_l2norm_in_kernel": call.use_qk_l2norm,
        "cu_seqlens": call.cu_seqlens,
        "state_layout": call.state_layout,
        "is_kda": call.is_kda,
        "lower_bound": call.lower_bound,
        "allow_neg_eigval": call.allow_neg_eigval,
        "disable_state_update": call.update == "disabled",
        "intermediate_states_buffer": call.intermediates,
        "intermediate_state_indices": call.intermediate_rows,
        "retrieve_parent_token": call.parents,
        "output_state_indices": call.write_slots if call.update == "separate" else None,
        "out": call.out,
    }
