"""The process behind ``process.DeviceProcess``: ``python -m isokern.registry.conformance.serve FD SETTINGS``.

SETTINGS are JSON: ``{"threads": ..., "imports": [...], "path": [...]}``. To ``{"elsewhere": [op, backend, device]}`` it
answers ``{"reason": ...}``; to ``{"op": ..., "backend", "only", "tier", "config", "device"}`` a ``{"finding": ...}``
for each finding, then ``{"report": ...}``; and ``{"error": ...}`` to what cannot be met.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Mapping
from functools import cache
from typing import Any

from ...autotune.channel import Channel, ChannelClosedError
from ...errors import IsokernError

__all__ = ["main"]


def main(argv: list[str]) -> int:
    """Serve on the socket whose descriptor is the first argument until the other side closes it."""
    channel = Channel(socket.socket(fileno=int(argv[1])))
    settings = json.loads(argv[2])
    sys.path += [folder for folder in settings["path"] if folder not in sys.path]
    import torch

    from ...cli import import_backends

    torch.set_num_threads(settings["threads"])
    import_backends(settings["imports"])
    try:
        channel.send({"ready": True})
        while True:
            asked = channel.receive()
            try:
                answer = _answer(asked, channel)
            except IsokernError as error:
                answer = {"error": str(error)}
            channel.send(answer)
    except ChannelClosedError:
        return 0


def _answer(asked: Mapping[str, Any], channel: Channel) -> dict[str, Any]:
    from ...errors import UnknownNameError
    from .. import backends
    from ..backend import Config
    from .runner import belongs_elsewhere, run_checks

    op, name, device = asked["elsewhere"] if "elsewhere" in asked else (asked[n] for n in ("op", "backend", "device"))
    known = backends(op)
    if name not in known:
        raise UnknownNameError("backend", name, known)
    if "elsewhere" in asked:
        return {"reason": belongs_elsewhere(op, known[name], device)}
    report = run_checks(
        op,
        known[name],
        None if asked["config"] is None else Config.from_dict(asked["config"]),
        asked["only"],
        asked["tier"],
        lambda finding: channel.send({"finding": finding.to_dict()}),
        device=device,
        peers=_peers(op, device),
    )
    return {"report": report.to_dict()}


@cache
def _peers(op: str, device: str) -> tuple[Any, ...]:
    """For all requests alike: to ask every backend's predicate takes longer than some checks."""
    from .runner import peers_on

    return peers_on(op, device)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv))
