"""The op's registration: contract, input generator, reference, tolerances, cases, checks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from ...spec import OpSpec
from .call import TENSORS
from .contract import CONTRACT_VERSION
from .inputs import make_inputs
from .judge import judge
from .op import FusedSigmoidGating
from .reference import reference
from .validate import canonical_call
from .validate_values import check_values

if TYPE_CHECKING:
    from .call import Call
    from .problem import Problem

__all__ = ["SPEC"]


def _problem(call: Call, mode: str | None) -> Problem:
    return call.problem(mode)


def _allocate(call: Call) -> torch.Tensor:
    return torch.empty(call.v.shape, dtype=call.q.dtype, device=call.q.device)


def _cases() -> Mapping[str, Sequence[Any]]:
    from .cases import CASES

    return CASES


def _checks() -> Sequence[Any]:
    from .checks import CHECKS

    return CHECKS


def _error_inputs() -> Sequence[Any]:
    from .error_inputs import ERROR_INPUTS

    return ERROR_INPUTS


SPEC = OpSpec(
    name="fused_sigmoid_gating",
    contract_version=CONTRACT_VERSION,
    summary="fused sigmoid-gated delta rule (GDN, KDA) with varlen, state pool and verification",
    reference_backend="torch_reference",
    make_op=FusedSigmoidGating,
    canonical=canonical_call,
    check_values=check_values,
    problem=_problem,
    allocate=_allocate,
    make_inputs=make_inputs,
    reference=reference,
    judge=judge,
    cases=_cases,
    checks=_checks,
    error_inputs=_error_inputs,
    tensors=tuple(TENSORS),
)
