"""A stack of linear-attention layers that serves the steps of a traffic, on whatever backend the registry is told.

What a model does between these layers is the same for every backend and left out: each layer reads its own made-up q,
k, v, a and b. What belongs to the choice of a backend is there: a state pool per layer, slots that requests take over
from one another, one ``SequenceLayout`` per step shared by all layers, and on a GPU CUDA graphs for decode steps.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from replay_traffic import Step, Traffic

from isokern import registry
from isokern.registry.ops.fused_sigmoid_gating.catalogue import Shard
from isokern.registry.ops.fused_sigmoid_gating.concrete import concrete
from isokern.registry.ops.fused_sigmoid_gating.lengths import LengthLayout
from isokern.registry.ops.fused_sigmoid_gating.workload_case import Case, Phase, case_name
from isokern.registry.varlen.graph_layout import GraphLayout
from isokern.registry.varlen.layout import SequenceLayout
from isokern.registry.varlen.profile import bucket
from isokern.registry.varlen.transfer import to_device

__all__ = ["OP", "Batch", "Choice", "Replay", "Stack", "case_of"]

OP = "fused_sigmoid_gating"
#: Token tensors of consecutive steps begin at other rows; as far apart as keeps every address aligned as allocated.
_ALIGNED_ROWS = 64
_ROTATE = 16
_TOKENS = ("a", "q", "k", "v", "b")

#: What records the launches of a function and returns what launches them again; None: decode steps are not captured.
Capture = Callable[[Callable[[], object]], Callable[[], object]]


@dataclass(frozen=True, slots=True)
class Choice:
    """Who runs the steps.

    Attributes:
        name: as printed.
        decode, mixed: backends forced in steps without and with a prompt; None: the registry's own choice.
    """

    name: str
    decode: str | None = None
    mixed: str | None = None

    @classmethod
    def parse(cls, text: str) -> Choice:
        """``"triton"``, or ``"flashinfer_decode+flashinfer_prefill"``: one for decode steps, one for the others."""
        decode, _, mixed = text.partition("+")
        return cls(text, decode, mixed or decode)

    def backend(self, step: Step) -> str | None:
        """The backend forced in ``step``."""
        return self.decode if step.is_decode else self.mixed

    def forced(self, step: Step) -> AbstractContextManager[None]:
        """A context in which the op runs ``step`` as chosen."""
        name = self.backend(step)
        return nullcontext() if name is None else registry.use(OP, name)


def case_of(lengths: Sequence[int], state_layout: str | None = None) -> Case:
    """The serving case of a step with these lengths."""
    ones = lengths.count(1)
    phase = Phase.DECODE if ones == len(lengths) else Phase.MIXED if ones else Phase.PREFILL
    layout = LengthLayout.of_lengths(lengths)
    return Case(case_name(phase, layout), phase, layout, state_layout=state_layout)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One step with its token tensors.

    Attributes:
        step: what is in it. first: row of the layers' token buffers at which it begins.
        arguments: of each layer's call, but for pool, slots and offsets; q ``[1, T, H, K]`` and so on, views.
    """

    step: Step
    first: int
    arguments: tuple[Mapping[str, Any], ...]


class Stack:
    """The layers: gate parameters, token buffers, and the states that a traffic finds in the pools.

    Attributes:
        batches: the traffic's steps, in order.
        buffers: each layer's arguments over all rows.
        initial: each layer's pool, ``[slots, HV, K, V]`` (``vk``: V by K).
    """

    def __init__(
        self,
        shard: Shard,
        traffic: Traffic,
        layers: int,
        device: str,
        *,
        seed: int = 0,
        state_layout: str | None = None,
        graphs: bool = False,
    ) -> None:
        """``graphs``: decode steps read the first rows, as a graph of them must."""
        self.device = device
        rows = max(step.tokens for step in traffic.steps)
        rows = max(rows, *(bucket(step.decode_rows) for step in traffic.steps)) + _ROTATE * _ALIGNED_ROWS
        draw = random.Random(seed)
        drawn = ((step, draw.randrange(_ROTATE) * _ALIGNED_ROWS) for step in traffic.steps)
        firsts = [0 if graphs and step.is_decode else first for step, first in drawn]
        spec = concrete(shard, case_of((rows,), state_layout)).but(extra_slots=traffic.slots - 1)
        self.buffers: list[dict[str, Any]] = []
        self.initial: list[torch.Tensor] = []
        for layer in range(layers):
            kwargs = registry.spec(OP).make_inputs(spec, seed + layer, device).kwargs
            self.initial.append(kwargs.pop("initial_state_source"))
            for name in ("initial_state_indices", "cu_seqlens"):
                kwargs.pop(name)
            self.buffers.append(kwargs)
        self.batches = tuple(
            Batch(step, first, tuple(self._part(layer, first, step.tokens) for layer in range(layers)))
            for step, first in zip(traffic.steps, firsts, strict=True)
        )

    def _part(self, layer: int, first: int, tokens: int) -> dict[str, Any]:
        whole = self.buffers[layer]
        return {**whole, **{name: whole[name][:, first : first + tokens] for name in _TOKENS}}

    def first_rows(self, rows: int) -> tuple[dict[str, Any], ...]:
        """Each layer's arguments over the first ``rows`` rows: always the same tensors' places, as a graph needs."""
        return tuple(self._part(layer, 0, rows) for layer in range(len(self.buffers)))

    @property
    def state_bytes(self) -> int:
        """Bytes of one set of pools; every choice has its own."""
        return sum(pool.numel() * pool.element_size() for pool in self.initial)


