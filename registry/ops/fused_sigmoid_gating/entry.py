"""Entry: a call that was validated, resolved and bound, so that calls like it need only be recognised."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import torch

from ...backend import Pinned, PinnedByLayout, Runner, pin, pin_by_layout
from ...decision import Decision
from ...dispatch import Bound
from ...overrides import Override, active
from ...varlen.layout import SequenceLayout
from ...varlen.offsets import check_offsets, longest_of
from ...varlen.profile import VarlenProfile
from .call import TENSORS, Call
from .guards import Guard, guard, plain
from .outputs import Maker, output_maker
from .problem import Problem
from .torch_settings import Settings, settings_of
from .validate import as_gate

__all__ = ["Entry"]

#: Where a step's own tensors are among TENSORS: A_log to read_slots.
_OF_STEPS = list(range(TENSORS.index("write_slots")))

_tensors_of: Callable[[Call], tuple[Any, ...]] = attrgetter(*TENSORS)

Reshape = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


@dataclass(slots=True, eq=False)
class Entry:
    """One kind of call. Everything the hot path compares, and what it runs then.

    Attributes:
        softplus_beta ... backend: the arguments of that name, as they were given.
        forced: what ``registry.use`` asked for, a backend or a policy; capturing: inside a CUDA graph (always False for
            tensors on a CPU).
        grad: None where no tensor requires grad; else whether grad mode was on.
        shapes: of q and v.
        has_cu ... has_out: which optional tensors are given; separate: ``output_state_indices`` is.
        is_step: a pool is updated in place and, but for offsets, nothing else is given: decode and prompt steps.
        word: such calls' settings, as the operator of decode and prompt steps takes them (``torch_settings``); None for
            calls that are no such steps, and for steps that the operator's kernel leaves to the hot path.
        present, guard: which of the call's tensors are looked at, and what they must be like.
        on_host: the tensors are on a CPU, and slots and rows are looked at; on_cuda: they are on a GPU.
        host_lengths: ``cu_seqlens`` is a bare tensor on the host, read every time.
        profile, rows, steps: of lengths known on the host: their profile, the most tokens and the longest length.
        identity, offsets: the SequenceLayout, or the offsets, that were found to fit last.
        reshape: gates given flat or without the batch axis, into canonical form (None: they are).
        new_output: v to an uninitialised output; None where the runner makes it.
        pinned: the runner on bare tensors, if there is one; laid: on them and a SequenceLayout, which such calls have;
            runner: on a Call.
        numbers: softplus_beta, softplus_threshold, scale and lower_bound of the canonical call.
        decision: why this runner; problem: what it was decided for.
    """

    softplus_beta: Any
    threshold: Any
    scale: Any
    l2norm: Any
    state_layout: Any
    is_kda: Any
    lower_bound: Any
    neg_eigval: Any
    disabled: Any
    max_seqlen: Any
    backend: Any
    forced: Override | None
    capturing: bool
    grad: bool | None
    shapes: tuple[torch.Size, torch.Size]
    has_cu: bool
    has_pool: bool
    has_steps: bool
    has_parents: bool
    has_out: bool
    separate: bool
    is_step: bool
    word: str | None
    present: Callable[[tuple[Any, ...]], tuple[Any, ...]]
    guard: Guard
    on_host: bool
    on_cuda: bool
    host_lengths: bool
    profile: VarlenProfile | None
    rows: int
    steps: int
    identity: object
    offsets: list[int] | None
    reshape: Reshape | None
    new_output: Maker | None
    pinned: Pinned | None
    laid: PinnedByLayout | None
    runner: Runner
    numbers: tuple[float, float, float, float | None]
    decision: Decision
    problem: Problem

    @classmethod
    def of(
        cls, given: Mapping[str, Any], tensors: tuple[Any, ...], call: Call, problem: Problem, bound: Bound
    ) -> Entry | None:
        """The entry of ``call``, made from the arguments ``given``; its output is allocated, unless there is grad.

        ``tensors`` are the caller's own, in the order of TENSORS, as the hot path puts them together.

        None for calls that cannot be told from others by what the hot path looks at. Runs nothing, but may compile
        (``Pinnable.pin``, ``PinnableByLayout.pin_by_layout``).

        Raises:
            BackendFailedError: as these.
        """
        output_slots = given["output_state_indices"]
        if not all(plain(t) for t in tensors if t is not None):
            return None
        if output_slots is not None and output_slots is given["initial_state_indices"]:
            return None
        skipped = "write_slots" if output_slots is None else None
        looked_at = [i for i, t in enumerate(tensors) if t is not None and TENSORS[i] != skipped]
        present = itemgetter(*looked_at)
        grads = any(t.requires_grad for t in tensors if t is not None)
        is_host_tensor = call.cu_seqlens is not None and call.layout is None and not call.cu_seqlens.is_cuda
        steps = [t.shape[1] for t in (call.intermediates, call.parents) if t is not None]
        runner = bound.runner
        pinned: Pinned | None
        laid: PinnedByLayout | None = None
        if call.n == 0 or call.tokens == 0:
            if call.out is None:
                return None
            runner, pinned = _untouched, _nothing
        else:
            laid = pin_by_layout(runner, call)
            pinned = pin(runner, call) if laid is None else None
        # Besides the tensors of a step, and perhaps its offsets, nothing is given.
        is_step = (
            looked_at in (_OF_STEPS, [*_OF_STEPS, TENSORS.index("cu_seqlens")])
            and given["disable_state_update"] is False
        )
        has_word = is_step and call.layout is None and not is_host_tensor and not grads and pinned is not None
        profile = None
        if call.layout is not None:
            profile = call.layout.profile
        elif is_host_tensor:
            profile = VarlenProfile.of(call.n, call.offsets[-1], longest_of(call.offsets))
        return cls(
            softplus_beta=given["softplus_beta"],
            threshold=given["softplus_threshold"],
            scale=given["scale"],
            l2norm=given["use_qk_l2norm_in_kernel"],
            state_layout=given["state_layout"],
            is_kda=given["is_kda"],
            lower_bound=given["lower_bound"],
            neg_eigval=given["allow_neg_eigval"],
            disabled=given["disable_state_update"],
            max_seqlen=call.max_seqlen,
            backend=given["backend"],
            forced=active(bound.decision.op),
            capturing=problem.mode == "graph",
            grad=torch.is_grad_enabled() if grads else None,
            shapes=(call.q.shape, call.v.shape),
            has_cu=call.cu_seqlens is not None,
            has_pool=call.pool is not None,
            has_steps=call.intermediates is not None,
            has_parents=call.parents is not None,
            has_out=given["out"] is not None,
            separate=output_slots is not None,
            is_step=is_step,
            word=settings_of(*(given[name] for name in Settings._fields)) if has_word else None,
            present=present,
            guard=guard(present(tensors)),
            on_host=call.q.is_cpu,
            on_cuda=call.q.is_cuda,
            host_lengths=is_host_tensor,
            profile=profile,
            rows=call.q.shape[1],
            steps=min(steps) if steps else call.q.shape[1],
            identity=None if call.layout is None else call.layout.identity,
            offsets=list(call.offsets) if is_host_tensor else None,
            reshape=_reshape(given, call),
            new_output=None if call.out is None or given["out"] is not None else output_maker(call.v, call.q.dtype),
            pinned=pinned,
            laid=laid,
            runner=runner,
            numbers=(call.softplus_beta, call.softplus_threshold, call.scale, call.lower_bound),
            decision=bound.decision,
            problem=problem,
        )

    def run(self, call: Call) -> torch.Tensor:
        """Run ``call``, which this was made of; raises what the runner raises."""
        if self.pinned is not None:
            self.pinned(_tensors_of(call))
        elif self.laid is not None:
            self.laid(_tensors_of(call), call.layout)
        else:
            return self.runner(call)  # type: ignore[no-any-return]
        assert call.out is not None, "pinned calls have an output"
        return call.out

    def takes_layout(self, layout: SequenceLayout) -> bool:
        """Whether another layout of as many sequences is as valid, and is decided alike; remembered if so."""
        if self.host_lengths or layout.profile != self.profile:
            return False
        if layout.tokens > self.rows or layout.longest > self.steps:
            return False
        self.identity = layout.identity
        return True

    def takes_offsets(self, offsets: list[int]) -> bool:
        """The same for offsets read from a tensor on the host. Raises ArgumentValueError for impossible ones."""
        check_offsets(offsets)
        longest = longest_of(offsets)
        if offsets[-1] > self.rows or longest > self.steps:
            return False
        if VarlenProfile.of(len(offsets) - 1, offsets[-1], longest) != self.profile:
            return False
        self.offsets = offsets
        return True


def _reshape(given: Mapping[str, Any], call: Call) -> Reshape | None:
    if call.a is given["a"] and call.b is given["b"] and call.dt_bias is given["dt_bias"]:
        return None
    (batch, length), bias = call.q.shape[:2], call.dt_bias.shape

    def reshape(
        a: torch.Tensor, b: torch.Tensor, dt_bias: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        a, b = as_gate("a", a, batch, length, tuple(bias)), as_gate("b", b, batch, length, (bias[0],))
        return a, b, dt_bias if dt_bias.shape == bias else dt_bias.unflatten(0, bias)  # type: ignore[no-untyped-call]

    return reshape


def _nothing(tensors: tuple[Any, ...]) -> None:
    """The pinned runner of calls without a token or a sequence."""


def _untouched(call: Call) -> torch.Tensor | None:
    """The runner of such calls."""
    return call.out
