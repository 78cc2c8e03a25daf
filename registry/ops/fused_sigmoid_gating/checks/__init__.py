"""The op's conformance checks: N numerics, M metamorphic relations, S memory safety, C contract, X registry."""

from __future__ import annotations

from ....conformance.check import Check
from . import (
    accuracy,
    contract,
    far,
    indices,
    packing,
    registry_checks,
    safety,
    slots,
    threads,
    transforms,
    verification,
)

__all__ = ["CHECKS"]


def _place(check: Check) -> tuple[int, int, str]:
    """N, M, S, C, X; by number within each."""
    digits = "".join(c for c in check.id if c.isdigit())
    return "NMSCX".index(check.id[0]), int(digits), check.id


#: Every check of the op, in the order of reports.
CHECKS: tuple[Check, ...] = tuple(
    sorted(
        (
            *accuracy.CHECKS,
            *packing.CHECKS,
            *transforms.CHECKS,
            *safety.CHECKS,
            *threads.CHECKS,
            *far.CHECKS,
            *verification.CHECKS,
            *slots.CHECKS,
            *contract.CHECKS,
            *indices.CHECKS,
            *registry_checks.CHECKS,
        ),
        key=_place,
    )
)