@dataclass(frozen=True, slots=True, eq=False)
class _Graph:
    layout: GraphLayout
    outputs: tuple[torch.Tensor, ...]
    replay: Callable[[], object]


class Replay:
    """One choice serving the traffic on pools of its own.

    Args:
        capture: makes graphs of decode steps, one per power of two of rows, at the first such step (the stack must be
            made for it); None: all steps are launched from the host.
    """

    def __init__(self, stack: Stack, choice: Choice, capture: Capture | None = None) -> None:
        self.stack = stack
        self.choice = choice
        self.pools = [pool.clone() for pool in stack.initial]
        self._op = registry.get(OP)
        self._capture = capture
        self._graphs: dict[int, _Graph] = {}

    @property
    def graphed(self) -> bool:
        """Whether decode steps run as graphs."""
        return self._capture is not None

    def reset(self) -> None:
        """Back to the states before the first step."""
        for pool, initial in zip(self.pools, self.stack.initial, strict=True):
            pool.copy_(initial)

    def admit(self, step: Step) -> None:
        """Zero the states of requests that begin in ``step``: their slots hold what the last owners left."""
        if step.fresh:
            slots = to_device(step.fresh, torch.int64, self.stack.device)
            for pool in self.pools:
                pool.index_fill_(0, slots, 0)

    def run(self, batch: Batch) -> tuple[torch.Tensor, ...]:
        """All layers of one step; each layer's output ``[1, T, HV, V]`` (a graph's is overwritten by its next run)."""
        step = batch.step
        with self.choice.forced(step):
            if step.is_decode and self._capture is not None:
                return self._replayed(step, self._capture)
            layout = SequenceLayout.from_lengths(step.lengths, self.stack.device)
            slots = to_device(step.slots, torch.int32, self.stack.device)
            return self._layers(batch.arguments, layout, slots)

    def _layers(
        self, arguments: Sequence[Mapping[str, Any]], layout: SequenceLayout, slots: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        return tuple(
            self._op(**own, initial_state_source=pool, initial_state_indices=slots, cu_seqlens=layout)
            for own, pool in zip(arguments, self.pools, strict=True)
        )

    def _replayed(self, step: Step, capture: Capture) -> tuple[torch.Tensor, ...]:
        rows = bucket(step.decode_rows)
        graph = self._graphs.get(rows)
        if graph is None:
            graph = self._graphs[rows] = self._captured(rows, capture)
        graph.layout.update(step.lengths, step.slots)
        graph.replay()
        return tuple(output[:, : step.decode_rows] for output in graph.outputs)

    def _captured(self, rows: int, capture: Capture) -> _Graph:
        """A graph of all layers for up to ``rows`` decode rows; nothing is stored while it is made."""
        layout = SequenceLayout.padded(rows, self.stack.device, max_length=1, max_tokens=rows)
        outputs = []
        calls = []
        for own, pool in zip(self.stack.first_rows(rows), self.pools, strict=True):
            outputs.append(torch.empty_like(own["v"]))
            states = {"initial_state_source": pool, "initial_state_indices": layout.slots, "cu_seqlens": layout}
            calls.append({**own, **states, "out": outputs[-1]})
            self._op.prepare(**calls[-1])  # inside a capture nothing may compile

        def launch() -> None:
            for call in calls:
                self._op(**call)

        replay = capture(launch)
        replay()  # uploads the graph: its first replay is slower than all others
        return _Graph(layout, tuple(outputs), replay)
