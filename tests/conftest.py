"""Shared by all tests: one thread for tiny tensors, tests that must not meet, and the tables at the end of a run."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator

import pytest
import torch
from rich.console import Console

from isokern.engines import ENGINES
from isokern.registry.conformance.report import Report, table

# The tensors are small: handing them to several threads costs more than it brings, above all on a busy machine.
# Tests about threads set their own number.
torch.set_num_threads(1)

#: With several test processes, those of one group run in one of them, one after another.
GROUPS = {
    "timing": ("test_race", "test_screen", "test_tuner", "test_warmup", "test_worker"),  # they measure, or wait
    "checkout": ("test_docs", "test_package"),  # they build in the checkout
}


@pytest.hookimpl(tryfirst=True)  # before xdist reads the marks
def pytest_collection_modifyitems(items):
    """Quick tests first: those on CPU engines take minutes. And the groups."""
    items.sort(key=lambda item: "engines" in item.path.parts)  # a stable sort
    for item in items:
        for group, modules in GROUPS.items():
            if item.path.stem in modules:
                item.add_marker(pytest.mark.xdist_group(group))


def pytest_runtest_setup(item):
    """A test of an engine that is not there fails."""
    wanted = {marker.args[0] for marker in item.iter_markers("engine")}
    for info in ENGINES.values():
        if info.name in wanted:
            info.require()
            wanted.discard(info.name)
    assert not wanted, f"no such engine: {wanted}"


@pytest.fixture
def conformance(record_property) -> Callable[[Report], None]:
    """Takes the report of a test's checks; the sum of all is printed when all tests are done.

    It travels as a property of the test, since that may run in another process.
    """
    return lambda report: record_property("conformance", report.to_json())


def pytest_terminal_summary(terminalreporter):
    """Print backend x check (every pass, decline and failure of the run, worst ratios), and who rejected what fault."""
    collected: dict[str, list[Report]] = {}
    for text in properties(terminalreporter, "conformance"):
        report = Report.from_dict(json.loads(text))
        collected.setdefault(report.backend, []).append(report)
    if collected:
        terminalreporter.section("conformance: backend x check")
        text = io.StringIO()
        Console(file=text, width=210, color_system=None).print(table(map(whole, collected.values())))
        terminalreporter.write(text.getvalue())
    faults = sorted(properties(terminalreporter, "planted fault"))
    if faults:
        terminalreporter.section(f"planted faults: {len(faults)}, all found")
        for line in faults:
            terminalreporter.write_line(line)


def properties(terminalreporter, name: str) -> Iterator[str]:
    """What tests that passed or failed recorded under a name."""
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, ()):
            if getattr(report, "when", None) == "call":
                yield from (value for key, value in report.user_properties if key == name)


def whole(parts: list[Report]) -> Report:
    """One report of several about one backend, its checks in the suite's order."""
    from isokern.registry.ops.fused_sigmoid_gating.checks import CHECKS

    titles = {name: title for part in parts for name, title in part.titles.items()}
    order = [c.id for c in CHECKS]
    return Report(
        op=parts[0].op,
        backend=parts[0].backend,
        config=parts[0].config,
        findings=tuple(f for part in parts for f in part.findings),
        skipped=tuple(s for part in parts for s in part.skipped),
        titles={name: titles[name] for name in sorted(titles, key=lambda n: order.index(n) if n in order else -1)},
        excused={name: reason for part in parts for name, reason in part.excused.items()},
        place=parts[0].place,
    )
