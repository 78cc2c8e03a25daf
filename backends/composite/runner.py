"""The bound runner: a batch's runs of short and of long sequences, each as one call of the backend of its part."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from ...errors import NoBackendError
from ...registry.backend import Backend, Chunked, Config, Pinnable, Pinned, PinnedByLayout, Runner
from ...registry.ops.fused_sigmoid_gating.call import Call
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ...registry.plugins import checked
from ...registry.varlen.layout import SequenceLayout
from ..launch.launcher import Runner as Launched
from .addressed import Assigned, Kinds
from .bound import config_within
from .part import Part, capable, may_run_beside
from .profiles import long_part, short_part
from .streams import SideStreams
from .subcall import call_of

if TYPE_CHECKING:
    from ...registry.varlen.profile import VarlenProfile

__all__ = ["MOST_BOUND", "MOST_RUNS", "CompositeRunner"]

#: Runs up to which a batch is divided. Engines put decode rows first and prompts behind: two runs. Each is at least one
#: launch, so a batch that goes to and fro more often runs whole, on the backend of the long part.
MOST_RUNS = 8
#: Runners kept for parts of other sizes; beyond, the oldest go.
MOST_BOUND = 64

_Work = tuple[bool, Runner, Call]


class CompositeRunner:
    """Runs calls of one problem and config. Safe to call from several threads, on several streams.

    Everything is bound before anything runs, so a call that cannot be compiled has written nothing.

    Attributes:
        problem, config: what it was bound to.
        short, long: the parts; threshold: tokens up to which a sequence is short.
        bound: the error bound that every part keeps.
    """

    def __init__(
        self,
        problem: Problem,
        config: Config,
        bound: Chunked,
        backends: Mapping[str, Backend],
        op: str,
        streams: SideStreams,
    ) -> None:
        self.problem, self.config = problem, config
        self.short, self.long = Part.parse(str(config["short"])), Part.parse(str(config["long"]))
        self.threshold = int(config["threshold"])
        self.bound = bound
        self._streams = streams if int(config["streams"]) > 1 else None
        self._backends, self._op = backends, op
        self._bound: dict[tuple[bool, VarlenProfile], Runner] = {}
        self._lock = threading.Lock()
        self._expected = {False: short_part(problem), True: long_part(problem)}
        launched = [isinstance(self._runner(long, of.profile), Launched) for long, of in self._expected.items()]
        #: None where calls are taken apart by views.
        self._kinds = Kinds(self._assigned, self._by_views, self._streams) if all(launched) else None

    def __call__(self, call: Call) -> torch.Tensor:
        """Write the output, the pool and the intermediate states; see :class:`Call` for shapes."""
        out = call.out
        if out is None:
            out = torch.zeros(call.v.shape, dtype=call.q.dtype, device=call.q.device)
            call = call.replace(out=out)
        addressed = None if self._kinds is None else self._kinds.of(call)
        if addressed is None:
            self._by_views(call)
        else:
            addressed(call)
        return out

    def pin(self, call: Call) -> Pinned | None:
        """None: such calls need their lengths. Compiles what the parts of ``call``, which has its output, need."""
        if call.out is not None and self.pin_by_layout(call) is None:
            for _, run, part in self._work(call):
                _prepare(run, part)
        return None

    def pin_by_layout(self, call: Call) -> PinnedByLayout | None:
        """See ``registry.backend.PinnableByLayout``. None where a part's kernels are not launched by address."""
        addressed = None if self._kinds is None else self._kinds.of(call)
        return addressed.run if addressed is not None and addressed.ready(call) else None

    def _by_views(self, call: Call) -> None:
        """Run ``call``, which has its output, as calls of its parts."""
        work = self._work(call)
        if self._streams is not None and len({long for long, _, _ in work}) > 1:
            # The prompts, which take longest: their kernels go first wherever there is room for a block.
            self._streams.both(call.q.device, _running(work, long=True), _running(work, long=False))
        else:
            for _, run, part in work:
                run(part)

    def _work(self, call: Call) -> Sequence[_Work]:
        """The calls that ``call`` is divided into, in batch order, and their runners."""
        if not (call.n and call.tokens):
            return ()
        layout = call.layout
        if layout is None:
            assert call.cu_seqlens is not None
            layout = SequenceLayout(call.offsets, call.cu_seqlens)
        return [(long, do, call if run is None else call_of(call, run)) for long, do, run in self._assigned(layout)]

    def _assigned(self, layout: SequenceLayout) -> Sequence[Assigned]:
        """The runs of a batch, in its order, and their runners."""
        spans = layout.spans(self.threshold)
        if len(spans) > MOST_RUNS:
            return ((True, self._runner(True, layout.profile), None),)
        if len(spans) == 1:
            return ((spans[0].long, self._runner(spans[0].long, layout.profile), None),)
        runs = layout.runs(self.threshold)
        return [(r.span.long, self._runner(r.span.long, r.layout.profile), r) for r in runs]

    def _runner(self, long: bool, profile: VarlenProfile) -> Runner:
        """The runner of a run of this profile: bound now, or earlier."""
        key = long, profile
        runner = self._bound.get(key)
        if runner is None:
            with self._lock:
                runner = self._bound.get(key)
                if runner is None:
                    runner = self._bind(long, replace(self.problem, profile=profile))
                    if len(self._bound) >= MOST_BOUND:
                        del self._bound[next(iter(self._bound))]
                    self._bound[key] = runner
        return runner

    def _bind(self, long: bool, problem: Problem) -> Runner:
        part, expected = self.long if long else self.short, self._expected[long]
        backend, config = chosen(self._backends, self._op, part, problem, self.bound, expected)
        if not may_run_beside(backend):
            self._streams = None
        return backend.bind(problem, config)


def chosen(
    backends: Mapping[str, Backend], op: str, part: Part, problem: Problem, bound: Chunked, expected: Problem
) -> tuple[Backend, Config]:
    """What runs ``problem`` for ``part``: its backend, or where that declines, the first in heuristic order that does.

    Args:
        expected: the problem that ``part`` was made for.

    Raises:
        NoBackendError: nobody can within ``bound``.
    """
    wanted = backends.get(part.backend)
    if wanted is not None and checked(wanted, problem):
        config = config_within(bound, wanted, part.label, problem, expected)
        if config is not None:
            return wanted, config
    others = capable(backends.values(), problem)
    for backend in others:
        config = config_within(bound, backend, "", problem, expected)
        if config is not None:
            return backend, config
    cut = f", cut at {bound.cut}" if bound.cut else ""
    reason = f"no config within the bound for chunks of {bound.tokens} tokens{cut}"
    raise NoBackendError(op, [(b.name, "feature", reason) for b in others])


def _prepare(runner: object, call: Call) -> None:
    if isinstance(runner, Pinnable):
        runner.pin(call)


def _running(work: Sequence[_Work], long: bool) -> Callable[[], None]:
    def run() -> None:
        for side, runner, part in work:
            if side is long:
                runner(part)

    return run
