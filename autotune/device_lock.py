"""One tuner at a time on a device: two would measure each other, and mix their journals."""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .gpu_identity import physical_name

__all__ = ["device_lock"]


@contextmanager
def device_lock(device: str, note: Callable[[str], None]) -> Iterator[None]:
    """Hold the host's lock for ``device``, waiting for it if need be (``note`` is told so).

    Named after the GPU that the device is, not after its index, which says nothing across processes.

    A file lock on a local disk, so that the kernel releases it however its holder dies. Where the lock cannot be
    had at all (no such directory, no permission), tuning goes on without it, and says so.
    """
    # By user: another one's file could not be opened.
    name = re.sub(r"[^A-Za-z0-9.-]", "-", physical_name(device))
    path = Path(tempfile.gettempdir()) / f"isokern-{os.getuid()}-{name}.lock"
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
