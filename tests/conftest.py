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

#: With several test processes, modules of one group run in one of them, one after another.
GROUPS = {
    "timing": ("test_race", "test_screen", "test_tuner", "test_warmup", "test_worker", "test_fleet"),  # measure or wait
    "checkout": ("test_docs", "test_package", "test_site"),  # build in the checkout
}
#: Modules of which one run, per engine where they name one, answers several tests.
SHARED = ("test_errors", "test_faults", "test_triton_engine")


def group_of(nodeid: str) -> str:
    """What is kept together: tests with one answer belong to one process."""
    module = nodeid.partition("::")[0].rpartition("/")[2].removesuffix(".py")
    for group, modules in GROUPS.items():
        if module in modules:
            return group
    if module in SHARED:
        parameters = nodeid.partition("[")[2]
        return f"{module} {next((name for name in ENGINES if name in parameters), '')}"
    return nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Test by test to whichever process is free, but group by group.

    The plugin's own ``--dist loadgroup`` tells the controller by changing test ids, which newer pytests do not let it.
    """
    from xdist.scheduler import LoadScopeScheduling

    class Grouped(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return Grouped(config, log)


def pytest_collection_modifyitems(items):
    """Quick tests first; of those on CPU engines, which take minutes, the longest: X1 tries every config."""
    items.sort(key=lambda item: ("engines" in item.path.parts, "[X1]" not in item.name))  # a stable sort


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
        terminalreporter.section(f"planted faults that were found: {len(faults)}")
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
