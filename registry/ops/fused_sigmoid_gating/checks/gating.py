"""GateTrial: a call of any size, with what the tuner's gate asks of it, in about three times the call's memory."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterable
from typing import NamedTuple

import torch

from ....backend import Chunked
from ....conformance.check import Violation
from ....conformance.subject import Subject
from ....decision import RejectCode
from ..call import Call
from ..case import CaseSpec
from ..cases import adversarial
from ..reference import Reference, reference
from .compare import judged
from .kwargs import Kwargs
from .trial import Trial, bits, guarded, storages

__all__ = ["GateTrial", "Image"]

#: Most values of float64 states that the reference may hold at once; it keeps about six such arrays.
_MAX_REFERENCE_STATE = {"cpu": 2**22, "cuda": 2**25}


class Image(NamedTuple):
    """What one run left: the covered output rows, and the bytes of the state storages, by address."""

    rows: torch.Tensor
    states: dict[int, torch.Tensor]


class GateTrial(Trial):
    """A trial that can be judged on some of its heads, put back, and compared with an earlier run."""

    def __init__(self, kwargs: Kwargs) -> None:
        super().__init__(kwargs)
        self._given = copy.copy(self.call)
        self._as_given = _places(self.call)

    def begin(self) -> None:
        """Be as made: every storage, the output's guards, and the record, which a backend could have written to."""
        self.call = copy.copy(self._given)
        call = self.call
        call.out = guarded(call.v.shape, call.q.dtype, call.q.device)
        self.restore()

    def lasting(self) -> Iterable[torch.Tensor]:
        """The images that :meth:`begin` puts back."""
        return self.before.values()

    def places(self) -> Hashable:
        """Where and how the call's tensors lie."""
        return _places(self._given)

    @staticmethod
    def adversarial(spec: CaseSpec) -> CaseSpec:
        """The adversarial length layout of the same problem."""
        return adversarial(spec)

    def launch(self, subject: Subject, poison: float) -> None:
        """Run on a poisoned output; copies nothing.

        Raises: as ``Subject.run``; Violation (``INPUT_MODIFIED``) if afterwards the call's record names other tensors.
        """
        self.poison = poison
        subject.run(self.call, poison)
        if _places(self.call) != self._as_given:
            raise Violation("changed the call's tensors, not their values alone", code=RejectCode.INPUT_MODIFIED)

    def heads(self, max_token_heads: int, seed: int) -> tuple[int, ...]:
        """Value heads to compare: all within the budget, else the first, the last and at least one drawn at random."""
        call = self.call
        by_tokens = max_token_heads // max(1, self.offsets[-1])
        held = self.offsets[-1] if call.intermediates is not None else call.n
        by_states = _MAX_REFERENCE_STATE[call.q.device.type] // max(1, held * call.key_dim * call.value_dim)
        count = max(3, min(by_tokens, by_states))
        if count >= call.hv:
            return tuple(range(call.hv))
        inner = torch.randperm(call.hv - 2, generator=torch.Generator().manual_seed(seed))[: count - 2] + 1
        return (0, *sorted(inner.tolist()), call.hv - 1)

    def truth(self, chunk: int | Chunked | None, max_token_heads: int, seed: int) -> Reference:
        """The reference of the call, on :meth:`heads` and on the call's device. Before the call runs."""
        return reference(self.call, self.heads(max_token_heads, seed), chunk, device=self.call.q.device)

    def judge(self, ref: Reference) -> float:
        """Worst ratio of what the last run left. Raises Violation (``NON_FINITE``, ``WRONG``)."""
        rows = self.out.detach().flatten(0, 1)[: self.offsets[-1]]
        heads = torch.tensor(ref.heads, device=rows.device)
        finite = torch.isfinite(ref.o[: len(rows)].to(rows.dtype)).to(rows.device)
        bad = int((~torch.isfinite(rows[:, heads]) & finite).sum()) + int(torch.isnan(rows).sum())
        if bad:
            raise Violation(f"{bad} outputs are NaN or infinite where the reference is not", code=RejectCode.NON_FINITE)
        return judged(self.call, self.out, ref)

    def remember(self) -> Image:
        """A copy of what the last run left."""
        return Image(self._rows().clone(), {key: data.clone() for key, data in self._states().items()})

    def differs(self, image: Image) -> str:
        """What the last run left otherwise than ``image`` says, in words; empty when all bits are equal."""
        if not torch.equal(bits(self._rows()), bits(image.rows)):
            return f"{int((bits(self._rows()) != bits(image.rows)).sum())} outputs differ"
        unequal = [key for key, data in self._states().items() if not torch.equal(data, image.states[key])]
        return "the outputs are equal, the states differ" if unequal else ""

    def restore(self) -> None:
        """Put every storage back as it was given."""
        for key, data in storages(self.call).items():
            data.copy_(self.before[key])

    def _rows(self) -> torch.Tensor:
        return self.out.detach().flatten(0, 1)[: self.offsets[-1]].contiguous()

    def _states(self) -> dict[int, torch.Tensor]:
        written = {t.untyped_storage().data_ptr() for t in (self.call.pool, self.call.intermediates) if t is not None}
        return {key: data for key, data in storages(self.call).items() if key in written}


def _places(call: Call) -> Hashable:
    tensors = ((name, t) for name, t in call.tensors().items() if name != "out")
    return tuple((name, t.data_ptr(), t.shape, t.stride(), t.dtype) for name, t in tensors)
