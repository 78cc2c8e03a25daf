"""``python -m isokern.cache.cuda_probe INDEX``: what a CUDA device is, as JSON, asked in a process of its own.

The driver is initialised in this process only: the one that asked can still fork, and holds no context. Nothing but
the standard library is imported, so that asking takes a tenth of a second.
"""

from __future__ import annotations

import ctypes
import json
import sys

__all__ = ["main"]

# From cuda.h: CUdevice_attribute.
_SM_COUNT, _MAJOR, _MINOR = 16, 75, 76


def main(argv: list[str]) -> int:
    """Print the device's facts, or what went wrong on stderr (status 1)."""
    try:
        print(json.dumps(_facts(int(argv[1]))))
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _facts(index: int) -> dict[str, int | str]:
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")

    def ask(name: str, *arguments: object) -> None:
        code = getattr(driver, name)(*arguments)
        if code:
            text = ctypes.c_char_p()
            driver.cuGetErrorString(code, ctypes.byref(text))
            raise RuntimeError(f"{name}: {(text.value or b'unknown error').decode()} ({code})")

    ask("cuInit", 0)
    count, device = ctypes.c_int(), ctypes.c_int()
    ask("cuDeviceGetCount", ctypes.byref(count))
    if index >= count.value:
        raise RuntimeError(f"cuda:{index} does not exist: this process sees {count.value} CUDA device(s)")
    ask("cuDeviceGet", ctypes.byref(device), index)

    def attribute(number: int) -> int:
        value = ctypes.c_int()
        ask("cuDeviceGetAttribute", ctypes.byref(value), number, device)
        return value.value

    memory, name = ctypes.c_size_t(), ctypes.create_string_buffer(256)
    ask("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    ask("cuDeviceGetName", name, len(name), device)
    return {
        "major": attribute(_MAJOR),
        "minor": attribute(_MINOR),
        "sm_count": attribute(_SM_COUNT),
        "memory_bytes": memory.value,
        "name": name.value.decode(),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv))
