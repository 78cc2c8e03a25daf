"""``composite``, ``composite_bf16``: short and long sequences of one batch, each on the backend that suits them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

from ...registry.backend import Backend, Config, Runner, fingerprint_files, works_in_chunks
from ...registry.decision import Accepted, RejectCode, Rejected, Verdict
from ...registry.ops.fused_sigmoid_gating.problem import Problem
from ...registry.plugins import checked
from ...registry.varlen.classes import LengthClass
from .bound import bound_of
from .part import Part
from .profiles import long_part, short_part
from .space import Sides, configs, sides_of
from .streams import SideStreams

__all__ = ["Composite", "CompositeBf16"]

_OWN_PACKAGE = __name__.partition(".")[0]
_EQUAL = (LengthClass.DECODE, LengthClass.UNIFORM)
#: Tokens per sequence beyond which most of a batch is prompts. A profile has the ends of buckets: one prompt of 2048
#: beside 63 decode rows is 4096 in 64.
_PROMPTS = 64
#: Tokens times value heads below which two calls from the host take longer than one kernel for everything.
_TWO_CALLS = 1 << 13
#: Sequences times value heads from which, in a CUDA graph, rows beside a prompt that is walked over too gain by being
#: on a stream of their own: with 30 rows and 30 tokens a sixth to a third, with 3 rows, 16 tokens and 8 heads nothing.
_TWO_WALKS = 256


def _everywhere(backend: Backend) -> bool:
    """Whether every process has it, at any version of isokern's own."""
    return type(backend).__module__.partition(".")[0] == _OWN_PACKAGE and backend.provenance != "external"


