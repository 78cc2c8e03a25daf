"""Frame: one thread's memory for one prepared launch, everything in it where the driver will look for it."""

from __future__ import annotations

import struct
import threading
from array import array
from typing import Any

from .compiler import Layout
from .driver import LAUNCH_CONFIG, Kernel, attributes, pointer

__all__ = ["Frame"]

_WORD = 8
_STREAM_AT = 32  # byte of hStream in CUlaunchConfig
# Tags of the ``extra`` list, from cuda.h.
_END, _BUFFER_POINTER, _BUFFER_SIZE = 0, 1, 2
_EXTRA = struct.Struct("=5Q")


class Frame(threading.local):
    """Made anew in every thread that looks at it, so two threads never write the same block.

    Attributes:
        state: ``words``, 64-bit words whose first ones are the kernel's parameters; the word where the stream goes;
            pointers to the ``CUlaunchConfig`` and to the ``extra`` list, as ``cuLaunchKernelEx`` takes them.
            One attribute, for reading a thread's own costs.
    """

    state: tuple[array[int], int, Any, Any]

    def __init__(self, layout: Layout, kernel: Kernel) -> None:
        image = kernel.image
        extra = attributes(image)
        size = len(layout.block)
        config_at = -(-size // _WORD) * _WORD
        attributes_at = config_at + LAUNCH_CONFIG.size
        extra_at = attributes_at + len(extra)
        size_at = extra_at + _EXTRA.size
        words = array("q", bytes(size_at + _WORD))
        base, _ = words.buffer_info()
        x, y, z = layout.grid
        memory = memoryview(words).cast("B")
        memory[:size] = layout.block
        LAUNCH_CONFIG.pack_into(
            memory,
            config_at,
            *(x * image.cluster, y, z),
            *(image.threads, 1, 1),
            image.shared,
            0,
            base + attributes_at if extra else 0,
            len(extra) // 72,
        )
        memory[attributes_at:extra_at] = extra
        _EXTRA.pack_into(memory, extra_at, _BUFFER_POINTER, base, _BUFFER_SIZE, base + size_at, _END)
        words[size_at // _WORD] = size
        memory.release()
        self.state = (
            words,
            (config_at + _STREAM_AT) // _WORD,
            pointer(base + config_at),
            pointer(base + extra_at),
        )
