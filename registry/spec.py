"""OpSpec: everything an op must bring to be registered. Kernels are not part of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from ..errors import RegistrationError

if TYPE_CHECKING:
    from .dispatch import Dispatcher

__all__ = ["OpSpec"]


@dataclass(frozen=True, slots=True)
class OpSpec:
    """An op: a name, a contract, and what is needed to judge and tune any implementation of it.

    Attributes:
        name: the op's name, as in ``registry.get(name)``.
        contract_version: changes whenever the meaning of a call does; stored results of other versions are misses.
        summary: one line for humans.
        reference_backend: the backend that is the last resort, able to do whatever the contract allows.
        make_op: builds the callable users get, on top of a dispatcher.
        canonical: the public arguments to the op's canonical call; raises ArgumentError.
        check_values: the checks that read device memory (``validate="full"``).
        problem: (canonical call, launch mode or None) to the op's frozen problem record.
        allocate: canonical call to an uninitialised output tensor.
        make_inputs: (case, seed, device) to made-up inputs, the input generator.
        reference: (canonical call, ...) to exact results with error bounds.
        judge: (canonical call after a run, output, reference) to a judgement: the tolerances.
        cases: named lists of cases shared by tests, gate and benchmarks.
        checks: the op's conformance checks.
        error_inputs: calls that must be refused.
        tensors: names of a canonical call's tensors, in the order that a pinned runner takes them; ``out`` among them.
    """

    name: str
    contract_version: int
    summary: str
    reference_backend: str
    make_op: Callable[[Dispatcher], Any]
    canonical: Callable[..., Any]
    check_values: Callable[[Any], None]
    problem: Callable[[Any, str | None], Any]
    allocate: Callable[[Any], Any]
    make_inputs: Callable[..., Any]
    reference: Callable[..., Any]
    judge: Callable[..., Any]
    cases: Callable[[], Mapping[str, Sequence[Any]]]
    checks: Callable[[], Sequence[Any]]
    error_inputs: Callable[[], Sequence[Any]]
    tensors: Sequence[str]

    def __post_init__(self) -> None:
        for field in fields(self):
            if getattr(self, field.name) is None:
                raise RegistrationError(f"op {self.name!r} lacks {field.name}")
        if not self.name.isidentifier():
            raise RegistrationError(f"op name must be an identifier, given {self.name!r}")
