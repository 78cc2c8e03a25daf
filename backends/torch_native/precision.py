"""Full float32 products, whatever the process has switched on.

TF32 (CUDA), bf16 or TF32 inner products (oneDNN on CPUs) and autocast each turn a float32 ``bmm`` into something
with a tenth of the digits: outside the op's error bound. They are process-wide or thread-wide switches that the
caller owns, so they are touched only when one is on, and put back as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["full_precision"]

#: Settings of a matmul switch under which float32 products keep float32's digits.
_FULL = ("none", "ieee")


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Run the block with float32 matrix products in full precision on ``device``'s type.

    Only the forward pass is covered: a backward pass runs after the block is left, under the caller's settings.
    """
    switch = _matmul_switch(device.type)
    before = _read(switch)
    reduced = before not in (*_FULL, "highest")
    autocast = torch.is_autocast_enabled(device.type)
    if not reduced and not autocast:
        yield
        return
    try:
        if reduced:
            _write(switch, "highest" if switch is None else "ieee")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if reduced:
            _restore(switch, before)


def _matmul_switch(device_type: str) -> Any:
    """The object whose ``fp32_precision`` rules matmul on this device; None where torch has only the old switch."""
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    switch = getattr(backend, "matmul", None)
    try:
        return switch if isinstance(switch.fp32_precision, str) else None  # type: ignore[union-attr]
    except AttributeError:  # torch before 2.9
        return None


def _read(switch: Any) -> str:
    return str(torch.get_float32_matmul_precision() if switch is None else switch.fp32_precision)


def _write(switch: Any, value: str) -> None:
    if switch is None:
        torch.set_float32_matmul_precision(value)
    else:
        switch.fp32_precision = value


def _restore(switch: Any, before: str) -> None:
    if switch is not None:
        # "none" inherits from the backend-wide setting. Where that yields the old value it is what was set
        # before, or means the same until someone changes the backend-wide setting.
        switch.fp32_precision = "none"
        if switch.fp32_precision == before:
            return
    _write(switch, before)
