"""Which library an adapter calls, and whether the installed version is one it was written against."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

__all__ = ["Library", "release"]

#: Files of a package that state its version, where it came without its distribution's metadata.
_VERSION_FILES = ("_version.py", "version.py", "_build_meta.py")
_STATED = re.compile(r"""^__version__\s*(?::\s*str\s*)?=\s*["']([^"']+)["']""", re.MULTILINE)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``"0.7.2.post1"`` gives ``(0, 7, 2)``."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


@dataclass(frozen=True, slots=True)
class Library:
    """One function of one library.

    Attributes:
        title: the library's name in words.
        package: importable top-level package. distribution: what is installed under that name.
        since, before: versions the adapter holds for: ``since <= version < before``.
        module, function: where the function is.
    """

    title: str
    package: str
    distribution: str
    since: str
    before: str
    module: str
    function: str

    @property
    def version(self) -> str | None:
        """The installed version, None if nothing states it; the library is not imported."""
        return _version(self.distribution, self.package)

    @property
    def holds(self) -> bool | None:
        """Whether the installed version is within the range; None where it is not stated."""
        version = self.version
        return None if version is None else release(self.since) <= release(version) < release(self.before)

    def load(self) -> Callable[..., Any]:
        """Import the function. Raises what the import raises, AttributeError if the module lacks it."""
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return function


@cache
def _version(distribution: str, package: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        pass
    try:
        found = importlib.util.find_spec(package)
    except ValueError:  # a module put into sys.modules by hand
        return None
    for folder in (found.submodule_search_locations or ()) if found is not None else ():
        for name in _VERSION_FILES:
            file = Path(folder) / name
            stated = _STATED.search(file.read_text(encoding="utf-8")) if file.is_file() else None
            if stated is not None:
                return stated[1]
    return None
