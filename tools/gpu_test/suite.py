"""Stage ``suite``: one check of the op's conformance suite."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ...registry.backend import Backend
from ...registry.conformance.check import Tier
from ...registry.conformance.runner import run_checks
from ...registry.spec import OpSpec
from .task import Outcome, Result

__all__ = ["check_ids", "run_check"]

#: Where nothing is known about times: these are long, and a process that starts one last keeps all others waiting.
_LONG = ("X1", "C11", "C12", "N5", "M12")


def check_ids(spec: OpSpec) -> list[str]:
    """The checks of every run, the longest first."""
    ids = [check.id for check in spec.checks() if check.tier is Tier.FAST]
    return sorted(ids, key=lambda name: name not in _LONG)


def run_check(spec: OpSpec, backend: Backend, check: str, peers: Sequence[Backend]) -> Result:
    """One check with the default config of every problem, on the GPU."""
    report = run_checks(spec, backend, only=[check], device="cuda", peers=peers)
    counts = Counter(finding.status.value for finding in report.findings)
    faults = tuple(f"{f.case}: {f.message}" for f in report.failures)
    if not report.findings:
        why = "; ".join(skipped.why for skipped in report.skipped)
        return Result(Outcome.SKIPPED, note=why)
    if report.undeclared:  # and not among the backend's reasoned exceptions: the check examined nothing
        faults = (*faults, "every case is declined")
    return Result(Outcome.FAIL if faults else Outcome.PASS, faults, counts)
