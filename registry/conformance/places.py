"""Where ``isokern verify`` examines each backend: on a device, or in its CPU engine."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ...engines import EngineInfo, MissingEngineError, engine_for
from ...errors import ArgumentValueError, IsokernError, UnknownNameError
from .. import backends as registered
from ..backend import Backend, Config
from ..plugins import missing_modules

__all__ = ["DEVICES", "Elsewhere", "Place", "choose_places", "configs_at", "devices_named"]

#: What ``--device`` may name: ``auto`` is the GPU where there is one.
DEVICES = ("auto", "cpu", "cuda")

#: Why a backend runs nothing on a device, None if it may: ``runner.belongs_elsewhere``.
Elsewhere = Callable[[str, Backend, str], str | None]


@dataclass(frozen=True, slots=True)
class Place:
    """A backend, and what it is to run on: a device, or an engine on the CPU.

    Attributes: ``beside``, the engine for what the device cannot check.
    """

    backend: Backend
    device: str
    engine: EngineInfo | None = None
    beside: EngineInfo | None = None


def devices_named(device: str) -> tuple[str, ...]:
    """The devices to try a backend on, the first that it runs on counts.

    Raises:
        ArgumentValueError: a device that is not one of DEVICES, or not here.
    """
    if device not in DEVICES:
        raise ArgumentValueError("--device", " or ".join(DEVICES), repr(device))
    if device == "cpu":
        return ("cpu",)
    import torch

    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ArgumentValueError("--device", "a machine with a CUDA device for 'cuda'", "none found")
    return ("cuda",) if device == "cuda" else ("cuda", "cpu") if available else ("cpu",)


def choose_places(
    op: str, names: Sequence[str] | None, devices: Sequence[str], elsewhere: Elsewhere, say: Callable[[str], None]
) -> list[Place]:
    """Where each backend runs. Of those not named, what cannot run here is said to be not verified.

    Raises:
        UnknownNameError: no such backend. MissingEngineError: an engine that lacks something.
        ArgumentValueError: a named backend that runs on none of ``devices``.
        IsokernError: a named backend whose framework is not installed.
    """
    known = registered(op)
    for name in names or ():
        if name not in known:
            raise UnknownNameError("backend", name, known)
    chosen: list[Place] = []
    for name in names or known:
        try:
            place = _place(op, known[name], devices, elsewhere, named=bool(names))
        except MissingEngineError:
            raise  # installed, so asked for; never passed over
        except IsokernError as error:
            if names:
                raise
            say(f"{name}: not verified: {error}")
        else:
            chosen.append(place)
    return chosen


def _place(op: str, backend: Backend, devices: Sequence[str], elsewhere: Elsewhere, named: bool) -> Place:
    missing = missing_modules(backend)
    engine = engine_for(backend) if "cuda" not in devices else None
    if engine is not None and (named or not missing):
        engine.require()
        return Place(backend, "cpu", engine)
    if missing:
        raise IsokernError(f"backend {backend.name!r} needs {', '.join(missing)}: {_advice(backend)}")
    reasons = []
    for device in devices:
        reason = elsewhere(op, backend, device)
        if reason is None:
            beside = engine_for(backend) if device == "cuda" and "cpu" in devices else None
            return Place(backend, device, beside=None if beside is None or beside.missing() else beside)
        reasons.append(reason)
    raise ArgumentValueError("--device", f"one that {backend.name!r} runs on", devices[0], "; ".join(reasons))


def _advice(backend: Backend) -> str:
    extras = {"triton": "triton", "cupy": "cupy-cuda13x", "numba_cuda": "numba-cuda", "numba": "numba"}
    known = [extras[module] for module in backend.requires if module in extras]
    return f"pip install 'isokern[{','.join(known)}]'" if known else "install what its distribution asks for"


def configs_at(place: Place, every: bool) -> Sequence[Config | None]:
    """None stands for each problem's default. The whole space is asked for a middling problem of the op."""
    if not every:
        return (None,)
    from ..ops.fused_sigmoid_gating.case import CaseSpec
    from ..ops.fused_sigmoid_gating.describe import describe

    # Configs depend on the kind of device; an engine presents its tensors as an sm_90's.
    on_gpu = place.engine is not None or place.device == "cuda"
    middling = CaseSpec("space", (33, 0, 20, 1))
    return tuple(place.backend.configs(describe(middling, "cuda", 90) if on_gpu else describe(middling, "cpu")))
