"""The API reference: which modules stand on which page, and the package laid out as its documentation tool expects it.

The repository's root is the package `isokern`, whatever the folder is called, and holds tests and environments as
well. The tool reads sources below a folder of the package's name: one is made of links to what the package contains.
"""

from __future__ import annotations

import shutil
import tomllib
from dataclasses import dataclass
from pathlib import Path

__all__ = ["PAGES", "Page", "stage"]


@dataclass(frozen=True, slots=True)
class Page:
    """``names``: the modules, classes and functions that are documented, below ``isokern``."""

    title: str
    text: str
    names: tuple[str, ...]

    def markdown(self) -> str:
        """The page, as instructions to the documentation tool."""
        return "\n".join([f"# {self.title}\n", f"{self.text}\n", *(f"::: isokern.{name}\n" for name in self.names)])


_OP = "registry.ops.fused_sigmoid_gating"
#: By path below docs/. mkdocs.yml gives their order.
PAGES = {
    "reference/registry.md": Page(
        "The registry",
        "`isokern.registry` has one registry per process: its `names`, `get`, `spec`, `backends`, `backend`,\n"
        "`register_backend`, `unregister_backend`, `register_op`, `use_store`, `pin` and `refresh` are the methods of\n"
        "`Registry` below.",
        (
            "registry.use",
            "registry.agree",
            "registry.core.Registry",
            "registry.agreement.Agreement",
            "registry.agreement.DisagreementError",
            "registry.spec",
        ),
    ),
    "reference/op.md": Page(
        "fused_sigmoid_gating",
        'What `registry.get("fused_sigmoid_gating")` returns. The arguments are those of `__call__`.',
        (f"{_OP}.op.FusedSigmoidGating",),
    ),
    "reference/layouts.md": Page(
        "Layouts",
        "Packed sequences; [the guide](../varlen.md) shows their use.",
        ("registry.varlen.layout.SequenceLayout", "registry.varlen.graph_layout", "registry.varlen.classes"),
    ),
    "reference/decisions.md": Page(
        "Decisions",
        "What `decide`, `prepare` and `explain` return; [the rules](../choice.md).",
        ("registry.decision",),
    ),
    "reference/backends.md": Page(
        "Backends",
        "What a backend implements and what it is given; [how to write one](../backends.md).",
        ("registry.backend", f"{_OP}.problem", f"{_OP}.call", "registry.varlen.profile.VarlenProfile"),
    ),
    "reference/conformance.md": Page(
        "Conformance",
        "Running the checks from Python; [what they are](../conformance.md).",
        (
            "registry.conformance.runner.run_checks",
            "registry.conformance.report",
            "registry.conformance.check",
            f"{_OP}.case.CaseSpec",
            f"{_OP}.reference",
            f"{_OP}.judge",
        ),
    ),
    "reference/tuning.md": Page(
        "Tuning and plans",
        "What `isokern warmup` and `isokern plan` do, from Python; [how choices are made](../choice.md).",
        ("autotune.warmup", "autotune.policy", "autotune.misses", "cache.plan", "cache.store"),
    ),
    "reference/integrations.md": Page(
        "Integrations",
        "Models of transformers, and functions with other libraries' signatures; [the guide](../integrations.md).",
        (
            "integrations.transformers",
            "integrations.fla",
            "integrations.flashinfer",
            "integrations.sglang",
            "integrations.vllm",
        ),
    ),
    "reference/errors.md": Page("Errors", "Everything isokern raises on purpose.", ("errors",)),
}


def stage(root: Path, folder: Path) -> None:
    """Fill ``folder/isokern`` with links to the modules of every package that pyproject.toml lists."""
    packages = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    shutil.rmtree(folder / "isokern", ignore_errors=True)
    for package in packages:
        parts = package.split(".")
        target = folder.joinpath(*parts)
        target.mkdir(parents=True, exist_ok=True)
        for module in root.joinpath(*parts[1:]).glob("*.py"):
            (target / module.name).symlink_to(module)
