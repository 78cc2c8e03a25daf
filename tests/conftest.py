"""Shared by all tests: one thread for tiny tensors, and the conformance table at the end of a run."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from isokern.registry.conformance.report import Report, table

# The tensors are small: handing them to several threads costs more than it brings, above all on a busy machine.
# Tests about threads set their own number.
torch.set_num_threads(1)

REPORTS = pytest.StashKey[dict[str, list[Report]]]()


@pytest.fixture
def conformance(request) -> dict[str, list[Report]]:
    """Reports of single checks by backend; their sum is printed when all tests are done."""
    return request.config.stash.setdefault(REPORTS, {})


def pytest_terminal_summary(terminalreporter, config):
    """Print backend x check: every pass, decline and failure of the run, with the worst ratio to the error bound."""
    collected = config.stash.get(REPORTS, {})
    if not collected:
        return
    whole = [
        Report(
            op=parts[0].op,
            backend=backend,
            config=parts[0].config,
            findings=tuple(f for part in parts for f in part.findings),
            skipped=tuple(s for part in parts for s in part.skipped),
            titles={name: title for part in parts for name, title in part.titles.items()},
            excused={name: reason for part in parts for name, reason in part.excused.items()},
        )
        for backend, parts in collected.items()
    ]
    text = io.StringIO()
    Console(file=text, width=170, color_system=None).print(table(whole))
    terminalreporter.section("conformance: backend x check")
    terminalreporter.write(text.getvalue())
