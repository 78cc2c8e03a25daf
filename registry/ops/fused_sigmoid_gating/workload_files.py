"""Workload files: cases as YAML, read strictly and written so that they read back equal.

    op: fused_sigmoid_gating
    about: free text                        # optional
    cases:
      - decode N=64                         # a conventional name says it all
      - name: verify 16x4 in bfloat16       # or field by field
        phase: verify
        lengths: 16x4                       # text, or a list: [4, 4, 7]
        verify: chain                       # none | chain | tree
        draft_tokens: 4
        state_dtype: bfloat16
        policy: graph                       # eager | graph
        state_layout: vk                    # kv | vk
        tier: core                          # smoke | core | full
        accuracy: rounded                   # float32 | rounded

A running program records the calls it had no tuned choice for in the same format.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

import yaml

from ....errors import ArgumentValueError, WorkloadError, near_matches
from ...accuracy import ACCURACIES
from .lengths import LengthLayout, parse_lengths
from .workload_case import STATE_DTYPES, STATE_LAYOUTS, Case, Phase, Policy, Tier, Verify, case_name, parse_case

__all__ = ["dump_workloads", "format_workloads", "load_workloads", "parse_workloads"]

_T = TypeVar("_T")

_OP = "fused_sigmoid_gating"
_TOP_KEYS = ("op", "about", "cases")
_CASE_KEYS = tuple(field.name for field in fields(Case))
_ENUMS: Mapping[str, type[StrEnum]] = {"phase": Phase, "verify": Verify, "policy": Policy, "tier": Tier}
_NAMES = {"state_dtype": STATE_DTYPES, "state_layout": STATE_LAYOUTS, "accuracy": ACCURACIES}
_TYPES = {
    "tag:yaml.org,2002:str": "text",
    "tag:yaml.org,2002:int": "an integer",
    "tag:yaml.org,2002:float": "a number",
    "tag:yaml.org,2002:bool": "a truth value",
    "tag:yaml.org,2002:null": "nothing",
    "tag:yaml.org,2002:seq": "a list",
    "tag:yaml.org,2002:map": "a mapping",
}


def load_workloads(path: str | os.PathLike[str]) -> tuple[Case, ...]:
    """The cases of the workload file at ``path``, in order.

    Raises:
        WorkloadError: unreadable, not YAML, or not a workload; ``line`` is the 1-based line at fault.
    """
    source = os.fspath(path)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise WorkloadError(source, None, f"cannot be read: {error.strerror or error}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise WorkloadError(source, data.count(b"\n", 0, error.start) + 1, "not UTF-8 text") from error
    return parse_workloads(text, source)


def dump_workloads(cases: Iterable[Case], path: str | os.PathLike[str]) -> None:
    """Write ``cases`` to ``path``, whole or not at all; an existing file is replaced.

    Raises:
        WorkloadError: there is no case, or two have one name: such a file would not load.
        OSError: the file cannot be written.
    """
    target = Path(path)
    text = format_workloads(cases, os.fspath(path))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, target)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def format_workloads(cases: Iterable[Case], source: str = "<workloads>") -> str:
    """The text of a workload file; raises :class:`WorkloadError` as :func:`dump_workloads`."""
    entries = list(cases)
    if not entries:
        raise WorkloadError(source, None, "no cases")
    names: set[str] = set()
    for case in entries:
        if case.name in names:
            raise WorkloadError(source, None, f"two cases are named {case.name!r}")
        names.add(case.name)
    document = {"op": _OP, "cases": [_entry(case) for case in entries]}
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True, width=10_000)


def _entry(case: Case) -> dict[str, str | int]:
    entry: dict[str, str | int] = {"name": case.name, "phase": str(case.phase), "lengths": str(case.lengths)}
    bare = Case(case.name, Phase.PREFILL, case.lengths)  # for the defaults of the optional fields
    for key in _CASE_KEYS[3:]:
        value = getattr(case, key)
        if value != getattr(bare, key):
            entry[key] = value if isinstance(value, int) else str(value)
    return entry


def parse_workloads(text: str, source: str = "<workloads>") -> tuple[Case, ...]:
    """The cases in a workload file's ``text``; raises :class:`WorkloadError` as :func:`load_workloads`."""
    reader = _Reader(source)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else None
        raise WorkloadError(source, line, f"not valid YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise WorkloadError(source, line, f"not valid YAML: {error.reason}") from error
    if root is None:
        raise WorkloadError(source, 1, "the file is empty; expected the keys op and cases")
    return reader.workload(root)


class _Reader:
    """Walks the composed YAML nodes, which know their lines; makes nothing but text, integers and cases."""

    def __init__(self, source: str) -> None:
        self._source = source

    def workload(self, root: yaml.Node) -> tuple[Case, ...]:
        top = self._mapping(root, _TOP_KEYS)
        for key in ("op", "cases"):
            if key not in top:
                raise self._error(root, f"missing key {key!r}")
        if (op := self._text(top["op"], "op")) != _OP:
            raise self._error(top["op"], f"op: expected {_OP!r}, given {op!r}")
        if "about" in top:
            self._text(top["about"], "about")
        entries = top["cases"]
        if not isinstance(entries, yaml.SequenceNode):
            raise self._mistyped(entries, "cases", "a list")
        if not entries.value:
            raise self._error(entries, "cases: expected at least one case")
        seen: dict[str, int] = {}
        cases = []
        for node in entries.value:
            case = self._case(node)
            if case.name in seen:
                raise self._error(node, f"the name {case.name!r} is already used on line {seen[case.name]}")
            seen[case.name] = node.start_mark.line + 1
            cases.append(case)
        return tuple(cases)

    def _case(self, node: yaml.Node) -> Case:
        if not isinstance(node, yaml.MappingNode):
            name = self._text(node, "case")
            return self._checked({"": node}, lambda: parse_case(name))
        nodes = self._mapping(node, _CASE_KEYS)
        values: dict[str, Any] = {key: self._value(key, value) for key, value in nodes.items()}
        if "phase" not in nodes and "lengths" not in nodes and "name" in nodes:
            named = self._checked({"": nodes["name"]}, lambda: parse_case(values["name"]))
            values = {**{key: getattr(named, key) for key in _CASE_KEYS}, **values}
        for key in ("phase", "lengths"):
            if key not in values:
                raise self._error(node, f"missing key {key!r}")
        if "name" not in values:
            verify = values.get("verify", Verify.NONE)
            values["name"] = case_name(values["phase"], values["lengths"], verify, values.get("state_dtype"))
        return self._checked({"": node, **nodes}, lambda: Case(**values))

    def _value(self, key: str, node: yaml.Node) -> object:
        if key == "lengths":
            return self._lengths(node)
        if key == "draft_tokens":
            return self._count(node, key)
        text = self._text(node, key)
        if key == "name":
            return text
        allowed = _NAMES.get(key) or tuple(str(member) for member in _ENUMS[key])
        if text not in allowed:
            raise self._error(node, f"{key}: expected one of {', '.join(allowed)}, given {text!r}", text, allowed)
        return _ENUMS[key](text) if key in _ENUMS else text

    def _lengths(self, node: yaml.Node) -> LengthLayout:
        if isinstance(node, yaml.SequenceNode):
            return LengthLayout.of_lengths([self._count(item, "lengths") for item in node.value])
        text = self._text(node, "lengths")
        return self._checked({"": node}, lambda: parse_lengths(text))

    def _checked(self, nodes: Mapping[str, yaml.Node], make: Callable[[], _T]) -> _T:
        """What ``make`` returns; an argument it refuses is reported at its own node or else ``nodes[""]``."""
        try:
            return make()
        except ArgumentValueError as error:
            raise self._error(nodes.get(error.argument, nodes[""]), str(error)) from error

    def _mapping(self, node: yaml.Node, known: tuple[str, ...]) -> dict[str, yaml.Node]:
        if not isinstance(node, yaml.MappingNode) or node.tag != "tag:yaml.org,2002:map":
            raise self._mistyped(node, "this", f"a mapping with keys among {', '.join(known)}")
        found: dict[str, yaml.Node] = {}
        for key_node, value in node.value:
            key = self._text(key_node, "key")
            if key not in known:
                raise self._error(key_node, f"unknown key {key!r}", key, known)
            if key in found:
                raise self._error(key_node, f"key {key!r} is repeated")
            found[key] = value
        return found

    def _text(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:str":
            raise self._mistyped(node, what, "text")
        return str(node.value)

    def _count(self, node: yaml.Node, what: str) -> int:
        if not isinstance(node, yaml.ScalarNode) or node.tag != "tag:yaml.org,2002:int":
            raise self._mistyped(node, what, "an integer")
        if not re.fullmatch(r"\d+", node.value):  # YAML also has octal, hexadecimal and base-60 integers
            raise self._error(node, f"{what}: expected a decimal integer of zero or more, given {node.value}")
        return int(node.value)

    def _mistyped(self, node: yaml.Node, what: str, expected: str) -> WorkloadError:
        given = _TYPES.get(node.tag, node.tag)
        if isinstance(node, yaml.ScalarNode) and node.value:
            given += f", {node.value!r}"
        return self._error(node, f"{what}: expected {expected}, given {given}")

    def _error(self, node: yaml.Node, message: str, name: str = "", known: Iterable[str] = ()) -> WorkloadError:
        if near := near_matches(name, known):
            message += f"; did you mean {near[0]!r}?"
        return WorkloadError(self._source, node.start_mark.line + 1, message)
