"""What runs under compute-sanitizer: a few short calls of one backend, and no kernel but the backend's.

    python -m isokern.tools.gpu_test.sanitized --backend NAME [--plant slots|pool]

Inputs are made on the CPU and copied to the device whole, gaps between strided values included, outputs are allocated
and not filled: so every initialised byte was written by a copy, which initcheck sees, or by the backend's kernel.
``--plant`` makes one call that a working sanitizer must report: ``slots`` names a slot far outside the pool (memcheck),
``pool`` reads states that nothing wrote (initcheck).
"""

from __future__ import annotations

import enum
import sys
from typing import Annotated, Any

import torch
import typer

from ...registry import backends as registered
from ...registry.conformance.subject import chunk_of
from ...registry.decision import Rejected
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.case import CaseSpec
from ...registry.ops.fused_sigmoid_gating.inputs import make_inputs
from ...registry.ops.fused_sigmoid_gating.judge import judge
from ...registry.ops.fused_sigmoid_gating.reference import reference
from ...registry.ops.fused_sigmoid_gating.validate import canonical_call
from .cases import SANITIZED

__all__ = ["DONE", "Plant", "Transfer"]

#: The last line of a run that came to its end; the number of calls follows.
DONE = "calls made:"

#: Far outside any pool that fits a GPU, and inside the 48 bits of an address.
_FAR_SLOT = 40_000_000


class Plant(enum.StrEnum):
    """Errors that may be planted."""

    SLOTS = "slots"
    POOL = "pool"


class Transfer:
    """Moves CPU tensors to a device, storage by storage: by copies alone, views stay views of one storage.

    Args:
        blank: id of a CPU tensor whose storage is allocated there and not copied.
    """

    def __init__(self, device: str, blank: torch.Tensor | None = None) -> None:
        self._device = device
        self._blank = None if blank is None else blank.untyped_storage().data_ptr()
        self._storages: dict[int, torch.Tensor] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """The same view of the storage's copy."""
        whole = self._whole(tensor.untyped_storage())
        return whole.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def _whole(self, storage: torch.UntypedStorage) -> torch.Tensor:
        known = self._storages.get(storage.data_ptr())
        if known is None:
            known = torch.empty(storage.nbytes(), dtype=torch.uint8, device=self._device)
            if storage.data_ptr() != self._blank:
                known.copy_(torch.empty(0, dtype=torch.uint8).set_(storage))
            self._storages[storage.data_ptr()] = known
        return known


def _moved(call: Call, device: str, blank: torch.Tensor | None = None) -> Call:
    """The CPU call on the device, with an output that nothing has written."""
    transfer = Transfer(device, blank)
    tensors = {name: transfer(t) for name, t in call.tensors().items() if name not in ("write_slots", "out")}
    moved = call.replace(**tensors)
    if call.update == "separate":
        assert call.write_slots is not None
        moved = moved.replace(write_slots=transfer(call.write_slots))
    # Rows beyond the last offset are nobody's: they stay unwritten, and are not read back.
    moved.out = torch.empty(call.v.shape, dtype=call.q.dtype, device=device)
    return moved


def _collected(call: Call, moved: Call) -> tuple[Call, torch.Tensor]:
    """The finished call on the CPU, by copies of whole storages, and its output where a sequence covers it."""

    def back(tensor: torch.Tensor) -> torch.Tensor:
        storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
        return storage.cpu().view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    changed = {
        name: back(getattr(moved, name)) for name in ("pool", "intermediates") if getattr(moved, name) is not None
    }
    out = torch.full(call.v.shape, float("nan"), dtype=call.q.dtype)
    assert moved.out is not None
    covered = call.offsets[-1]
    out.flatten(0, 1)[:covered] = moved.out.flatten(0, 1)[:covered].cpu()
    return call.replace(**changed), out


def run_case(name: str, spec: CaseSpec, device: str = "cuda") -> tuple[str, ...]:
    """One call with the default config; what is wrong with its results."""
    kwargs: dict[str, Any] = make_inputs(spec).kwargs
    call = canonical_call(**kwargs)
    moved = _moved(call, device)
    backend, problem = registered("fused_sigmoid_gating")[name], moved.problem()
    verdict = backend.check(problem)
    if isinstance(verdict, Rejected):
        typer.echo(f"{spec.name}: declined: {verdict.reason}")
        return ()
    config = backend.configs(problem)[0]
    ref = reference(call, chunk=chunk_of(backend, config))
    backend.bind(problem, config)(moved)
    if device == "cuda":
        torch.cuda.synchronize()
    after, out = _collected(call, moved)
    return judge(after, out, ref).faults


def _planted(name: str, plant: Plant) -> None:
    call = canonical_call(**make_inputs(SANITIZED[0]).kwargs)
    assert call.read_slots is not None
    if plant is Plant.SLOTS:
        call.read_slots[0] = _FAR_SLOT
    moved = _moved(call, "cuda", blank=call.pool if plant is Plant.POOL else None)
    backend, problem = registered("fused_sigmoid_gating")[name], moved.problem()
    backend.bind(problem, backend.configs(problem)[0])(moved)
    torch.cuda.synchronize()


def main(
    backend: Annotated[str, typer.Option(help="Name of the backend.")],
    plant: Annotated[Plant | None, typer.Option(help="One call with this error instead.")] = None,
) -> None:
    """Make the calls; exit status 1 if a result is outside its error bound."""
    if plant is not None:
        _planted(backend, plant)
        print(DONE, 1)
        return
    failed = False
    for spec in SANITIZED:
        faults = run_case(backend, spec)
        failed |= bool(faults)
        print(f"{spec.name}: {'; '.join(faults) or 'ok'}", flush=True)
    print(DONE, len(SANITIZED))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    typer.run(main)
