"""One tuner at a time on a device: two would measure each other, and mix their journals."""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["device_lock"]


@contextmanager
def device_lock(device: str, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the host's lock for ``device``, waiting for it if need be (``note`` is told so).

    A file lock on a local disk, so that the kernel releases it however its holder dies. Where the lock cannot be
    had at all (no such directory, no permission), tuning goes on without it, and says so.
    """
    # By user: another one's file could not be opened.
    path = Path(tempfile.gettempdir()) / f"isokern-{os.getuid()}-{device.replace(':', '-')}.lock"
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        note(f"cannot lock {device} ({error}); another tuner may disturb this one")
        yield
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            note(f"another tuner is measuring on {device}; waiting for it to finish its problem")
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
