"""Atomic writes and patient reads, without locks: for many writers, network file systems and kill -9."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path

__all__ = ["is_temporary", "list_directory", "read_bytes", "write_atomic"]

_RETRIES = 3
_STALE_HANDLE_PAUSE = 0.01  # seconds; long enough for an NFS client to look the name up again
_TEMPORARY_SUFFIX = ".tmp"


def is_temporary(path: Path) -> bool:
    """Whether ``path`` is an unfinished write (in flight, or left by a killed writer)."""
    return path.name.startswith(".") and path.name.endswith(_TEMPORARY_SUFFIX)


def write_atomic(path: Path, text: str) -> None:
    """Replace ``path`` by ``text``; a reader sees the old file or the new one, never a part.

    The temporary file lies in the same directory, since a rename is atomic only within one file system.
    Directories are made as needed.

    Raises:
        OSError: read-only, full, not a directory, ... Nothing is left behind.
    """
    for attempt in range(_RETRIES + 1):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:  # says "file exists" and means that a file is in the way
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path.parent)) from error
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}{_TEMPORARY_SUFFIX}")
        try:
            # not tempfile.mkstemp: its 0600 would lock others out of a shared store; here the umask decides
            descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileNotFoundError:
            if attempt == _RETRIES:
                raise
            continue  # a concurrent prune removed the directory that was there a moment ago
        try:
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(text.encode())
                stream.flush()
                os.fsync(stream.fileno())  # else a power cut can leave the new name on an empty file
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        return


def read_bytes(path: Path) -> bytes | None:
    """The contents, or None if there is no such file.

    A name replaced by another host can for a moment be missing or stale over NFS, so both are tried again.

    Raises:
        OSError: any other failure.
    """
    for attempt in range(_RETRIES + 1):
        try:
            return path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            continue  # no pause: this is also the ordinary miss
        except OSError as error:
            if error.errno != errno.ESTALE or attempt == _RETRIES:
                raise
            time.sleep(_STALE_HANDLE_PAUSE)
    return None


def list_directory(path: Path) -> Iterator[Path]:
    """The directory's contents in order of name; nothing if it does not exist.

    Raises:
        OSError: it exists but cannot be listed.
    """
    try:
        names = sorted(os.listdir(path))
    except (FileNotFoundError, NotADirectoryError):
        return
    for name in names:
        yield path / name
