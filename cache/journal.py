"""An append-only journal of finished tuning steps, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .codec import InvalidRecordError, canonical, parse
from .files import read_bytes
from .store import CacheWarning

__all__ = ["Journal"]


class Journal:
    """One JSON object per line.

    A step is in the journal once :meth:`append` has returned. A process killed within it leaves at most part
    of a line, which readers pass over and later appends do not touch: that step is done again, nothing else.

    If the file cannot be read or written, the journal warns once and goes on in memory: the run completes,
    but cannot be resumed.

    Args:
        path: the file; it and its directories are made by the first append.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._unwritten: list[dict[str, Any]] = []
        self._warned = False

    def append(self, record: Mapping[str, Any]) -> None:
        """Add ``record`` durably.

        Raises:
            InvalidRecordError: not storable as JSON (NaN and infinity are not).
        """
        line = canonical(dict(record)).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                if _ends_within_a_line(descriptor):
                    line = b"\n" + line  # a killed writer's fragment must not swallow this record
                # one write, so that concurrent writers' lines do not mix
                if os.write(descriptor, line) != len(line):
                    raise OSError("the disk took only part of a record")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            self._unwritten.append(dict(record))
            self._warn(f"cannot write the journal {self.path} ({error}); this run cannot be resumed")

    def records(self) -> tuple[dict[str, Any], ...]:
        """All whole records, oldest first; unwritten ones last."""
        try:
            data = read_bytes(self.path) or b""
        except OSError as error:
            self._warn(f"cannot read the journal {self.path} ({error}); starting afresh")
            data = b""
        found = []
        for line in data.split(b"\n"):
            try:
                record = parse(line)
            except InvalidRecordError:
                continue  # torn: cut off before its end, or the empty string after the last newline
            if isinstance(record, dict):
                found.append(record)
        return (*found, *self._unwritten)

    def discard(self) -> None:
        """Remove the journal, once what it protected is published. A missing file is fine."""
        self._unwritten.clear()
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            self._warn(f"cannot remove the journal {self.path} ({error})")

    def _warn(self, message: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(message, CacheWarning, stacklevel=3)


def _ends_within_a_line(descriptor: int) -> bool:
    size = os.fstat(descriptor).st_size
    if size == 0:
        return False
    os.lseek(descriptor, size - 1, os.SEEK_SET)
    return os.read(descriptor, 1) != b"\n"
