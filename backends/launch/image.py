"""Image: machine code of one kernel, and what the driver must be told to launch it."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import asdict, dataclass

__all__ = ["Image"]

_FORMAT = 1


@dataclass(frozen=True, slots=True)
class Image:
    """A compiled kernel for one architecture.

    Attributes:
        code: a cubin. entry: the kernel's name in it. threads: per block (along x).
        shared: bytes of dynamic shared memory per block.
        cluster: blocks per thread-block cluster; a launch has so many blocks for each of the layout's.
        cooperative: all blocks must be resident at once. overlaps: may start before its predecessor in the stream
            ends (programmatic dependent launch).
        scratch: bytes of global memory each block needs for itself, allocated per launch.
    """

    code: bytes
    entry: str
    threads: int
    shared: int = 0
    cluster: int = 1
    cooperative: bool = False
    overlaps: bool = False
    scratch: int = 0

    def to_text(self) -> str:
        """As JSON, for a file: the code in base64, with its SHA-256."""
        head = {"format": _FORMAT, "sha256": hashlib.sha256(self.code).hexdigest(), **asdict(self)}
        return json.dumps(head | {"code": base64.b64encode(self.code).decode()})

    @classmethod
    def from_text(cls, text: str | bytes) -> Image:
        """Raises ValueError or TypeError if ``text`` is not what :meth:`to_text` made."""
        head = json.loads(text)
        if not isinstance(head, dict) or head.pop("format", None) != _FORMAT:
            raise ValueError("not a kernel of this format")
        code = base64.b64decode(head.pop("code", ""), validate=True)
        if head.pop("sha256", None) != hashlib.sha256(code).hexdigest():
            raise ValueError("the code is not what was written")
        return cls(code=code, **head)
