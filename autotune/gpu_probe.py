"""``python -m isokern.autotune.gpu_probe``: the UUIDs of the visible CUDA devices, in CUDA's order, as JSON.

Asked in a process of its own, since the one that asks must not initialise CUDA. Asked of CUDA and not of NVML, which
knows nothing of CUDA_VISIBLE_DEVICES and CUDA_DEVICE_ORDER. Nothing but the standard library is imported.
"""

from __future__ import annotations

import ctypes
import json
import sys
import uuid

__all__ = ["main"]


def main() -> int:
    """Print the UUIDs, or what went wrong on stderr (status 1)."""
    try:
        print(json.dumps(_uuids()))
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _uuids() -> list[str]:
    driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")

    def ask(name: str, *arguments: object) -> None:
        code = getattr(driver, name)(*arguments)
        if code:
            raise RuntimeError(f"{name} fails with error {code}")

    ask("cuInit", 0)
    count, device, found = ctypes.c_int(), ctypes.c_int(), (ctypes.c_ubyte * 16)()
    ask("cuDeviceGetCount", ctypes.byref(count))
    # The second version, of CUDA 11.4, tells slices of one GPU apart; before there is the GPU's own alone.
    name = "cuDeviceGetUuid_v2" if hasattr(driver, "cuDeviceGetUuid_v2") else "cuDeviceGetUuid"
    uuids = []
    for index in range(count.value):
        ask("cuDeviceGet", ctypes.byref(device), index)
        ask(name, ctypes.byref(found), device)
        uuids.append(str(uuid.UUID(bytes=bytes(found))))
    return uuids


if __name__ == "__main__":
    sys.exit(main())