class Composite(Backend):
    """Any batch of unequal lengths that the host knows; its parts run on isokern's other backends.

    Config ``threshold``: tokens up to which a sequence is short; ``short`` and ``long``: the backend of each part, as
    ``name`` or ``name[config]``; ``streams``: 2 runs the long part beside the short one on a GPU; ``chunk`` and
    ``cut``: tokens of the longest chunk among the parts and of the segments that long sequences are cut into, for the
    error bound (0: none is chunked, none is cut).

    A part's results are those of its backend, so the bound is that of chunked forms as soon as one of them is chunked,
    and that of sequences cut into segments as soon as one of them cuts.

    Args:
        parts: the backends to choose from, by name; None: those that come with isokern and run no other library's
            kernels. Every process finds them, so a stored choice means the same everywhere. Other composites are left
            out.
    """

    op: ClassVar[str] = "fused_sigmoid_gating"
    name: ClassVar[str] = "composite"
    provenance: ClassVar[str] = "composite"
    requires: ClassVar[tuple[str, ...]] = ("torch",)
    tags: ClassVar[frozenset[str]] = frozenset({"repeatable"})
    priority: ClassVar[int] = 5
    #: Places before its parts in the heuristic order.
    _before: ClassVar[int] = 1
    accuracy: ClassVar[str] = "chunked"
    cuts: ClassVar[bool] = True

    def __init__(self, parts: Callable[[], Mapping[str, Backend]] | None = None) -> None:
        self._given = parts
        self._streams = SideStreams()

    def parts(self) -> Mapping[str, Backend]:
        """The backends that may run a part, by name."""
        if self._given is not None:
            found = self._given()
        else:
            from ... import registry  # not before it is needed: the registry is what loads this module

            known = registry.backends(self.op)
            found = {n: b for n, b in known.items() if _everywhere(b)}
        return {name: b for name, b in found.items() if not isinstance(b, Composite) and self._admits(b)}

    def _admits(self, backend: Backend) -> bool:
        """Whether it may run a part: rounded operands are for those who allow them."""
        return backend.accuracy != "rounded"

    def _sides(self, problem: Problem) -> Sides:
        return sides_of(self.parts(), problem, self.accuracy == "rounded")

    def rank(self, problem: Problem) -> int:
        """Before every other backend where each part has its own first choice, the long one's a chunked backend.

        On a GPU only, for batches whose longest sequence decides the time: there a kernel that walks over the tokens
        takes many times as long as a chunked one. Launched from the host, if they have enough tokens, and what is
        mostly prompts is left whole to a backend that cuts, where that comes first by itself. In a CUDA graph also
        where both parts are walked over, side by side. What is mostly prompts is left whole to a backend that rounds,
        where that is allowed. On a CPU ``numba_cpu`` is the first choice for both parts.
        """
        if problem.device != "cuda" or problem.profile.length_class is not LengthClass.HEAVY:
            return self.priority
        by_graph = problem.mode == "graph"
        if not by_graph and problem.profile.tokens * problem.hv < _TWO_CALLS:
            return self.priority
        prompts = problem.profile.tokens > _PROMPTS * problem.profile.n
        if problem.accuracy == "rounded" and prompts:
            return self.priority
        if not self.check(problem):
            return self.priority
        sides = self._sides(problem)
        if not works_in_chunks(sides.pair[1]):
            if not (sides.side_by_side and problem.profile.n * problem.hv >= _TWO_WALKS):
                return self.priority
        elif not works_in_chunks(sides.for_long[0]):
            return self.priority
        whole = (b for b in self.parts().values() if by_graph or not (prompts and b.cuts))
        return self._before + max(b.rank(problem) for b in whole)

    def check(self, problem: Problem) -> Verdict:
        if problem.grad:
            return Rejected(RejectCode.GRAD, "not differentiable: its parts write into one output")
        if not problem.varlen:
            return Rejected(RejectCode.FEATURE, "sequences of equal length: nothing to split")
        if not problem.lengths_on_host:
            return Rejected(RejectCode.FEATURE, "needs the lengths on the host: pass cu_seqlens as a SequenceLayout")
        if problem.profile.length_class in _EQUAL:
            return Rejected(RejectCode.SHAPE, f"lengths of class {problem.profile.length_class}: nothing to split")
        sides = self._sides(problem)
        for which, able in (("short", sides.for_short), ("long", sides.for_long)):
            if not able:
                return Rejected(RejectCode.FEATURE, f"no other backend runs its {which} sequences")
        # What walks over the tokens goes with everything; between two that work in chunks there may be no common bound.
        if works_in_chunks(sides.for_short[0]) and not self.configs(problem):
            return Rejected(RejectCode.FEATURE, "no error bound covers both parts, whichever backends run them")
        return Accepted()

    def configs(self, problem: Problem) -> Sequence[Config]:
        return configs(self._sides(problem), problem)

    def bind(self, problem: Problem, config: Config) -> Runner:
        from .runner import CompositeRunner

        return CompositeRunner(problem, config, bound_of(self, config), self.parts(), self.op, self._streams)

    def compile(self, problem: Problem, config: Config) -> None:
        from .runner import chosen

        for side, expected in (("short", short_part(problem)), ("long", long_part(problem))):
            part = Part.parse(str(config[side]))
            backend, setting = chosen(self.parts(), self.op, part, expected, bound_of(self, config), expected)
            backend.compile(expected, setting)

    def sources(self) -> Sequence[Path]:
        varlen = Path(__file__).parents[2] / "registry" / "varlen"
        return (*sorted(Path(__file__).parent.glob("*.py")), varlen / "layout.py", varlen / "runs.py")

    def fingerprint(self) -> str:
        """Changes with every backend that may run a part, too."""
        return fingerprint_files(self.sources(), {name: b.fingerprint() for name, b in self.parts().items()})


class CompositeBf16(Composite):
    """The same with parts of any class, one of which rounds the operands of its products to bfloat16.

    So every sequence of the batch is held to the bound of rounded operands. Runs where it is named, or where those are
    allowed (``registry.use(op, accuracy="rounded")``); never unasked.
    """

    name: ClassVar[str] = "composite_bf16"
    accuracy: ClassVar[str] = "rounded"
    _before: ClassVar[int] = 2  # and so before ``composite``

    def _admits(self, backend: Backend) -> bool:
        return True

    def check(self, problem: Problem) -> Verdict:
        sides = self._sides(problem)
        if not sides.chunked:
            return self._nobody_rounds(sides)
        return super().check(problem)

    def _nobody_rounds(self, sides: Sides) -> Verdict:
        """Why none of those that would round runs the long part: what the first of them says."""
        rounding = [b for b in self.parts().values() if b.accuracy == "rounded"]
        for backend in sorted(rounding, key=lambda b: (-b.priority, b.name)):
            verdict = checked(backend, sides.long)
            if isinstance(verdict, Rejected):
                return Rejected(verdict.code, f"no part that rounds: {backend.name}: {verdict.reason}")
        return Rejected(RejectCode.FEATURE, "none of the backends that could run a part rounds operands")
