"""Compiled kernels on disk: compilers take seconds per kernel, and the next process needs the same ones.

One file per kernel, named by everything that could change it. Anything unreadable or altered is a miss; a disk that
cannot be written costs only the saving.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import platformdirs

from ...cache.files import read_bytes, write_atomic
from .image import Image

__all__ = ["cached", "directory", "discard", "file_of"]

_log = logging.getLogger(__name__)


@cache
def directory() -> Path:
    """Where kernels are kept: ``kernels`` in the root that ``ISOKERN_CACHE`` names, else in the user's cache."""
    root = os.environ.get("ISOKERN_CACHE") or platformdirs.user_cache_dir("isokern", appauthor=False)
    return Path(root) / "kernels"


def file_of(compiler: str, identity: Iterable[str]) -> Path:
    """The file of one kernel.

    Args:
        compiler: what makes it; a folder's name.
        identity: the sources' fingerprint, the options, the architecture, the compiler's version.
    """
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:32]
    return directory() / compiler / f"{name}.json"


def cached(path: Path, make: Callable[[], Image]) -> Image:
    """The kernel at ``path``, or a new one, kept there. Raises what ``make`` raises."""
    try:
        kept = read_bytes(path)
        if kept is not None:
            return Image.from_text(kept)
    except (OSError, ValueError, TypeError) as error:
        _log.warning("compiled kernel %s cannot be used (%s) and is made anew", path, error)
    image = make()
    try:
        write_atomic(path, image.to_text())
    except OSError as error:
        _log.warning("kernels are compiled anew in every process: cannot write to %s: %s", path.parent, error)
    return image


def discard(path: Path) -> None:
    """Forget a kernel that the driver refuses to load."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("cannot remove %s: %s", path, error)
