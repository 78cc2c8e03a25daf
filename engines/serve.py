"""An engine's process: ``python -m isokern.engines.serve FD BACKEND`` runs checks until the other side closes.

Requests are ``{"only": [...] | null, "tier": ..., "config": {...} | null}``. The answer is a ``{"finding": ...}`` for
each finding, then ``{"report": ...}`` (or ``{"error": ...}`` for a request that cannot be met).
"""

from __future__ import annotations

import socket
import sys

from ..autotune.channel import Channel, ChannelClosedError
from ..errors import IsokernError
from ..registry.backend import Config
from . import load_engine

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Serve on the socket whose descriptor is the first argument, with the engine of the backend that is the second."""
    channel = Channel(socket.socket(fileno=int(argv[1])))
    backend, engine = load_engine(argv[2])  # before torch has a reason to import Triton
    import torch

    from ..registry.conformance.runner import run_checks

    torch.set_num_threads(1)  # tensors of a few thousand elements: threads cost more than they give
    try:
        channel.send({"ready": engine.name})
        while True:
            asked = channel.receive()
            try:
                report = run_checks(
                    backend.op,
                    backend,
                    None if asked["config"] is None else Config.from_dict(asked["config"]),
                    asked["only"],
                    asked["tier"],
                    lambda finding: channel.send({"finding": finding.to_dict()}),
                    engine=engine,
                )
            except IsokernError as error:
                channel.send({"error": str(error)})
            else:
                channel.send({"report": report.to_dict()})
    except ChannelClosedError:
        return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
