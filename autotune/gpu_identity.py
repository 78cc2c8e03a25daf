"""Which GPU of the host a device of this process is: ``cuda:0`` is another one wherever CUDA_VISIBLE_DEVICES differs.

Initialises CUDA in this process never.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from itertools import takewhile
from pathlib import Path

__all__ = ["VISIBLE", "physical_name", "visible_entries"]

VISIBLE = "CUDA_VISIBLE_DEVICES"

_ENTRY = re.compile(r"\d+|(GPU|MIG)-.+")


def visible_entries() -> tuple[str, ...] | None:
    """What CUDA_VISIBLE_DEVICES lists, by index of this process; None if it is not set.

    As CUDA reads it: the first entry that can be no device, -1 say, hides those after it.
    """
    text = os.environ.get(VISIBLE)
    if text is None:
        return None
    return tuple(takewhile(_ENTRY.fullmatch, (entry.strip() for entry in text.split(","))))


def physical_name(device: str) -> str:
    """A name for ``device`` that every process of this host has for the same GPU, whatever is visible to it.

    By the GPU's UUID. Where that cannot be asked, by the entry of CUDA_VISIBLE_DEVICES that the index stands for,
    and without one by the index. Such a name stands for itself, as do ``cpu`` and all but ``cuda`` and ``cuda:N``.

    Args: device: of this process; ``cuda`` is its first.
    """
    kind, _, index = device.partition(":")
    if kind != "cuda" or not (index or "0").isdecimal():
        return device
    number = int(index or 0)
    uuids = _uuids(os.environ.get(VISIBLE), os.environ.get("CUDA_DEVICE_ORDER"))
    if number < len(uuids):
        return f"GPU-{uuids[number]}"
    entries = visible_entries() or ()
    entry = entries[number] if number < len(entries) else str(number)
    return f"GPU-{entry}" if entry.isdecimal() else entry


@cache
def _uuids(visible: str | None, order: str | None) -> tuple[str, ...]:
    """Of this process's CUDA devices under these variables, which the asked process inherits; none if it cannot tell.

    No error where there is nobody to ask: whoever wants to compute on a GPU that is not there will be told.
    """
    script = Path(__file__).with_name("gpu_probe.py")
    command = [sys.executable, "-I", str(script)]
    try:
        asked = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    return tuple(json.loads(asked.stdout)) if asked.returncode == 0 else ()
