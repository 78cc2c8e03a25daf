"""The op's conformance checks: N numerics, M metamorphic relations, S memory safety, C contract, X registry."""

from __future__ import annotations

from ....conformance.check import Check
from . import accuracy, contract, indices, metamorphic, registry_checks, safety

__all__ = ["CHECKS"]

#: Every check of the op, in the order of reports.
CHECKS: tuple[Check, ...] = (
    *accuracy.CHECKS,
    *metamorphic.CHECKS,
    *safety.CHECKS,
    *contract.CHECKS,
    *indices.CHECKS,
    *registry_checks.CHECKS,
)
